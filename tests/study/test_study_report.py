"""The results of a study of made-up scores hold the truth that is known."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml

from etude.cli.app import app
from etude.errors import EtudeError
from etude.report.result_table import p_value
from etude.study.analysis import analyse
from etude.study.collect import _implied, collect, conditions
from etude.study.measurement import samplers
from etude.study.study_page import write_results
from etude.study.tables import tables
from support.fake_study import BEST, SMALL, TREE, made_up, write


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    study, gain = made_up()
    directory = write(study, gain, tmp_path_factory.mktemp("study"))
    page = write_results(study, directory)
    return study, directory, page, json.loads((directory.root / "results.json").read_text())


def test_cells_that_differ_in_the_seed_alone_are_one_condition(made):
    study, directory, _, found = made
    assert len(conditions(collect(study, directory)[0])) == len(found["conditions"]) == 9
    assert all(c["seeds"] == [0, 1, 2] for c in found["conditions"])


def test_the_report_command_builds_a_studys_page_anew(made, capsys):
    _, directory, page, _ = made
    before = page.read_text()
    page.unlink()
    (directory.root / "figures" / "of-another-name.svg").write_text("<svg/>")
    (directory.root / "study.yaml").write_text(yaml.safe_dump(TREE, sort_keys=False))
    app(["report", str(directory.root)], standalone_mode=False)
    assert capsys.readouterr().out.strip() == str(page)
    assert page.read_text().count("<img") == before.count("<img") > 0
    assert not (directory.root / "figures" / "of-another-name.svg").exists()


def test_a_label_leaves_out_what_follows_from_the_keys_that_the_study_names():
    trees = [{"rewards": r, "rate": {"a": 1, "b": 2}[r], "sampling.eta": eta} for r in "ab" for eta in (1.0, 2.0)]
    keys = list(trees[0])
    assert list(_implied(keys, {"rewards", "sampling.eta", "seed"}, trees)) == ["rate"]
    assert list(_implied(keys, {"rewards", "sampling.eta"}, [*trees, trees[0] | {"rate": 3}])) == []


def test_estimates_hold_the_truth(made):
    for condition in made[3]["conditions"]:
        estimates = condition["estimates"][str(condition["steps"])][condition["trained"][0]]
        eta = condition["eta"]
        truth = {
            "improvement": 10 * eta - 3 * eta**2,
            "gap": 20 * eta**2 / condition["steps"],
            "base_gap": 20 * eta**2 / condition["steps"],
            "gap_change": 0.0,
        }
        for quantity, value in truth.items():
            width = estimates[quantity]["high"] - estimates[quantity]["low"]
            assert estimates[quantity]["low"] - width / 2 < value < estimates[quantity]["high"] + width / 2


def test_the_best_weights_are_set_beside_the_last_on_images_that_did_not_choose(made):
    study, _, _, found = made
    chosen = study.cells[0].config.evaluation.num_images
    for condition in found["conditions"]:
        kept = condition["best_weights"]
        assert kept["reward"] == "colorfulness"
        assert [kept["gain"][key] for key in ("mean", "low", "high")] == pytest.approx([BEST] * 3)
        assert kept["gain"]["n"] == 3 * (32 - chosen)
    shown = next(t for t in tables(found) if t.title == "Best checkpoint")
    assert [row[0] for row in shown.rows] == [c["label"] for c in found["conditions"]]


def test_comparisons_are_paired_with_the_baseline_and_corrected(made):
    rows = made[3]["comparisons"]
    assert {(row["against"], row["reward"]) for row in rows} == {
        ("alignment, η = 1, 10 steps", "alignment"),
        ("colorfulness, η = 1, 10 steps", "colorfulness"),
    }
    low = next(row for row in rows if row["label"] == "alignment, η = 0.5, 10 steps")
    assert low["difference"]["high"] < 0
    assert abs(low["difference"]["mean"] + 2.75) < 0.5  # 10 * 0.5 - 3 * 0.25 less 10 - 3
    assert all(row["difference"]["p_holm"] >= row["difference"]["p"] for row in rows)


def test_the_discretisation_is_shown_beside_the_theory(made):
    rows = made[3]["discretisation"]
    assert len({(r["kernel"], r["eta"], r["steps"], r["reward"]) for r in rows}) == len(rows) == 9
    gddim = [r for r in rows if r["kernel"] == "gddim" and r["reward"] == "alignment"]
    theory = [abs(r["theory"]["total"]) for r in gddim]
    assert theory == sorted(theory)


def test_the_matrix_has_a_row_for_the_base_model_and_each_training_eta(made):
    table = next(t for t in made[3]["matrix"] if t["reward"] == "alignment")
    assert table["columns"] == ["ODE", "Heun", "DPM-Solver++ 2M", "SDE η = 0.5", "SDE η = 1", "SDE η = 2"]
    assert [row["label"] for row in table["rows"]] == ["base model", "η = 0.5", "η = 1", "η = 2"]


def test_every_cell_and_every_condition_has_its_rows_in_the_csv(made):
    rows = list(csv.DictReader((made[1].root / "results.csv").open()))
    final = [row for row in rows if row["evaluation"] == "final" and row["seeds"] == "1"]
    assert {row["cell"] for row in final} == {cell.slug for cell in made[0].cells}
    assert len([row for row in rows if row["seeds"] == "3"]) == 9 * 2
    for row in final:
        assert float(row["gap_low"]) <= float(row["gap"]) <= float(row["gap_high"])
        assert row["seconds"]


def test_the_page_refers_to_nothing_outside_and_every_image_has_words(made):
    html = made[2].read_text()

    class Reader(HTMLParser):
        outside, silent, images = [], 0, 0

        def handle_starttag(self, tag, attributes):
            found = dict(attributes)
            self.outside += [v for k, v in attributes if k in {"src", "href"} and not v.startswith(("data:", "#"))]
            self.images += tag == "img"
            self.silent += tag == "img" and not found.get("alt")

    reader = Reader()
    reader.feed(html)
    assert (reader.outside, reader.silent) == ([], 0)
    assert reader.images == 3 * (4 + 5)  # three prompts; the base model, the etas, and for one reward ddim
    assert html.count("<svg") == html.count('role="img"') > 10
    assert not re.search(r"url\((?!#)", html)


def test_every_figure_of_the_page_is_a_file_that_stands_alone(made):
    files = {path.name: path.read_text() for path in (made[1].root / "figures").iterdir()}
    page = (made[1].root / "report.html").read_text()
    assert len(files) == page.count("<svg ")
    for text in files.values():
        root = ElementTree.fromstring(text)  # noqa: S314 - our own file
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        used, defined = set(re.findall(r"var\((--[a-z-]+)\)", text)), set(re.findall(r"(--[a-z-]+):", text))
        assert used <= defined


def test_no_digit_is_finer_than_its_interval(made):
    for table in tables(made[3]):
        for row in table.rows:
            for cell in row[1:]:
                parts = re.findall(r"\d+(?:\.(\d+))?", cell)
                assert "[" not in cell or len({len(decimals) for decimals in parts}) == 1


def test_tables_are_well_formed_markdown(made):
    text = (made[1].root / "tables.md").read_text()
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") - line.count("\\|") for line in block.splitlines()}) == 1


def test_a_study_with_nothing_done_says_so(made, tmp_path):
    from etude.study.directory import StudyDirectory

    study, directory = made[0], StudyDirectory(tmp_path)
    assert analyse(study, collect(study, directory)[0])["done"] == 0
    assert "No cell is done yet" in write_results(study, directory).read_text()


def test_p_values_are_never_zero():
    assert [p_value(p) for p in (None, 1e-12, 0.0123, 0.4)] == ["–", "< 0.001", "0.012", "0.40"]


def small(tmp_path, **changes):
    study, gain = made_up(SMALL | changes)
    return study, write(study, gain, tmp_path)


@pytest.mark.parametrize("key", ["evaluation.every", "evaluation.num_steps", "checkpoint.keep"])
def test_no_seed_counts_twice_whatever_a_grid_is_over(tmp_path, key):
    study, directory = small(tmp_path, grids=[{"keys": {"rewards": ["colorfulness"], key: [1, 2]}}])
    found = conditions(collect(study, directory)[0])
    assert [c.seeds for c in found] == [[0, 1], [0, 1]]
    study, directory = small(
        tmp_path / "unnamed",
        grids=[
            {"keys": {"rewards": ["colorfulness"], "sampling.eta": [1.0]}},
            {"keys": {"rewards": ["colorfulness"], "sampling.kernel": ["gddim"]}, "overrides": {"checkpoint.keep": 5}},
        ],
    )
    assert all(c.seeds == [0, 1] for c in conditions(collect(study, directory)[0]))


def damage_scores(run):
    (run / "scores.json").write_text('{"measurement"')


def damage_metrics(run):
    (run / "metrics.jsonl").write_text("{}\n" + (run / "metrics.jsonl").read_text())


def lose_a_key(run):
    scores = json.loads((run / "scores.json").read_text())
    del scores["clusters"]
    (run / "scores.json").write_text(json.dumps(scores))


def change_the_configuration(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("iterations: 2", "iterations: 3"))


@pytest.mark.parametrize("harm", [damage_scores, damage_metrics, lose_a_key, change_the_configuration])
def test_a_cell_that_cannot_be_read_is_named_and_keeps_no_other_from_the_page(tmp_path, harm):
    study, directory = small(tmp_path)
    harm(directory.cell(study.cells[0]))
    page = write_results(study, directory).read_text()
    assert json.loads((tmp_path / "results.json").read_text())["done"] == 3
    assert f"{study.cells[0].slug} is left out: " in page


def test_pictures_that_are_missing_or_damaged_are_left_out(tmp_path):
    study, directory = small(tmp_path, measurement={"num_images": 4, "shown": 8})
    assert write_results(study, directory).read_text().count("<img") == 3 * 4
    (directory.cell(study.cells[0]) / "samples" / "study.png").write_bytes(b"\x89PNG")
    assert "<img" not in write_results(study, directory).read_text()


def test_further_step_counts_are_measured_beside_the_cells_own(tmp_path):
    study, directory = small(tmp_path, measurement={"num_images": 16, "steps": [3]})
    assert [s.steps for s in samplers(study.cells[0].config, study.cells[0].measurement)] == [10, 10, 3, 3]
    write_results(study, directory)
    shown = next(
        t for t in tables(analyse(study, collect(study, directory)[0])) if t.title == "Trained on colorfulness"
    )
    assert [row[0].endswith(", at 3 steps") for row in shown.rows] == [False, True, False, True]


def test_a_baseline_need_not_name_the_defaults_of_a_section(tmp_path):
    window = {"strategy": "progressive", "size": 4}
    study, directory = small(
        tmp_path,
        base="emoji-mixgrpo",
        overrides={"iterations": 2, "sampling.window": window},
        grids=[{"keys": {"rewards": ["colorfulness"], "sampling.window.compression": [None, 0.4]}}],
        baseline={"sampling.window": window},
    )
    compared = analyse(study, collect(study, directory)[0])["comparisons"]
    assert [(row["label"], row["against"]) for row in compared] == [
        ("progressive window of 4, Flash 0.4", "progressive window of 4")
    ]


def test_a_study_without_its_baseline_says_that_nothing_is_compared(tmp_path):
    study, directory = small(tmp_path, baseline={"sampling.eta": 7.0})
    assert "Nothing is compared" in write_results(study, directory).read_text()
    with pytest.raises(
        EtudeError, match=r"baseline names sampling\.etaa, which no cell has: did you mean sampling\.eta\?"
    ):
        made_up(SMALL | {"baseline": {"sampling.etaa": 1.0}})

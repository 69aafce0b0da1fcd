"""Races: budgets are what the network is asked, pilots are equal, and a target is reached where it is."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import yaml
from hypothesis import strategies as st
from typer.testing import CliRunner

from etude.cli.app import app
from etude.config import load_config
from etude.errors import EtudeError
from etude.learning.objectives import make_objective
from etude.race.budget import Counter
from etude.race.entries import PilotResult, choose
from etude.race.race_analysis import Curves, analyse_race, reached
from etude.race.race_file import load_race, parse_race
from etude.race.race_page import write_race
from etude.race.start import keep_rules
from etude.study.directory import StudyDirectory
from etude.study.inference import effect
from etude.study.pack import pack
from etude.training.dry_run import ImageSteps, evaluations
from support.fake_race import TEXT, entries, write, write_run
from support.fuzzing import fuzz, refused

GAINS = {"slow": 8.0, "fast": 20.0, "NFT": -2.0}


@pytest.fixture(scope="module")
def laid_out():
    return entries()


@pytest.fixture(scope="module")
def made(laid_out, tmp_path_factory):
    directory = StudyDirectory(tmp_path_factory.mktemp("race"))
    keep_rules(laid_out, directory)
    write(laid_out, directory, GAINS)
    return directory, write_race(laid_out, directory), json.loads((directory.root / "results.json").read_text())


# Budgets


SMALL = {"sampling.num_steps": 6, "rollout.images_per_iteration": 8, "rollout.images_per_prompt": 4}


def test_a_forward_counts_1_and_one_with_its_backward_3():
    config = load_config("emoji-flux-awm", {**SMALL, "objective.kl_coef": 0.1})
    rollout, pairs = 8 * 6, 8 * 4  # four levels of each image
    assert Counter().spent(config, 2) == [0, rollout + (1 + 1 + 3) * pairs, 2 * (rollout + 5 * pairs)]


def test_classifier_free_guidance_asks_the_network_twice():
    plain, guided = (load_config("emoji-ddpo", {**SMALL, "sampling.guidance_scale": w}) for w in (1.0, 3.0))
    counter = Counter()
    assert counter.spent(guided, 1)[-1] == 2 * counter.spent(plain, 1)[-1]
    embedded = [load_config("emoji-mixgrpo", {**SMALL, "sampling.guidance_scale": w}) for w in (1.0, 3.0)]
    assert len({tuple(counter.spent(config, 3)) for config in embedded}) == 1


def test_gradients_of_the_rollout_save_the_second_forward_and_no_backward():
    settings = {**SMALL, "objective.kind": "reinforce", "objective.updates_per_epoch": 1, "objective.kl_coef": 0.0}
    replayed, taken = (
        load_config("emoji-ddpo", {**settings, "sampling.guidance_scale": 1.0, "objective.gradients": how})
        for how in ("replay", "rollout")
    )
    counter, trained = Counter(), 8 * 6
    assert counter.spent(replayed, 1)[-1] - counter.spent(taken, 1)[-1] == trained


def test_the_counts_are_those_of_the_dry_run():
    config = load_config("emoji-ddpo", {**SMALL, "sampling.guidance_scale": 1.0})
    counted = evaluations(config, make_objective(config.objective), ImageSteps(6, 0, 6), 6)
    assert counted == {"rollout": 48, "reference": 48, "replay": 48}
    assert next(Counter().parts(config)) == {**counted, "backward": 96}


def test_a_run_spends_no_more_than_its_budget_and_one_iteration_more_would(laid_out):
    for cell in laid_out.cells:
        spent = laid_out.counter.spent(cell.config, cell.config.iterations + 1)
        budget = laid_out.settings.budget if cell.measured else laid_out.settings.pilots.budget
        assert spent[-2] <= budget < spent[-1]


def test_a_budget_below_one_iteration_is_one_sentence():
    with pytest.raises(EtudeError, match="one iteration costs"):
        entries(TEXT.replace("budget: 400", "budget: 10"))


# Pilots and order


def test_a_heat_runs_its_pilots_and_then_every_method_of_each_seed(laid_out):
    runs = [cell.slug.split("_") for cell in laid_out.cells]
    order = [(heat, what) for (heat, what), _ in groupby((heat, what) for heat, _, what in runs)]
    rounds = ["pilot-1", "pilot-2", "seed-0", "seed-1", "seed-2"]
    assert order == [(heat, what) for heat in ("colorfulness", "alignment") for what in rounds]
    assert [method for heat, method, what in runs if (heat, what) == ("colorfulness", "seed-1")] == [
        "slow",
        "fast",
        "NFT",
    ]


def test_pilots_have_other_seeds_and_prompts_than_the_race(laid_out):
    pilots = [cell.config for cell in laid_out.cells if not cell.measured]
    cells = [cell.config for cell in laid_out.cells if cell.measured]
    assert not {c.seed for c in pilots} & {c.seed for c in cells}
    assert not {c.prompts.evaluation for c in pilots} & {c.prompts.evaluation for c in cells}


def pilot(improvement, excess=0.0, failure=""):
    return PilotResult({}, improvement, {}, excess, failure)


def test_the_largest_improvement_without_an_excessive_fall_is_chosen():
    assert choose([pilot(1.0), pilot(3.0), pilot(2.0)]) == 1
    assert choose([pilot(1.0), pilot(3.0, excess=0.1), pilot(2.0)]) == 2
    assert choose([pilot(1.0, excess=2.0), pilot(0.5, excess=1.0)]) == 1
    assert choose([pilot(1.0), pilot(1.0)]) == 0
    assert choose([pilot(9.0, failure="diverged"), pilot(-1.0)]) == 1


def test_nothing_is_chosen_before_every_pilot_has_run_or_failed():
    assert choose([pilot(1.0), None]) is None
    assert choose([pilot(1.0, failure="diverged")]) is None


def test_a_cell_races_with_the_values_of_the_chosen_pilot(laid_out, tmp_path):
    directory, entry = StudyDirectory(tmp_path), laid_out.all[0]
    assert laid_out.settle(entry.cells[0], directory) is None
    for cell, gain, fall in zip(entry.pilots, (1.0, 9.0), (0.0, 60.0), strict=True):
        write_run(laid_out, cell, directory, gain, fall=fall)
    settled = laid_out.settle(entry.cells[1], directory)
    assert settled.config.optimizer.learning_rate == 0.001  # the other one has lost too much of alignment
    assert (settled.slug, settled.config.seed) == (entry.cells[1].slug, 1)
    results = laid_out.results(entry, directory)
    spent = laid_out.counter.spent(entry.pilots[1].config)[-1]
    assert [result.excess for result in results] == pytest.approx([0.0, 60 * spent / 400 - 5])


# Reaching a target


def points(means, half=0.0):
    return [{"mean": mean, "low": mean - half, "high": mean + half} for mean in means]


def test_a_target_is_reached_on_the_line_between_two_evaluations():
    assert reached([0, 100, 300], points([0, 2, 6]), 4) == {"at": 200, "low": 200, "high": 200}
    assert reached([0, 100], points([0, 2]), 3) == {"at": None, "low": None, "high": None}
    assert reached([0, 100, 200, 300], points([0, 4, 1, 4]), 2)["at"] == 50  # the first time


def test_the_interval_holds_every_budget_at_which_the_curves_interval_holds_the_target():
    curve = [{"mean": 0, "low": 0, "high": 0}, *points([4, 8], half=2)]
    found = reached([0, 100, 200], curve, 4)
    assert found == {"at": 100, "low": pytest.approx(100 * 4 / 6), "high": pytest.approx(150)}
    assert reached([0, 100, 200], curve, 7)["high"] is None


def test_the_interval_holds_the_true_budget_as_often_as_it_says():
    """Improvements that rise by 10 on the whole budget, with effects of seeds, prompts and images; 200 races."""
    rng, hits, x = np.random.default_rng(4), 0, [0, 1, 2, 3, 4]
    clusters = [i % 16 for i in range(32)]
    for _ in range(200):
        own = 10 + 2 * rng.standard_normal((3, 1)) + 4 * rng.standard_normal(16)[None, clusters]
        values = own + 4 * rng.standard_normal((3, 32))
        rows = [effect(list(values * k / 4), clusters, resamples=200).to_dict() for k in x]
        found = reached(x, rows, 5.0)
        hits += found["low"] <= 2.0 <= (found["high"] or np.inf)
    assert 0.90 < hits / 200 <= 0.995  # 95 %, three standard errors either way


def test_at_a_budget_between_two_evaluations_each_image_lies_on_the_line():
    rng = np.random.default_rng(0)
    ode, base = rng.standard_normal((2, 3, 8)), np.zeros((2, 3, 8))
    ode[:, 0] = 0
    curves = Curves([0, 100, 300], 0.1, {"ode": {"r": ode}, "base": {"r": base}}, [0, 1, 2, 3] * 2)
    between = curves.at("r", 200)
    assert between == effect(list((ode[:, 1] + ode[:, 2]) / 2), curves.clusters).to_dict()
    assert curves.at("r", 300) == curves.at("r", 1e9) == curves.estimates("r", "improvement")[-1]


# Results


def method(results, name, heat=0):
    return next(m for m in results["heats"][heat]["methods"] if m["name"] == name)


def test_the_budgets_that_were_made_up_come_out(made):
    slow, fast, nft = (method(made[2], name) for name in GAINS)
    for row, gain in ((slow, 8.0), (fast, 20.0)):
        for each in row["reached"]:
            expected = pytest.approx(400 * each["target"] / gain)
            within = each["target"] <= gain * row["spent"] / 400
            assert each["spent"]["at"] == (expected if within else None)
            if within:
                assert each["seconds"]["at"] == pytest.approx(row["rate"] * each["spent"]["at"])
    assert all(each["spent"]["at"] is None for each in nft["reached"])
    assert slow["rate"] == pytest.approx(1 / 44, rel=0.2)  # a second of training an iteration, evaluations apart
    equal = min(m["spent"] for m in (slow, fast, nft))
    assert fast["at_equal_spent"]["mean"] == pytest.approx(20.0 * equal / 400)


def test_the_end_has_held_out_rewards_and_the_gap_under_one_sde(made):
    fast = method(made[2], "fast")
    final, share = fast["final"], fast["spent"] / 400
    assert final["colorfulness"]["improvement"]["mean"] == pytest.approx(20.0 * share)
    assert final["alignment"]["improvement"]["mean"] == pytest.approx(-share)
    for name in ("own gap", "shared gap"):
        assert final["colorfulness"][name]["mean"] == pytest.approx(-3)
    assert final["colorfulness"]["shared gap, change"]["mean"] == pytest.approx(0, abs=1e-9)


def test_methods_are_compared_with_the_baseline_pair_by_pair(made):
    rows = {row["name"]: row["difference"]["mean"] for row in made[2]["heats"][0]["comparisons"]}
    slow, fast = method(made[2], "slow"), method(made[2], "fast")
    assert rows == {
        "fast": pytest.approx(20 * fast["spent"] / 400 - 8 * slow["spent"] / 400),
        "NFT": pytest.approx(-2 * method(made[2], "NFT")["spent"] / 400 - 8 * slow["spent"] / 400),
    }
    assert [m["name"] for m in made[2]["heats"][1]["methods"]] == ["slow", "NFT"]


def test_every_pilot_is_printed_and_the_second_one_has_been_chosen(made):
    text = made[1].read_text()
    assert text.count("| chosen |") == 5
    for m in made[2]["heats"][0]["methods"]:
        assert m["chosen"] == (0 if m["name"] == "NFT" else 1)  # twice a gain, and NFT's is negative
        assert len(m["pilots"]) == 2
    for table in (
        "budget to reach a reward",
        "At equal budgets",
        "at the end",
        "against the baseline",
        "Costs",
        "pilots",
    ):
        assert table in text


def test_the_figures_of_race_md_are_there(made):
    text, folder = made[1].read_text(), made[0].root / "figures"
    named = {part.partition(")")[0] for part in text.split("(figures/")[1:]}
    assert named == {path.name for path in folder.iterdir()}
    assert any("frontier-windows" in name for name in named)
    assert "colorfulness-improvement-against-training-eta.svg" in named


def test_a_packed_race_gives_the_same_results(laid_out, made, tmp_path):
    directory = StudyDirectory(copytree(made[0].root, tmp_path / "copy"))
    cells = [laid_out.settle(cell, directory) for cell in laid_out.cells]
    assert pack(cells, directory) == len(cells)
    assert not (directory.root / "cells").exists()
    assert analyse_race(laid_out, directory) == made[2]


def test_a_race_without_a_run_says_so(laid_out, tmp_path):
    text = write_race(laid_out, StudyDirectory(tmp_path)).read_text()
    assert "0 of 15 runs and 0 of 10 pilots are done" in text
    assert text.count("not done") == 10


def test_a_failed_run_is_named_and_the_others_count(laid_out, made, tmp_path):
    directory = StudyDirectory(copytree(made[0].root, tmp_path / "copy"))
    lost = next(cell for cell in laid_out.cells if cell.slug == "colorfulness_fast_seed-1")
    directory.failure(lost).parent.mkdir()
    directory.failure(lost).write_text("training diverged\n")
    results = analyse_race(laid_out, directory)
    assert results["unusable"] == {lost.slug: "training diverged"}
    assert method(results, "fast")["seeds"] == [0, 2]


# Rules


def test_the_rules_stand_before_the_runs(laid_out, tmp_path):
    directory = StudyDirectory(tmp_path)
    keep_rules(laid_out, directory)
    keep_rules(laid_out, directory)
    changed = replace(laid_out.race, settings=laid_out.settings.model_copy(update={"budget": 401}), text="x")
    other = entries()
    other.race, other.settings = changed, changed.settings
    with pytest.raises(EtudeError, match="has changed in budget since the race"):
        keep_rules(other, directory)
    assert load_race(tmp_path / "race.yaml").settings == laid_out.settings


def test_seeds_heats_and_methods_may_be_added_at_the_end(laid_out, tmp_path):
    directory = StudyDirectory(tmp_path)
    keep_rules(laid_out, directory)
    more = yaml.safe_load(TEXT)
    more["seeds"].append(3)
    more["methods"]["third"] = {
        **more["methods"]["slow"],
        "overrides": {"sampling.eta": 2.0, "sampling.window.size": 2},
    }
    more["heats"].append({"rewards": "jpeg_compressibility", "targets": [0.1]})
    keep_rules(entries(yaml.safe_dump(more, sort_keys=False)), directory)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("NFT: {base: emoji-flux-nft, pilots: *rates}", "NFT: {base: emoji-flux-nft, pilots: {optimizer.learning_rate: [1]}}",
         "as many pilots as the others, but 'slow' has 2 and 'NFT' 1"),
        ("baseline: slow", "baseline: quick", "'quick' is none of the methods"),
        ("methods: [slow, NFT]", "methods: [slow, DPO]", "'DPO' is none of the methods"),
        ("seed: 9", "seed: 1", r"pilots.seed = 1 is a seed of the race"),
        ("seeds: [0, 1, 2]", "seeds: [0, 0]", "repeats one"),
        ("  fast: {", "  'slow!': {", "two of the methods have one name as a file"),
        ("budget: 400", "budget: 400\nbudgets: 1", "did you mean 'budget'"),
    ],
)  # fmt: skip
def test_an_unfair_file_is_one_sentence(old, new, said):
    with pytest.raises(EtudeError, match=said):
        parse_race(TEXT.replace(old, new))


@fuzz("race file", 60, text=st.text(max_size=200), key=st.sampled_from(sorted(yaml.safe_load(TEXT))))
def test_any_file_is_read_or_refused_in_one_sentence(text, key):
    tree = yaml.safe_load(TEXT)
    tree[key] = text
    refused(parse_race, yaml.safe_dump(tree))
    refused(parse_race, text)


@pytest.mark.parametrize("name", ["emoji-flux", "emoji-sd"])
def test_the_races_of_this_project_can_be_read(name):
    race = load_race(Path(__file__).parents[2] / "studies" / "race" / f"{name}.yaml").settings
    assert len(race.seeds) >= 3
    assert [heat.name for heat in race.heats] == ["colorfulness", "jpeg_compressibility", "alignment"]
    assert {"NFT", "AWM", "DPO", "REINFORCE 0.1", "REINFORCE 1.5"} <= set(race.methods)


# Command line


def run(*arguments):
    return CliRunner().invoke(app, ["race", *map(str, arguments)], prog_name="etude")


SHORT = "\n".join(line for line in TEXT.splitlines() if "NFT" not in line)
"""Two methods and one heat."""


def test_the_command_runs_pilots_then_the_race_and_goes_on_where_it_was(tmp_path, monkeypatch):
    """Training is replaced: what is tested is the order, the choice, and that a second command runs nothing."""
    file, ran, laid = tmp_path / "made.yaml", [], entries(SHORT)
    file.write_text(SHORT)

    def fake(cell, directory, display, launcher):
        ran.append(cell)
        write_run(laid, cell, directory, GAINS[cell.grid])
        display.finish(cell, 1.0)

    monkeypatch.setattr("etude.study.runner._run_cell", fake)
    result = run(file, "--out", tmp_path / "out", "--only", "*pilot*")
    assert result.exit_code == 0, result.output
    assert [cell.measured for cell in ran] == [False] * 4
    assert run(file, "--out", tmp_path / "out").exit_code == 0
    assert [cell.measured for cell in ran] == [False] * 4 + [True] * 6
    assert {c.config.optimizer.learning_rate for c in ran[4:]} == {0.001}  # of equal pilots the first
    assert "6 of 6 runs" in (tmp_path / "out" / "race.md").read_text()
    listed = run(file, "--out", tmp_path / "out", "--list").output
    assert listed.count("done") == 10


def test_cells_wait_for_their_pilots(tmp_path, monkeypatch):
    (tmp_path / "made.yaml").write_text(SHORT)
    monkeypatch.setattr("etude.study.runner._run_cell", lambda *arguments: pytest.fail("no pilot is done"))
    result = run(tmp_path / "made.yaml", "--out", tmp_path / "out", "--only", "seed-0")
    assert result.exit_code == 0, result.output
    assert result.output.count("put off") == 2


def test_etude_report_rebuilds_race_md(made):
    made[1].unlink()
    result = CliRunner().invoke(app, ["report", str(made[0].root)], prog_name="etude")
    assert result.exit_code == 0, result.output
    assert made[1].is_file()


def test_two_modes_at_once_are_refused(tmp_path):
    (tmp_path / "made.yaml").write_text(TEXT)
    assert run(tmp_path / "made.yaml", "--list", "--pack").exit_code == 2

"""A study: its file, its cells run once each and resumed, failures that stop nothing."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
import yaml
from typer.testing import CliRunner

from etude.cli.app import app
from etude.errors import EtudeError
from etude.race.start import run_race
from etude.rewards import register
from etude.sampling.sampler import ODE
from etude.study.directory import StudyDirectory, work
from etude.study.grid_display import Pace
from etude.study.measurement import samplers
from etude.study.runner import check_adapters, run_study, select
from etude.study.study_file import load_study, parse_study
from support.adapters import peft, write
from support.small_runs import outcome, redness
from support.tiny import save_stable_diffusion, stable_diffusion, stable_diffusion_xl

MINIMAL = {"name": "small", "base": "emoji-ddpo", "grids": {"keys": {"sampling.eta": [1.0, 2.0]}}}


def slugs(tree):
    return [cell.slug for cell in parse_study(tree).cells]


def test_a_grid_is_a_product_run_with_every_seed():
    tree = MINIMAL | {
        "seeds": [3, 4],
        "grids": [{"keys": {"rewards": ["alignment", "colorfulness"], "sampling.eta": [1, 2.5]}}],
    }
    cells = parse_study(tree).cells
    assert len(cells) == 8
    assert cells[-1].slug == "colorfulness_eta-2.5_seed-4"
    config = cells[-1].config
    assert (config.rewards, config.sampling.eta, config.seed) == ({"colorfulness": 1.0}, 2.5, 4)
    assert config.evaluation.held_out_rewards == ["alignment"]
    assert parse_study(MINIMAL | {"grids": tree["grids"]}).cells[0].config.evaluation.held_out_rewards == []


def test_one_configuration_is_one_cell_and_a_growing_file_keeps_the_names():
    twice = MINIMAL | {
        "grids": [MINIMAL["grids"], {"keys": {"sampling.eta": [2.0, 4.0]}}],
        "cells": [{"sampling.eta": 1.0}],
    }
    assert slugs(twice) == [*slugs(MINIMAL), "eta-4_seed-0"]


def test_names_of_cells_are_safe_in_any_file_system():
    values = {"rewards": ["http://host:8000/a?b"], "prompts.train": ["x/y/" + "z" * 300]}
    (slug,) = slugs(MINIMAL | {"grids": {"keys": values}})
    assert re.fullmatch(r"[A-Za-z0-9.+_-]{1,140}", slug)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid": []}, "unknown key 'grid': did you mean 'grids'"),
        ({"grids": []}, "there is nothing to run"),
        ({"grids": {"keys": {"sampling.eta": []}}}, "has no value"),
        ({"grids": {"keys": {"sampling.etta": [1]}}}, "did you mean 'sampling.eta'"),
        ({"grids": {"keys": {"sampling.eta": [0]}}}, "is the ODE"),
        ({"seeds": [1, 1]}, "repeats one"),
        ({"base": "emoji-dppo"}, "did you mean 'emoji-ddpo'"),
        ({"measurement": {"num_images": 1}}, "measurement.num_images = 1"),
        ({"measurement": {"matrix": {"solvers": ["rk4"]}}}, "rk4"),
        ({"measurement": {"matrix": {"etas": [0.0]}}}, "always measured"),
        ({"measurement": {"steps": []}}, "step counts"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_in_one_sentence(change, words):
    with pytest.raises(EtudeError, match=re.escape(words)) as caught:
        parse_study(MINIMAL | change)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(EtudeError, match="does not exist"):
        load_study(tmp_path / "no.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(EtudeError, match="mapping"):
        load_study(tmp_path / "list.yaml")


def test_the_ode_at_the_cells_own_steps_is_measured_first_and_nothing_twice():
    tree = MINIMAL | {"measurement": {"steps": [5, 10], "matrix": {"solvers": ["heun"], "etas": [1.0, 2.0]}}}
    config, measurement = parse_study(tree).cells[0].config, parse_study(tree).cells[0].measurement
    found = samplers(config, measurement)
    assert found[0] == ODE(config.sampling.num_steps, config.sampling.guidance_scale)
    assert len(found) == len(set(found)) == 8


def test_work_grows_with_what_a_run_computes():
    (cell,) = parse_study(MINIMAL | {"grids": {"keys": {"sampling.eta": [1.0]}}}).cells
    longer = cell.config.model_copy(update={"iterations": 2 * cell.config.iterations})
    assert 1.7 < work(longer) / work(cell.config) < 2


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    register("redness")(redness)
    root = tmp_path_factory.mktemp("model")
    (root / "prompts.txt").write_text("red heart\npizza\ntiger\nsun\n")
    prompts = str(root / "prompts.txt")
    return {
        "name": "tiny",
        "base": {
            "model": str(save_stable_diffusion(root / "sd")),
            "iterations": 1,
            "rewards": {"redness": 1.0},
            "prompts": {"train": prompts, "evaluation": prompts},
            "sampling": {"num_steps": 3, "guidance_scale": 1.0},
            "rollout": {"images_per_iteration": 4, "images_per_prompt": 2, "batch_size": 8},
            "objective": {"clip_range": None, "clip_nats": 1.6, "batch_size": 8},
            "advantage": {"kind": "group"},
            "evaluation": {"num_images": 4, "grid_images": 2},
        },
        "grids": {"keys": {"sampling.eta": [1.0, 2.0]}},
        "measurement": {"num_images": 8, "matrix": {"solvers": ["heun"], "etas": [0.5]}, "shown": 2},
    }


def test_a_study_runs_every_cell_once_and_leaves_a_report(tree, tmp_path):
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(tree))
    first = CliRunner().invoke(app, ["study", str(file), "--out", str(out)])
    assert first.exit_code == 0, first.output
    assert "2/2 eta-2_seed-0: done" in first.output
    for name in ("report.html", "results.csv", "results.json", "tables.md", "study.yaml"):
        assert (out / name).is_file()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*.json*")}
    assert CliRunner().invoke(app, ["study", str(file), "--out", str(out), "--quiet"]).exit_code == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*.json*")}
    listed = CliRunner().invoke(app, ["study", str(file), "--out", str(out), "--list"])
    assert listed.output.count("done") == 2
    scores = json.loads((out / "cells" / "eta-1_seed-0" / "scores.json").read_text())
    assert [row["sampler"] for row in scores["samplers"]] == ["ode", "gddim", "heun", "gddim"]
    assert all(len(row["scores"]["redness"]) == len(row["base"]["redness"]) == 8 for row in scores["samplers"])
    assert len(list((out / "base").glob("*.json"))) == 5  # the two trained etas, and what the cells share
    assert CliRunner().invoke(app, ["study", str(file), "--out", str(out), "--pack"]).exit_code == 0
    file.write_text(yaml.safe_dump(tree | {"grids": {"keys": {"sampling.eta": [1.0, 2.0, 3.0]}}}))
    assert CliRunner().invoke(app, ["study", str(file), "--out", str(out), "--quiet"]).exit_code == 0
    assert [path.parent.name for path in out.glob("cells/*/scores.json")] == ["eta-3_seed-0"]
    assert json.loads((out / "results.json").read_text())["done"] == 3
    assert len(list((out / "base").glob("*.json"))) == 1  # the new eta: the rest is in the archive


def test_an_adapter_that_does_not_fit_stops_a_study_before_its_first_cell(tree, tmp_path):
    good, bad = (
        write(tmp_path / n, peft(p().unet, "unet")[0]) for n, p in (("a", stable_diffusion), ("b", stable_diffusion_xl))
    )
    study = parse_study(tree | {"grids": {"keys": {"lora.init": [str(good), str(bad)], "sampling.eta": [2.0]}}})
    for run in (run_study, partial(run_race, entries=None)):
        place = {"study": study} if run is run_study else {}
        with pytest.raises(EtudeError, match=r"cell '.*b.*': lora\.init '.*' does not fit the model"):
            run(**place, cells=list(study.cells), directory=StudyDirectory(tmp_path / "out"), quiet=True)
    assert not (tmp_path / "out").exists()
    check_adapters(study.cells[:1])


def test_a_cell_is_the_run_that_train_makes_and_one_failure_stops_no_other(tree, tmp_path):
    from etude.training.trainer import Trainer

    calls = []

    @register("fragile")
    def fragile(images, prompts, **metadata):
        calls.append(len(images))
        if len(calls) <= 1:
            raise RuntimeError("the scorer is gone")
        return redness(images, prompts)

    study = parse_study(tree | {"grids": {"keys": {"rewards": ["fragile", "redness"], "sampling.eta": [2.0]}}})
    directory = StudyDirectory(tmp_path / "out")
    failures = run_study(study, list(study.cells), directory, quiet=True)
    assert list(failures) == ["fragile_eta-2_seed-0"]
    assert "the scorer is gone" in failures["fragile_eta-2_seed-0"]
    assert directory.progress(study.cells[0]).state == "failed"
    assert "Traceback" in directory.failure(study.cells[0]).read_text()
    assert directory.progress(study.cells[1]).state == "done"
    assert run_study(study, list(study.cells), directory, quiet=True) == {}
    assert directory.progress(study.cells[0]).state == "done"
    assert Pace(list(study.cells), directory).left() == 0
    Trainer(study.cells[1].config, tmp_path / "alone").train()
    assert outcome(directory.cell(study.cells[1])) == outcome(tmp_path / "alone")


def test_a_cell_that_another_process_has_is_left_to_it(tree, tmp_path):
    study, directory = parse_study(tree), StudyDirectory(tmp_path / "out")
    with directory.claim(study.cells[0]) as mine, directory.claim(study.cells[1]):
        assert mine
        assert directory.progress(study.cells[0]).state == "running"
        assert run_study(study, list(study.cells), directory, quiet=True) == {}
    assert directory.progress(study.cells[0]).state == "waiting"


def test_a_cell_whose_configuration_has_changed_is_refused(tree, tmp_path):
    study, directory = parse_study(tree), StudyDirectory(tmp_path / "out")
    other = study.cells[0].config.model_copy(update={"iterations": 7})
    directory.cell(study.cells[0]).mkdir(parents=True)
    (directory.cell(study.cells[0]) / "config.yaml").write_text(other.to_yaml())
    with pytest.raises(EtudeError, match=r"iterations = 7, but the study now says 1"):
        directory.check(study.cells[0])


def test_a_launcher_that_fails_is_told_in_its_own_words(tree, tmp_path):
    study, directory = parse_study(tree), StudyDirectory(tmp_path / "out")
    failures = run_study(study, select(study.cells, "eta-1"), directory, launcher="no-such-launcher", quiet=True)
    assert "cannot be started" in failures["eta-1_seed-0"]
    failures = run_study(
        study, select(study.cells, "eta-1*"), directory, launcher="sh -c 'echo no device >&2; exit 3'", quiet=True
    )
    assert failures["eta-1_seed-0"] == "the launched run ended with code 3: no device"


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(EtudeError, match="matches none of the 2 cells"):
        select(parse_study(MINIMAL).cells, "seed-9")

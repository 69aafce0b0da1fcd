"""Each illness is found where it is, by its figure, and healthy runs get a clean bill."""

from __future__ import annotations

import html
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from etude.cli.app import app
from etude.cli.watch import look, view
from etude.config import TrainConfig, parse_config
from etude.config.yaml_text import parse_yaml
from etude.report.doctor import clean_bill, examine
from etude.report.illnesses import ILLNESSES
from etude.rewards import register
from etude.runs.reader import Run, parse_metrics, read_run
from etude.study.archive import read_archive
from etude.terminal import plain_text
from etude.training.trainer import Trainer
from support.small_runs import brief_settings

STUDIES = Path(__file__).parents[2] / "studies"


def estimate(mean: float, half: float = 0.1, deviation: float = 1.0, n: int = 64) -> dict[str, Any]:
    """An estimate from n images whose single scores vary by `deviation`."""
    interval = {"mean": mean, "low": mean - half, "high": mean + half, "clusters": 16, "clustered": True}
    return {**interval, "standard_error": deviation / n**0.5, "n": n}


def evaluation(improvement: dict[str, float], gap: float = 0.05, half: float = 0.1, ode: float = 5.0) -> dict[str, Any]:
    """An evaluation of rewards that vary by 1, with the improvement of each."""
    return {
        "ode": {name: estimate(ode) for name in improvement},
        "sde": {name: estimate(ode - gap) for name in improvement},
        "gap": {name: estimate(gap, 0.02) for name in improvement},
        "improvement": {name: estimate(change, half) for name, change in improvement.items()},
    }


def a_run(
    improvement: dict[str, float] | None = None, half: float = 0.1, first_gap: float = 0.05, **series: Any
) -> Run:
    """A healthy run of 12 iterations on the reward a, with other values of some metrics, one or one for each iteration."""
    healthy = {"ratio_max_deviation": 0.02, "rollout_ratio_max_deviation": 1e-5, "clipfrac": 0.2, "zero_std_ratio": 0.0}
    healthy |= {"approx_kl": 1e-5, "grad_norm": 0.1}
    rows: list[dict[str, Any]] = [{"iteration": 0, "evaluation": evaluation({"a": 0.0, "gold": 0.0}, first_gap)}]
    for i in range(12):
        values = {name: v[i] if isinstance(v, list) else v for name, v in {**healthy, **series}.items()}
        rows.append({"iteration": i + 1, "reward": {"a": {"mean": 1.0, "std": 1.0}}, **values})
    rows[6]["evaluation"] = evaluation(
        {name: change / 2 for name, change in (improvement or {"a": 1.0}).items()}, half=half
    )
    rows[12]["evaluation"] = evaluation(improvement or {"a": 1.0, "gold": 0.0}, half=half)
    config = TrainConfig(rewards={"a": 1.0}).model_dump(mode="json")
    return Run(Path("run"), "", config, rows, False, {}, {}, [])


def found(run: Run) -> dict[str, str]:
    return {finding.illness.name: finding.figure for finding in examine(run)}


@pytest.mark.parametrize(
    ("run", "name", "figure"),
    [
        (a_run(ratio_max_deviation=2e-5), "ratio always 1", "2e-05"),
        (a_run(rollout_ratio_deviation=8e-5), "rollout and replay disagree", "80 % of clip range"),
        (a_run({"a": -1.0}, clipfrac=5e-4), "clip range idle", "0.05 %"),
        (a_run(clipfrac=0.9), "most of the update clipped", "90 %"),
        (a_run(zero_std_ratio=0.75), "groups without variance", "75 %"),
        (a_run(first_gap=3.0), "eta too high for these steps", "3.0 standard deviations of a lower"),
        (a_run(approx_kl=[1e-5 * 2**i for i in range(12)]), "KL rising", "256-fold, from 3e-05 to 0.0077"),
        (a_run(grad_norm=3.0), "gradient at its limit", "3, and the limit is 1"),
        (
            a_run({"a": 1.0, "gold": -0.8}),
            "reward hacking",
            "a rose by +1.00 [+0.90, +1.10] and gold changed by -0.80 [-0.90, -0.70], surely so from iteration 6 on",
        ),
        (a_run({"a": 1.0, "diversity": -2.0}), "collapse", "diversity changed by -2.00 [-2.10, -1.90], from 7"),
        (
            a_run({"a": 0.1}, half=0.3),
            "noise above the effect",
            "a changed by +0.10 [-0.20, +0.40]; at this size of the effect about 1,200 images would settle it with a chance of 80 %",
        ),
        (
            a_run({"a": 0.01}, half=0.05, clipfrac=0.002),
            "learning rate too small",
            "a changed by +0.010 [-0.040, +0.060], where single images vary by 1",
        ),
    ],
)
def test_an_illness_is_found_by_its_figure_and_alone(run: Run, name: str, figure: str) -> None:
    assert found(run) == {name: figure}


def test_rounding_that_a_replay_takes_away_is_no_disagreement_and_nats_are_held_against_nats() -> None:
    run = a_run(rollout_ratio_deviation=8e-5, rollout_mismatch=1.0)
    run.config["objective"] |= {"clip_range": None, "clip_nats": 1.6}
    assert found(run) == {"rollout and replay disagree": "62 % of clip nats"}
    run.config["objective"]["old_log_prob"] = "replay"
    assert found(run) == {}


def test_ratios_of_1_are_no_illness_where_one_optimiser_step_follows_each_rollout() -> None:
    run = a_run({"a": -1.0}, ratio_max_deviation=0.0, clipfrac=0.0)
    assert set(found(run)) == {"ratio always 1", "clip range idle"}
    run.config["objective"]["updates_per_epoch"] = 1
    assert found(run) == {}
    run.config["objective"]["num_inner_epochs"] = 2
    assert set(found(run)) == {"ratio always 1", "clip range idle"}


def test_a_fall_is_measured_in_the_deviation_of_single_images() -> None:
    """With several images of a prompt the standard error says less: it holds the spread between prompts."""
    run = a_run({"a": 1.0, "gold": -0.2}, half=0.01)
    assert found(run) == {}
    run.rows[12]["evaluation"]["std"] = {"a": 0.5, "gold": 0.5}
    assert list(found(run)) == ["reward hacking"]


def test_one_reward_that_makes_the_advantages_is_named() -> None:
    run = a_run()
    run.config["rewards"] = {"a": 10.0, "b": 1.0}
    for row in run.rows[1:]:
        row["reward"]["b"] = {"mean": 1.0, "std": 1.0}
    assert found(run) == {"one reward decides": "a makes 99 % of their variance"}
    run.config["rewards"] = {"a": 1.0, "b": 1.0}
    assert found(run) == {}
    for row in run.rows[1:]:
        row["reward"]["b"]["std"] = 0.0  # which no group could compare
    assert found(run) == {"one reward decides": "a makes 100 % of their variance"}


def test_a_healthy_run_gets_a_clean_bill_that_says_what_was_looked_for() -> None:
    assert found(a_run()) == {}
    bill = clean_bill(a_run())
    assert bill.startswith("No illness found in 12 iterations and 3 evaluations")
    assert all(illness.name in bill for illness in ILLNESSES)


def test_a_window_that_moves_is_no_rising_kl_and_a_run_that_has_begun_is_not_judged() -> None:
    run = a_run(approx_kl=[1e-5 * 2**i for i in range(12)])
    for row in run.rows[1:]:
        row["window"] = {"start": row["iteration"] // 4, "size": 2}
    assert found(run) == {}
    early = a_run(ratio_max_deviation=0.0, clipfrac=0.0, grad_norm=9.0)
    early.rows[4:] = []
    assert found(early) == {}


@pytest.mark.parametrize("junk", [None, {}, [], "x", 1e400, {"a": "x"}])
def test_what_is_no_number_makes_no_finding_and_no_failure(junk: Any) -> None:
    run = a_run({"a": 0.1}, half=0.3)
    run.config["optimizer"] = junk
    for row in run.rows:
        row["clipfrac"] = junk
        for estimates in (row.get("evaluation") or {}).values():
            estimates["a"] |= {"n": junk, "standard_error": junk}
    examine(run)


def archived(study: str) -> dict[str, Run]:
    """The runs of a study of this repository, by their cells."""
    files, runs = read_archive(STUDIES / study / "results" / "cells.tar.xz"), {}
    for name in files:
        if name.endswith("metrics.jsonl"):
            place = name.removesuffix("/metrics.jsonl")
            rows, torn = parse_metrics(files[name].decode(), name)
            config = parse_yaml(files[f"{place}/config.yaml"].decode(), name)
            runs[place] = Run(Path(place), "", config, rows, torn, {}, {}, [])
    return runs


def test_the_recipes_of_the_embedded_model_get_a_clean_bill() -> None:
    """The runs of the recipe emoji-mixgrpo with three seeds, and the 30 of DDPO on colorfulness at five etas and more."""
    recipe = {name: found(run) for name, run in archived("flash").items() if name.endswith("compression-None")}
    assert list(recipe.values()) == [{}] * 3
    trained = {name: run for name, run in archived("eta").items() if list(run.config["rewards"]) == ["colorfulness"]}
    assert [found(run) for run in trained.values()] == [{}] * 30


def test_the_runs_on_jpeg_size_were_hacked_and_are_told_so() -> None:
    """A smooth picture is a small file: alignment with the prompt falls while the reward rises."""
    runs = [run for name, run in archived("eta").items() if name.endswith("jpeg-compressibility_eta-1.2")]
    assert len(runs) == 5
    assert all(list(found(run)) == ["reward hacking"] for run in runs)


def test_of_all_archived_runs_none_is_ill_but_by_hacking_or_noise_above_the_effect() -> None:
    """As the page on metrics says, with its numbers."""
    runs = [run for study in ("eta", "eta-mixgrpo", "flash") for run in archived(study).values()]
    counts = Counter(tuple(found(run)) for run in runs)
    assert counts == {(): 136, ("noise above the effect",): 62, ("reward hacking",): 53}
    hacked = [list(run.config["rewards"]) for run in runs if "reward hacking" in found(run)]
    assert hacked.count(["jpeg_compressibility"]) == 52
    page = (STUDIES.parent / "docs" / "how-to" / "read-metrics.md").read_text()
    assert all(f"{number} " in page for number in (251, 136, 62, 53, 52))


def test_the_size_of_a_file_is_no_sign_of_hacking_unless_it_is_gold_and_an_idle_clip_none_where_the_reward_rose() -> (
    None
):
    run = a_run({"a": 1.0, "jpeg_compressibility": -0.8}, clipfrac=0.0)
    assert found(run) == {}
    run.config["evaluation"]["gold_rewards"] = ["jpeg_compressibility"]
    assert list(found(run)) == ["reward hacking"]


GROUPS = {"images_per_iteration": 4, "images_per_prompt": 2}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    register("constant")(lambda images, prompts, **metadata: torch.zeros(len(prompts)))
    tree = brief_settings(tmp_path_factory.mktemp("tiny"))
    return {**tree, "iterations": 5, "evaluation": {"every": 5, "num_images": 4, "grid_images": 2}}


@pytest.mark.parametrize(
    ("changes", "illnesses"),
    [
        ({"optimizer": {"learning_rate": 1e-12}}, {"ratio always 1", "clip range idle", "learning rate too small"}),
        (
            {"rollout": {**GROUPS, "dtype": "bfloat16"}, "objective": {"clip_range": None, "clip_nats": 1e-4}},
            {"rollout and replay disagree", "most of the update clipped"},
        ),
        (  # the KL of a step goes with 1 / eta^2
            {"iterations": 6, "sampling": {"num_steps": 3, "eta": 1.2, "eta_schedule": {"end": 0.01}}},
            {"KL rising"},
        ),
        (
            {
                "model": "emoji-flux",
                "iterations": 1,
                "rewards": {"jpeg_compressibility": 1.0},
                "prompts": {"train": "emoji-train", "evaluation": "emoji-eval"},
                "sampling": {"kernel": "dance_sde", "eta": 10.0, "num_steps": 4, "guidance_scale": 4.0},
                "evaluation": {"every": 1, "num_images": 8, "grid_images": 2},
            },
            {"eta too high for these steps"},
        ),
        ({"rewards": {"constant": 1.0}}, {"groups without variance"}),
        (
            {"rewards": {"colorfulness": 100.0, "jpeg_compressibility": 1.0}, "optimizer": {"max_grad_norm": 1e-9}},
            {"one reward decides", "gradient at its limit"},
        ),
    ],
)
def test_a_real_run_that_has_an_illness_shows_it(settings, tmp_path, changes, illnesses) -> None:
    Trainer(parse_config({**settings, **changes}), tmp_path / "run").train()
    assert illnesses <= set(found(read_run(tmp_path / "run")))
    said = {finding.sentence for finding in examine(read_run(tmp_path / "run"))}
    doctor = CliRunner().invoke(app, ["doctor", str(tmp_path / "run")])
    assert doctor.exit_code == 0
    watched = " ".join(plain_text(view(look(tmp_path / "run"))).split())
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    for sentence in said:
        assert sentence in doctor.output
        assert sentence in watched
        assert sentence in page


def test_the_doctor_of_what_is_no_run_says_so(tmp_path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert (result.exit_code, "is not a run" in result.output) == (1, True)


def test_an_evaluation_has_the_deployed_sampler_diversity_and_divergence_where_asked(settings, tmp_path) -> None:
    """As the ODE the deployed sampler has the ODE's numbers; as another one its own, and ODE and SDE keep theirs."""
    runs = {}
    deployments = {"none": None, "ode": {}, "other": {"solver": "heun", "steps": 2, "guidance": 1, "size": 16}}
    for name, deployment in deployments.items():
        tree = {**settings, "iterations": 1, "evaluation": {"every": 1, "num_images": 4, "images_per_prompt": 2}}
        tree["evaluation"] |= {
            "deployment": deployment,
            "held_out_rewards": ["diversity:pixels"],
            "gold_rewards": ["diversity:pixels"],
        }
        Trainer(parse_config(tree), tmp_path / name).train()
        runs[name] = [row["evaluation"] for row in read_run(tmp_path / name).rows]
    for plain, same, other in zip(runs["none"], runs["ode"], runs["other"], strict=True):
        assert "deployed" not in plain
        for quantity, known in (("reward", "ode"), ("gap", "gap"), ("improvement", "improvement")):
            assert same["deployed"][quantity] == plain[known]
        assert {key: value for key, value in other.items() if key != "deployed"} == plain
        assert other["deployed"]["reward"] != plain["ode"]
    assert runs["other"][0]["deployed"]["improvement"]["colorfulness"]["mean"] == 0
    assert runs["other"][1]["deployed"]["improvement"]["colorfulness"]["mean"] != 0
    divergence = [each["divergence"]["diversity:pixels"] for each in runs["none"]]
    assert (divergence[0]["mean"], divergence[0]["high"]) == (0, 0)
    assert divergence[1]["mean"] != 0
    assert "Divergence from this gold reward" in (tmp_path / "none" / "report.html").read_text()
    assert "heun, 2 steps, guidance 1, 16 px" in (tmp_path / "other" / "report.html").read_text()

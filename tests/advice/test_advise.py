"""Advice: pilots that fit the budget, the smallest eta and the cheapest sampler that are not surely worse, the same again when resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from etude.advice.adviser import ETAS, Adviser, _theory, base_config
from etude.advice.rules import (
    MIN_ITERATIONS,
    PILOTS_SHARE,
    choose_eta,
    choose_smallest,
    deployment_cells,
    pilots,
    rank_samplers,
    reasons,
    size_pilots,
)
from etude.cli.app import app
from etude.config import parse_config
from etude.errors import EtudeError
from etude.measuring.statistics import estimate_mean
from etude.rewards import register
from support.adapters import peft, write
from support.small_runs import redness
from support.tiny import save_stable_diffusion, stable_diffusion_xl

CLUSTERS = [i % 8 for i in range(32)]


@given(st.floats(1, 1e5), st.floats(0.01, 100), st.floats(0, 300), st.integers(2, 6), st.integers(1, 400))
@settings(deadline=None)
def test_the_pilots_fit_the_time_or_the_error_says_how_much_more(
    seconds: float, iteration: float, fixed: float, count: int, longest: int
) -> None:
    etas = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0][:count]
    if pilots(2) * (fixed + iteration) > seconds * (1 - 1e-9):
        with pytest.raises(EtudeError, match="--budget"):
            size_pilots(etas, seconds * (1 - 1e-6), iteration, fixed, longest)
        return
    sizes = size_pilots(etas, seconds * (1 + 1e-6), iteration, fixed, longest)
    assert 1 <= sizes.iterations <= longest
    assert pilots(len(sizes.etas)) * (fixed + sizes.iterations * iteration) <= seconds * (1 + 2e-6)
    assert len(sizes.etas) == 2 or sizes.iterations >= min(MIN_ITERATIONS, longest)
    assert set(sizes.etas) <= set(etas)
    assert 0 < PILOTS_SHARE < 1


def test_etas_far_from_one_are_dropped_first() -> None:
    fits_three = pilots(3) * MIN_ITERATIONS
    assert size_pilots([0.25, 0.5, 1.0, 1.5, 4.0], fits_three, 1.0, 0.0, 100).etas == (0.5, 1.0, 1.5)


def test_of_etas_that_cannot_be_told_apart_the_smallest_is_chosen() -> None:
    noise = np.random.default_rng(0).normal(size=(3, 32))
    alike = {0.5: noise[0], 1.0: noise[1], 2.0: noise[2]}
    assert choose_smallest(alike, CLUSTERS)[0] == 0.5
    chosen, behind = choose_smallest({0.5: noise[0], 1.0: noise[1] + 9, 2.0: noise[2] + 9.01}, CLUSTERS)
    assert chosen == 1.0
    assert behind[2.0].mean == 0 or behind[1.0].mean == 0
    assert behind[0.5].low > 8


def test_the_cheapest_sampler_that_surely_keeps_most_of_the_improvement_is_suggested() -> None:
    noise, reference = np.random.default_rng(1).normal(size=(3, 32)), ("ddim", 10)
    scores = {reference: noise[0] + 5, ("heun", 10): noise[1] + 5, ("dpmsolver++", 5): noise[2]}
    rows = rank_samplers(scores, CLUSTERS, reference, 1.0)
    assert [(row["solver"], row["evaluations"]) for row in rows] == [("dpmsolver++", 5), ("ddim", 10), ("heun", 19)]
    assert [row["suggested"] for row in rows] == [False, True, False]
    assert rank_samplers(scores, CLUSTERS, reference, 100.0)[0]["suggested"]
    unclear = {**scores, ("dpmsolver++", 5): noise[2] + 5}
    assert not rank_samplers(unclear, CLUSTERS, reference, 0.0)[0]["suggested"]  # not worse, but not surely as good
    alike = dict.fromkeys(scores, noise[0])
    assert rank_samplers(alike, CLUSTERS, reference, -1.0)[0]["suggested"]


@pytest.mark.parametrize("steps", [2, 3, 10, 25])
def test_deployment_is_compared_at_the_steps_of_training_first_and_nothing_twice(steps: int) -> None:
    cells = deployment_cells(steps)
    assert cells[0] == ("ddim", steps)
    assert len(set(cells)) == len(cells)


def test_the_reasons_say_when_nothing_is_significant() -> None:
    values = np.random.default_rng(2).normal(size=32)
    nothing = estimate_mean(values, CLUSTERS)
    row = {"eta": 0.5, "improvement": nothing.to_dict()}
    cell = {"solver": "unipc", "steps": 5, "evaluations": 5}
    zero = estimate_mean(values * 0, CLUSTERS)
    text = " ".join(reasons(row, {0.5: nothing, 2.0: zero}, True, None, cell, "alignment"))
    assert "no significant difference between eta = 0.5 and eta = 2" in text
    assert "did not surely improve on the base model" in text
    assert "theory" not in text
    text = " ".join(reasons(row, {0.5: nothing, 2.0: zero}, False, None, cell, "alignment"))
    assert "No pilot surely improved" in text
    assert "no significant difference" not in text


def test_where_no_pilot_improved_the_eta_nearest_to_one_is_chosen() -> None:
    noise = np.random.default_rng(0).normal(size=(4, 32))
    scores = {0.5: noise[0], 1.5: noise[1], 4.0: noise[2]}
    assert choose_eta(scores, noise[3], CLUSTERS)[0] == 1.5
    learnt = {eta: values + 9 for eta, values in scores.items()}
    assert choose_eta(learnt, noise[3], CLUSTERS) == choose_smallest(learnt, CLUSTERS)
    assert choose_smallest(learnt, CLUSTERS)[0] == 0.5


def test_the_theory_is_asked_about_rectified_flows_from_pure_noise_too() -> None:
    sigma = np.linspace(1.0, 0.0, 21)
    latents = np.random.default_rng(0).normal(size=(64, 8))
    found = _theory(latents, 1 - sigma, sigma)
    assert 0 <= found["exact"] <= 3
    assert 0 <= found["with_error"] <= 3


def test_the_settings_are_those_of_the_models_first_recipe_with_gddim() -> None:
    config = base_config("emoji-sd", {"alignment": 1.0}, overrides=["sampling.num_steps=6"])
    assert (config.model, config.rewards, config.sampling.num_steps) == ("emoji-sd", {"alignment": 1.0}, 6)
    assert base_config("emoji-flux", {"alignment": 1.0}).sampling.kernel == "gddim"
    with pytest.raises(EtudeError, match="give --recipe"):
        base_config("mine", {"alignment": 1.0})
    assert base_config("mine", {"alignment": 1.0}, "emoji-ddpo").model == "mine"


def test_an_adapter_that_does_not_fit_is_refused_before_the_base_model_is_measured(tmp_path: Path) -> None:
    adapter = write(tmp_path / "foreign", peft(stable_diffusion_xl().unet, "unet")[0])
    words = ["advise", "emoji-sd", "--reward", "colorfulness", "--out", str(tmp_path / "a")]
    result = CliRunner().invoke(app, [*words, "--set", f"lora.init={adapter}"])
    assert result.exit_code == 1
    assert "does not fit the model" in result.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--eta", "1"], "give --eta at least twice"),
        (["--eta", "0", "--eta", "1"], "eta = 0 is the ODE"),
        (["--set", "sampling.kernel=ddim"], "whose eta has a unit of its own"),
    ],
)
def test_etas_that_cannot_be_compared_are_refused_in_a_sentence(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        app, ["advise", "emoji-sd", "--reward", "colorfulness", "--out", str(tmp_path / "a"), *arguments]
    )
    assert result.exit_code == 1
    assert says in result.stderr
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("model")
    (root / "prompts.txt").write_text("red heart\npizza\ntiger\nsun\n")
    (root / "others.txt").write_text("moon\nhouse\n")
    return {
        "model": str(save_stable_diffusion(root / "sd")),
        "iterations": 1,
        "rewards": {"redness": 1.0},
        "prompts": {"train": str(root / "prompts.txt"), "evaluation": str(root / "others.txt")},
        "sampling": {"num_steps": 2, "guidance_scale": 1.0},
        "rollout": {"images_per_iteration": 4, "images_per_prompt": 2, "batch_size": 8},
        "objective": {"clip_range": None, "clip_nats": 1.6, "batch_size": 8},
        "advantage": {"kind": "group"},
        "evaluation": {"num_images": 8, "grid_images": 2},
    }


@pytest.mark.slow
def test_advice_is_complete_and_the_same_when_it_is_resumed(tree, tmp_path) -> None:
    register("redness")(redness)
    config, out = parse_config(tree), tmp_path / "advice"
    first = Adviser(config, 60, out, [0.5, 2.0]).advise()
    assert first == json.loads((out / "advice.json").read_text())
    assert first["suggestion"]["eta"] in (0.5, 2.0)
    assert first["suggestion"]["training_steps"] == 2
    assert [row["eta"] for row in first["pilots"]] == [0.5, 2.0]
    assert len(list(out.glob("eta-*-seed-*"))) == pilots(2) == sum(len(row["seeds"]) for row in first["pilots"])
    assert sum(row["suggested"] for row in first["deployment"]) == 1
    assert set(first["theory"]) == {"exact", "with_error", "mean_variance"}
    assert all((out / f"eta-{eta:g}-seed-0" / "report.html").is_file() for eta in (0.5, 2.0))
    shutil.rmtree(out / "eta-2-seed-1")
    again = Adviser(config, 60, out, [0.5, 2.0]).advise()
    assert {k: v for k, v in again.items() if k != "minutes"} == {k: v for k, v in first.items() if k != "minutes"}
    with pytest.raises(EtudeError, match="holds advice on something else"):
        Adviser(config, 30, out, [0.5, 2.0]).advise()
    assert len(ETAS) >= 4

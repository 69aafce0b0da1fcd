"""Every built-in recipe is a run that could start: on its family's pipeline, with rewards that exist, saying what it is and needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from etude.config import TrainConfig, difference, load_config, parse_config, recipe_names, recipe_text
from etude.prompts import load_prompts, overlap
from etude.rewards import names
from etude.training.dry_run import resolved
from etude.training.trainer import Trainer
from support.tiny_families import FAMILIES, save_families

FULL_SIZE = [name for name in recipe_names() if not name.startswith("emoji-")]
SIZED = {"flux2_klein", "z_image", "qwen_image"}
"""Checkpoints whose pipeline's own size is 1024 pixels, whatever its parts are."""
PREFERENCES = {"aesthetic", "hpsv2", "imagereward", "pickscore"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random checkpoint of the class of each model that a recipe names."""
    return save_families(tmp_path_factory.mktemp("checkpoints"))


def made_small(name: str, checkpoints: dict[str, Path], rewards: dict[str, float] | None = None) -> TrainConfig:
    """The recipe on the tiny checkpoint of its family, at its size; nothing else is replaced."""
    small = "16" if checkpoints[load_config(name).model].name in SIZED else "null"
    return load_config(name, [f"model={checkpoints[load_config(name).model]}", f"resolution={small}"], rewards)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_passes_a_dry_run_on_a_small_checkpoint_of_its_family(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    config = made_small(name, checkpoints)
    text = resolved(config, tmp_path / "run")
    assert parse_config(yaml.safe_load(text)) == config
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reward", sorted(PREFERENCES))
@pytest.mark.parametrize("name", ["sd15-ddpo", "sdxl-mixgrpo", "sd35-flow-grpo", "flux-mixgrpo"])
def test_every_preference_model_can_take_the_place_of_a_recipes_rewards(
    name: str, reward: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    config = made_small(name, checkpoints, {reward: 0.5})
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.rewards.weights == {reward: 0.5}
    assert reward not in trainer.rewards.held_out


def test_the_recipes_cover_every_family_with_a_window_and_the_older_ones_with_every_step() -> None:
    covered = {(config.model, config.sampling.window is not None) for config in map(load_config, FULL_SIZE)}
    assert {(model, True) for model in FAMILIES if "/" in model} <= covered
    assert {(model, False) for model in FAMILIES if model.startswith(("stab", "black"))} <= covered
    assert {model for model, _ in covered} == {model for model in FAMILIES if "/" in model}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_trains_and_holds_out_rewards_that_exist_and_are_not_the_same(name: str) -> None:
    config = load_config(name)
    trained, held_out = set(config.rewards), set(config.evaluation.held_out_rewards)
    assert trained | held_out <= set(names())
    assert not trained & held_out
    assert held_out or not trained & PREFERENCES, "a preference model that nothing watches is soon exploited"


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_evaluates_on_prompts_that_it_does_not_train_on(name: str) -> None:
    prompts = load_config(name).prompts
    assert overlap(load_prompts(prompts.train), load_prompts(prompts.evaluation)) == []


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_recipe_says_its_source_its_memory_its_prompts_and_whether_it_was_run(name: str) -> None:
    comment = " ".join(line.removeprefix("# ") for line in recipe_text(name).split("\nmodel:")[0].splitlines())
    for said in (
        r"arXiv \d{4}\.\d{5}",
        r"Expects (a GPU|GPUs) of \d+ GB",
        r"(Not run|Ran) at full size",
        r"prompts\.train=",
    ):
        assert re.search(said, comment), f"{name} does not say {said}"
    assert re.search(r"Differs from the paper|No paper|[Pp]ublished", comment)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_overrides_that_a_recipe_suggests_are_accepted(name: str) -> None:
    comment = " ".join(line.removeprefix("# ") for line in recipe_text(name).split("\nmodel:")[0].splitlines())
    suggested = re.findall(r"--set ([\w.]+=(?:'[^']*'|[^\s:),]+))", comment)
    assert suggested
    for item in suggested:
        load_config(name, [item.replace("'", "").rstrip(".")])


def test_flash_differs_from_mixgrpo_by_its_compression_alone() -> None:
    found: Any = difference(load_config("flux-mixgrpo"), load_config("flux-mixgrpo-flash"))
    assert found == ("sampling.window.compression", None, 0.4)
    tree = load_config("flux-mixgrpo", ["sampling.window.compression=0.4"])
    assert tree == load_config("flux-mixgrpo-flash")

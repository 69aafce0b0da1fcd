"""The counts of a dry run are those of the run: of its formulas, and of the calls that the network gets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from etude.config import TrainConfig, load_config, parse_config
from etude.errors import EtudeError
from etude.learning.objectives import make_objective
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.training import dry_run
from etude.training.dry_run import (
    ImageSteps,
    _models_of_rewards,
    base_evaluations,
    evaluated,
    gap_evaluations,
    resolved,
    run_evaluations,
)
from support.tiny import save_flux


def config(**changes: Any) -> TrainConfig:
    sections: dict[str, Any] = {
        "iterations": 5,
        "sampling": {"eta": 1.0, "num_steps": 10},
        "rollout": {"images_per_iteration": 24, "images_per_prompt": 6},
        "evaluation": {"every": 2, "num_images": 16},
        "objective": {},
    }
    return TrainConfig(
        **{
            name: value | changes.pop(name, {}) if isinstance(value, dict) else value
            for name, value in sections.items()
        },
        **changes,
    )


def evaluations(settings: TrainConfig, steps: ImageSteps) -> dict[str, int]:
    return dry_run.evaluations(settings, make_objective(settings.objective), steps, steps.trained)


WHOLE, WINDOW, FLASH = ImageSteps(10, 0, 9), ImageSteps(10, 3, 4), ImageSteps(8, 3, 4)


def test_a_full_trajectory_is_every_step_of_every_image() -> None:
    assert evaluations(config(), WHOLE) == {"rollout": 240, "reference": 0, "replay": 216}


def test_groups_that_share_their_noise_share_the_steps_before_the_window() -> None:
    shared = config(rollout={"shared_noise": True})
    assert evaluations(config(), WINDOW)["rollout"] == 240
    assert evaluations(shared, WINDOW)["rollout"] == 4 * 3 + 24 * 7
    assert evaluations(shared, FLASH)["rollout"] == 4 * 3 + 24 * 5
    assert evaluations(shared, WHOLE)["rollout"] == 240


@pytest.mark.parametrize(("fraction", "kept"), [(1.0, 4), (0.6, 2), (0.01, 1)])
def test_the_replay_takes_its_share_of_the_trained_steps_in_every_epoch(fraction: float, kept: int) -> None:
    counts = evaluations(config(objective={"timestep_fraction": fraction, "num_inner_epochs": 3}), WINDOW)
    assert counts["replay"] == 24 * kept * 3


def test_the_reference_model_is_asked_at_every_trained_step() -> None:
    assert evaluations(config(objective={"kl_coef": 0.1, "timestep_fraction": 0.5}), WINDOW)["reference"] == 24 * 4


def test_log_probabilities_that_are_computed_again_are_counted_once() -> None:
    again = config(objective={"old_log_prob": "replay", "num_inner_epochs": 3})
    assert evaluations(again, WINDOW) == {"rollout": 240, "reference": 0, "replay": 288, "old log-probabilities": 96}
    drawn = config(objective={"old_log_prob": "replay", "num_inner_epochs": 3, "timestep_fraction": 0.5})
    assert evaluations(drawn, WINDOW)["old log-probabilities"] == 24 * 2 * 3  # each pass draws its own pairs


def test_evaluations_are_those_of_the_base_model_of_every_kth_and_of_the_last_iteration() -> None:
    assert evaluated(config()) == [0, 2, 4, 5]
    assert evaluated(config(evaluation={"every": 5})) == [0, 5]
    assert evaluated(config(evaluation={"every": 9})) == [0, 5]
    assert gap_evaluations(config()) == 2 * 16 * 10
    assert gap_evaluations(config(evaluation={"num_steps": 4})) == 2 * 16 * 4
    assert gap_evaluations(config(evaluation={"path_kl": True})) == 3 * 16 * 10
    deployed = config(evaluation={"deployment": {"steps": 3}}, lora={"init": "adapter"})
    assert (gap_evaluations(deployed), base_evaluations(deployed)) == (16 * (2 * 10 + 3), 16 * (10 + 3))
    assert base_evaluations(config()) == 0


def test_the_run_is_the_sum_of_its_iterations() -> None:
    shared = config(rollout={"shared_noise": True}, objective={"kl_coef": 0.1})
    places = {1: 0, 2: 0, 3: 3, 4: 6, 5: 0}

    def table_at(iteration: int) -> Any:
        return SimpleNamespace(num_evaluations=10, prefix_steps=places[iteration], trained_steps=range(4))

    counts = run_evaluations(shared, make_objective(shared.objective), table_at)
    rollout = {place: 4 * place + 24 * (10 - place) for place in (0, 3, 6)}
    assert counts["rollout"] == (rollout[6], rollout[0], 3 * rollout[0] + rollout[3] + rollout[6])
    assert counts["replay"] == counts["reference"] == (96, 96, 480)
    assert counts["evaluation"] == (320, 320, 1280)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("model")
    (root / "prompts.txt").write_text("red heart\npizza\n")
    return {
        "model": str(save_flux(root / "flux")),
        "iterations": 3,
        "rewards": {"colorfulness": 1.0},
        "prompts": {"train": str(root / "prompts.txt"), "evaluation": str(root / "prompts.txt")},
        "sampling": {"eta": 1.2, "num_steps": 6, "guidance_scale": 3.5},
        "rollout": {"images_per_iteration": 6, "images_per_prompt": 3, "batch_size": 4, "shared_noise": True},
        "objective": {"kl_coef": 0.1, "timestep_fraction": 0.6, "num_inner_epochs": 2, "batch_size": 4},
        "lora": {"targets": ["to_q"]},
        "advantage": {"kind": "group"},
        "evaluation": {"every": 2, "num_images": 4, "num_steps": 5, "grid_images": 2},
    }


MOVING = {"size": 2, "iters_per_shift": 1}


@pytest.mark.parametrize("window", [None, MOVING, {**MOVING, "compression": 0.4}])
def test_the_network_is_called_as_often_as_was_counted(
    settings: dict[str, Any], tmp_path: Path, window: dict[str, Any] | None
) -> None:
    from etude.training.trainer import Trainer

    trainer = Trainer(parse_config({**settings, "sampling": {**settings["sampling"], "window": window}}), tmp_path)
    counted = run_evaluations(trainer.config, trainer.objective, trainer.schedule.table_at)
    asked, predict = [], trainer.policy.predict

    def watched(x, *arguments):
        asked.append(len(x))
        return predict(x, *arguments)

    trainer.policy.predict = watched  # type: ignore[method-assign]
    trainer.train()
    assert sum(asked) == sum(total for _, _, total in counted.values())
    assert all(total > 0 for _, _, total in counted.values())


def test_models_of_rewards_are_named_with_what_they_add() -> None:
    said = _models_of_rewards(["pickscore:/my/weights", "colorfulness", "my_module:mine", "hpsv2", "hpsv2"])
    assert said == [
        "models of rewards come on top, in float32: pickscore:/my/weights 3.9 GB, my_module:mine of unknown size, hpsv2 3.9 GB"
    ]
    assert _models_of_rewards(["colorfulness", "jpeg_compressibility"]) == []


def test_what_is_printed_is_a_recipe_of_the_same_run_with_its_cost(settings: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config({**settings, "sampling": {**settings["sampling"], "window": MOVING}})
    policy = load_source(ModelSource.of(config))
    text = resolved(config, tmp_path / "run", policy=policy)
    (tmp_path / "mine.yaml").write_text(text)
    assert load_config(str(tmp_path / "mine.yaml")) == config
    assert yaml.safe_load(text)["sampling"]["num_steps"] == 6
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    assert comments[0].startswith(f"# MixGRPO on {settings['model']}, gddim at eta 1.2, reward: colorfulness")
    trained = sum(p.numel() for p in policy.trainable().values())
    assert comments[1].startswith(f"# trained parameters: {trained:,} of the network's ")
    assert [line.split()[1] for line in comments[2:8]] == [
        "network",
        "rollout",
        "reference",
        "replay",
        "evaluation",
        "total",
    ]
    assert comments[8].startswith("# memory of the accelerator")
    assert [line.split()[1] for line in comments[9:]] == [
        "frozen",
        "adapter",
        "gradients",
        "optimiser",
        "trajectory",
        "prompts",
        "activations,",
        "in",
    ]
    # Step 0 leaves pure noise and is never stochastic: the window starts at 1, 2 and 3.
    assert comments[3].split()[2:] == ["24", "to", "32", "3", "84"]
    assert comments[6].split()[2:] == ["40", "3", "120"]
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.yaml"]


def test_an_evaluation_that_the_kernel_refuses_is_refused_before_the_run(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    sampling = {**settings["sampling"], "kernel": "ddim", "eta": 1.08}
    evaluation = {**settings["evaluation"], "num_steps": 3}
    with pytest.raises(EtudeError, match="largest legal eta for all DDIM steps of these 3-step samples"):
        resolved(parse_config({**settings, "sampling": sampling, "evaluation": evaluation}), tmp_path / "run")


def test_evaluated_prompts_that_are_trained_on_are_named_before_the_run(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"2 of the 2 prompts in prompts\.evaluation are trained on"):
        resolved(parse_config(settings), tmp_path / "run")

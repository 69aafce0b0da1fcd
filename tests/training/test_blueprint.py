"""What a configuration builds refuses itself before a model is loaded and before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from etude.config import load_config
from etude.errors import EtudeError
from etude.training.blueprint import Blueprint
from etude.training.trainer import Trainer

GROUPS = ["rollout.images_per_prompt=4", "advantage.kind=group"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["sampling.eta=0"], ["sampling.eta = 0 is the ODE", "use an eta above 0"]),
        (["sampling.window={}", "sampling.eta=0"], ["sampling.eta = 0 is the ODE"]),
        (["sampling.kernel=cps", "sampling.eta=1.2"], ["CPS with eta 1.2 folds back", "at most 1"]),
        (["sampling.kernel=my_kernels:Missing"], ["kernel 'my_kernels:Missing'", "cannot be imported"]),
        (["sampling.kernel=json:dumps"], ["kernel 'json:dumps' is", "subclass of etude.sampling.kernels.Kernel"]),
        (["advantage.kind=group"], ["advantage.kind = group needs rollout.images_per_prompt of at least 2, not 1"]),
        (["advantage.kind=json:dumps"], ["advantage.kind = json:dumps is"]),
        (["objective.kind=reinforce"], ["reinforce is on-policy", "not 1 and 2"]),
        (
            ["objective.kind=reinforce", "objective.updates_per_epoch=1", "objective.old_log_prob=replay"],
            ["reinforce has no ratio"],
        ),
        (["objective.kind=json:dumps"], ["objective.kind = json:dumps is", "subclass of etude.learning.objectives"]),
        (["objective.clip_range=null"], ["exactly one of clip_range and clip_nats", "not None and None"]),
        (["rewards.nowhere=1"], ["unknown reward 'nowhere'"]),
        (
            ["evaluation.held_out_rewards=[vendi]", "prompts.evaluation=emoji-eval"],
            [
                "reward 'vendi' compares",
                "at least 2 of each, but a prompt has 1: set evaluation.images_per_prompt to 2",
            ],
        ),
        (["rewards.diversity=1", "evaluation.images_per_prompt=2"], ["set rollout.images_per_prompt to 2 or more"]),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_sentence(
    overrides: list[str], parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(EtudeError) as error:
        Trainer(load_config("sd15-ddpo", overrides), tmp_path / "run")  # whose model is nowhere on this machine
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_two_clip_ranges_exclude_one_another(tmp_path: Path) -> None:
    config = load_config("sd15-ddpo")
    objective = config.objective.model_copy(update={"clip_nats": 1.6})
    with pytest.raises(EtudeError, match="exactly one of clip_range and clip_nats"):
        Blueprint(config.model_copy(update={"objective": objective}), tmp_path / "run")


def test_a_kernel_takes_the_eta_where_it_is_still_legal(tmp_path: Path) -> None:
    config = load_config("sd15-ddpo", ["sampling.kernel=cps", "sampling.eta=1"])
    assert Blueprint(config, tmp_path / "run").config.sampling.eta == 1


def test_a_reward_that_is_trained_is_not_held_out_as_well() -> None:
    config = load_config("emoji-ddpo", ["rewards={alignment: 1.0}"])
    assert "alignment" not in config.evaluation.held_out_rewards

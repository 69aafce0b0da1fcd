"""A run whose user code changes what a process shares ends with the bits of one whose does not."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from etude.config import parse_config
from etude.learning.advantages import Group
from etude.learning.objectives.ppo import PPO
from etude.registry import register_advantage, register_kernel, register_objective
from etude.rewards import register
from etude.sampling.kernels import GDDIM
from etude.training.trainer import Trainer
from etude.training.training_sampler import TrainingSampler
from support.small_runs import brief_settings, outcome, redness


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {**brief_settings(tmp_path_factory.mktemp("model")), "iterations": 1, "rewards": {"redness": 1.0}}


@pytest.fixture(scope="module")
def plain(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    register("redness")(redness)
    return trained(settings, tmp_path_factory.mktemp("runs") / "plain")


def trained(settings: dict[str, Any], out: Path) -> Any:
    Trainer(parse_config(settings), out).train()
    return outcome(out)


def disturb(grad: bool = False) -> None:
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_grad_enabled(grad)
    torch.manual_seed(7)


def test_a_reward_that_disturbs_the_process_changes_no_bit(
    settings: dict[str, Any], plain: Any, tmp_path: Path
) -> None:
    @register("redness")
    class Disturbing:
        def __init__(self) -> None:
            disturb()
            self.store = sqlite3.connect(":memory:")

        def __call__(self, images, prompts, **metadata):
            scores = redness(images, prompts)
            self.store.execute("select 1")
            disturb()
            images.zero_()
            return scores

    assert trained(settings, tmp_path / "run") == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype_that_changes_beside_the_rollout_changes_no_bit(
    settings: dict[str, Any], plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    register("redness")(redness)
    once = TrainingSampler.draw

    def beside(*arguments: Any) -> Any:
        torch.set_default_dtype(dtype)
        try:
            return once(*arguments)
        finally:
            torch.set_default_dtype(torch.float32)

    monkeypatch.setattr(TrainingSampler, "draw", beside)
    assert trained(settings, tmp_path / "run") == plain


def test_other_code_of_a_user_that_disturbs_the_process_changes_no_bit(
    settings: dict[str, Any], plain: Any, tmp_path: Path
) -> None:
    register("redness")(redness)

    @register_kernel("disturbing")
    class DisturbingKernel(GDDIM):
        def coefficients(self, source, target):
            result = super().coefficients(source, target)
            disturb()
            torch.set_default_device("cpu")  # the plan goes on within the same call
            return result

    @register_advantage("disturbing")
    class DisturbingAdvantage(Group):
        def normalise(self, name, rewards, prompts, groups):
            result = super().normalise(name, rewards, prompts, groups)
            rewards.zero_()
            groups.zero_()
            prompts.clear()
            disturb()
            return result

    @register_objective("disturbing")
    class DisturbingObjective(PPO):
        def loss(self, policy, samples, rows, columns):
            result = super().loss(policy, samples, rows, columns)
            disturb()
            return result

        def after_step(self, parameters):
            disturb()

    changed = {
        **settings,
        "sampling": {**settings["sampling"], "kernel": "disturbing"},
        "advantage": {"kind": "disturbing"},
        "objective": {**settings["objective"], "kind": "disturbing"},
    }
    assert trained(changed, tmp_path / "run") == plain

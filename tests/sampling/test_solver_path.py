"""Levels of models that ship with a multistep solver: the class's own, and what reproduces the ODE on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from etude.errors import EtudeError
from etude.sampling.paths import FlowPath
from etude.sampling.schedulers import FlowMatchGDDIMScheduler
from etude.sampling.solver_path import SolverPath, first_order

SHIFTED = {"flow_shift": 3.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
CLASSES = [DPMSolverMultistepScheduler, UniPCMultistepScheduler]


def config(kind: Any, **changes: Any) -> dict[str, Any]:
    return {**kind(**{**SHIFTED, **changes}).config, "_class_name": kind.__name__}


def walked(scheduler: Any, steps: int, **arguments: Any) -> Tensor:
    """Where a scheduler leads from one noise under a velocity that depends on state and time."""
    scheduler.set_timesteps(steps, **arguments)
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        x = scheduler.step(torch.sin(x) + timestep / 1000, timestep, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_levels_are_those_of_the_class_itself(kind: Any, steps: int) -> None:
    scheduler = kind(**SHIFTED)
    scheduler.set_timesteps(steps)
    grid = SolverPath.from_config(config(kind)).grid(steps)
    assert torch.equal(grid.timesteps, scheduler.timesteps.float())
    assert torch.equal(grid.s.float(), scheduler.sigmas)


def test_four_steps_of_sana_are_the_published_ones_and_not_those_of_another_class() -> None:
    assert SolverPath.from_config(config(DPMSolverMultistepScheduler)).grid(4).timesteps.tolist() == [
        999,
        899,
        749,
        499,
    ]
    other = FlowPath.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config).grid(4).timesteps
    assert other[-1] < 10


@pytest.mark.parametrize("kind", CLASSES)
def test_the_solver_at_order_one_is_eulers_method_on_its_levels(kind: Any) -> None:
    steps = 5
    grid = SolverPath.from_config(config(kind)).grid(steps)
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for timestep, sigma, following in zip(grid.timesteps, grid.s[:-1], grid.s[1:], strict=True):
        x = x + float(following - sigma) * (torch.sin(x) + timestep / 1000)
    reproduced = walked(kind.from_config(config(kind), **first_order(kind.__name__, steps)), steps)
    torch.testing.assert_close(reproduced, x, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(walked(kind.from_config(config(kind)), steps), x, atol=1e-2)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_scheduler_of_etude_visits_the_levels_and_is_the_ode_at_eta_zero(kind: Any) -> None:
    steps = 5
    ours = FlowMatchGDDIMScheduler.from_config(config(kind))
    reproduced = walked(kind.from_config(config(kind), **first_order(kind.__name__, steps)), steps)
    torch.testing.assert_close(walked(ours, steps), reproduced, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.timesteps, SolverPath.from_config(config(kind)).grid(steps).timesteps)
    again = FlowMatchGDDIMScheduler.from_config(ours.config)
    assert torch.equal(walked(again, steps), walked(ours, steps))


def test_the_scheduler_of_etude_takes_another_shift() -> None:
    kind = DPMSolverMultistepScheduler
    ours = FlowMatchGDDIMScheduler.from_config(config(kind), eta=1.0, flow_shift=6.0)
    ours.set_timesteps(4)
    assert torch.equal(ours.timesteps, SolverPath.from_config(config(kind, flow_shift=6.0)).grid(4).timesteps)
    assert ours.config.eta == 1.0


def test_another_flow_scheduler_has_its_own_path() -> None:
    path = SolverPath.from_config({**FlowMatchEulerDiscreteScheduler(shift=3.0).config})
    assert type(path) is FlowPath


def test_a_solver_on_flow_levels_for_another_prediction_is_refused() -> None:
    with pytest.raises(EtudeError, match="prediction_type is epsilon"):
        SolverPath.from_config(config(DPMSolverMultistepScheduler, prediction_type="epsilon"))


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_a_number_of_steps_that_cannot_be_taken_is_refused(steps: Any) -> None:
    with pytest.raises(EtudeError, match="cannot be taken"):
        SolverPath.from_config(config(DPMSolverMultistepScheduler)).grid(steps)

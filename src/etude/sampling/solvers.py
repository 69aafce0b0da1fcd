"""diffusers' own deterministic solvers, with which a tuned model may be deployed.

Nothing is integrated here. A scheduler of diffusers is told the levels and the network's output, as
the plain pipeline tells a scheduler that was put in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etude.batching import MicroBatch, Progress
from etude.errors import EtudeError, unknown
from etude.sampling.model import Conditioning, Policy
from etude.sampling.noise import NoiseSource, to_device
from etude.sampling.paths import FlowPath, Grid
from etude.sampling.sampler import Sampler
from etude.sampling.tail import pinned_scheduler, scheduler_class


@dataclass(frozen=True)
class SolverSchedulers:
    """The diffusers schedulers of one solver.

    Attributes:
        vp: class for variance preserving models.
        flow: class for rectified flow.
        evaluations: number of network evaluations for a number of steps.
    """

    vp: str
    flow: str
    evaluations: Callable[[int], int] = lambda num_steps: num_steps


SOLVERS: dict[str, SolverSchedulers] = {
    # On rectified flow DDIM is Euler's method.
    "ddim": SolverSchedulers("DDIMScheduler", "FlowMatchEulerDiscreteScheduler"),
    "euler": SolverSchedulers("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "heun": SolverSchedulers("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", lambda steps: 2 * steps - 1),
    "dpmsolver++": SolverSchedulers("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
    "unipc": SolverSchedulers("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
}
"""The solvers of deployment, by name."""


@dataclass(frozen=True)
class Solver(Sampler):
    """A deterministic solver of diffusers: the plain pipeline with that scheduler put in.

    On VP the solver picks its levels itself, as after `pipeline.scheduler =
    Scheduler.from_config(...)`. On rectified flow every solver visits the levels of the model's own
    pipeline, with its shift, so that solvers differ in nothing else.

    Args:
        name: "ddim", "euler", "heun", "dpmsolver++" (arXiv 2211.01095) or "unipc".
        steps: number of denoising steps. Heun's method calls the network twice in each step but the
            last.
        guidance: guidance scale.

    Raises:
        EtudeError: for an unknown solver, and from `check` and `draw` for a number of steps that
            the solver refuses.

    Example:
        >>> import etude
        >>> etude.Solver("heun", steps=10).evaluations
        19
    """

    name: str
    steps: int = 20
    guidance: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name not in SOLVERS:
            raise unknown("solver", self.name, SOLVERS)

    @property
    def label(self) -> str:
        return self.name

    @property
    def evaluations(self) -> int:
        return SOLVERS[self.name].evaluations(self.steps)

    def check(self, policy: Policy) -> None:
        self._scheduler(policy)

    def _walk(
        self,
        policy: Policy,
        conditioning: Conditioning,
        noise: NoiseSource,
        samples: list[int],
        batch_size: int | MicroBatch,
        on_step: Progress,
    ) -> Tensor:
        latents: list[Tensor] = []

        def work(rows: slice, report: Progress) -> None:
            scheduler, told = self._scheduler(policy), conditioning.take(rows)
            x = to_device(noise.initial(samples[rows], policy.latent_shape), policy.device)
            x = x * getattr(scheduler, "init_noise_sigma", 1.0)
            scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
            for timestep in scheduler.timesteps.to(policy.device):
                output = policy.predict(scale(x, timestep), timestep.expand(len(x)), told, self.guidance)
                x = scheduler.step(output, timestep, x, return_dict=False)[0]
                report(len(x))
            latents.append(x)

        MicroBatch.of(batch_size).run(len(samples), work, on_step)
        return torch.cat(latents)

    def _scheduler(self, policy: Policy) -> Any:
        """A fresh scheduler, ready for the first step."""
        grid = policy.grid(self.steps)  # refuses a number of steps in this project's own words
        if isinstance(policy.path, FlowPath):
            if self.name == "heun":
                return _pinned_heun(grid)
            kind = scheduler_class(SOLVERS[self.name].flow)
            return pinned_scheduler(kind, grid, policy, prediction_type="flow_prediction")
        options = {"algorithm_type": "dpmsolver++"} if self.name == "dpmsolver++" else {}
        scheduler = scheduler_class(SOLVERS[self.name].vp).from_config(policy.scheduler_config, **options)
        try:
            scheduler.set_timesteps(self.steps, device=policy.device)
        except (ValueError, IndexError) as error:
            raise EtudeError(
                f"the {self.name} solver refuses {self.steps} steps ({error}): take another number."
            ) from error
        return scheduler


def _pinned_heun(grid: Grid) -> Any:
    """Heun's scheduler on the grid's very levels, of which it lists every inner one twice."""
    scheduler = scheduler_class("FlowMatchHeunDiscreteScheduler")()
    scheduler.set_timesteps(grid.num_steps)  # makes its state empty
    sigmas, timesteps = grid.s.float(), grid.timesteps
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
    scheduler.set_begin_index(0)
    return scheduler

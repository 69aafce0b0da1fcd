"""diffusers' own deterministic solvers, with which a tuned model may be deployed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etude.batching import MicroBatch, Progress, Size
from etude.errors import EtudeError, unknown
from etude.sampling.finite import FiniteMarks
from etude.sampling.model import Conditioning, Policy
from etude.sampling.noise import NoiseSource, to_device
from etude.sampling.paths import FlowPath
from etude.sampling.sampler import Sampler
from etude.sampling.tail import pinned_scheduler

SOLVERS = {
    # On rectified flow DDIM is Euler's method.
    "ddim": ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler"),
    "euler": ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "heun": ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "dpmsolver++": ("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
    "unipc": ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
}
"""The solvers of deployment by name: their classes in diffusers for VP and for rectified flow."""


@dataclass(frozen=True)
class Solver(Sampler):
    """A deterministic solver of diffusers: the plain pipeline with that scheduler put in.

    On VP the solver picks its levels itself, as after `pipeline.scheduler =
    Scheduler.from_config(...)`; DDIM gets the model's own, and does not clip latents as its class
    does by default. On rectified flow every solver visits the levels of the model's own
    pipeline, with its shift, so that solvers differ in nothing else. Names are "ddim", "euler",
    "heun" (two calls of the network in each step but the last), "dpmsolver++" (arXiv 2211.01095)
    and "unipc".

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
        return 2 * self.steps - 1 if self.name == "heun" else self.steps

    def check(self, policy: Policy) -> None:
        self._scheduler(policy)

    @torch.no_grad()
    def walk(
        self,
        policy: Policy,
        conditioning: Conditioning,
        noise: NoiseSource,
        samples: list[int],
        batch_size: Size | MicroBatch,
        on_step: Progress,
        on_rows: Callable[[slice, Tensor], None] | None = None,
    ) -> Tensor:
        latents = torch.empty((len(samples), *policy.latent_shape), dtype=torch.float32, device=policy.device)
        marks = FiniteMarks(policy.denoiser, policy.computing_dtype, self.evaluations)

        def work(rows: slice, report: Progress) -> None:
            scheduler, told = self._scheduler(policy), conditioning.take(rows)
            x = to_device(noise.initial(samples[rows], policy.latent_shape), policy.device)
            x = x * getattr(scheduler, "init_noise_sigma", 1.0)
            scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
            for step, timestep in enumerate(scheduler.timesteps.to(policy.device)):
                output = policy.predict(scale(x, timestep), timestep.expand(len(x)), told, self.guidance)
                marks.add(output, step)
                x = scheduler.step(output, timestep, x, return_dict=False)[0]
                report(len(x))
            latents[rows] = x
            if on_rows is not None:
                marks.check()  # the images that follow wait for the device, too
                on_rows(rows, latents[rows])

        MicroBatch.of(batch_size).run(len(samples), work, on_step)
        marks.check()
        return latents

    def _scheduler(self, policy: Policy) -> Any:
        """A fresh scheduler, ready for the first step."""
        import diffusers

        grid = policy.grid(self.steps)  # refuses a number of steps in this project's own words
        vp, flow = SOLVERS[self.name]
        if isinstance(policy.path, FlowPath) and self.name == "heun":
            # On the grid's very levels, of which Heun's scheduler lists every inner one twice.
            scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
            scheduler.set_timesteps(self.steps)  # makes its state empty
            sigmas, timesteps = grid.s.float(), grid.timesteps
            scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
            scheduler.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
            scheduler.set_begin_index(0)
            return scheduler
        if isinstance(policy.path, FlowPath):
            return pinned_scheduler(flow, grid, policy, prediction_type="flow_prediction")
        own = {"dpmsolver++": {"algorithm_type": "dpmsolver++"}, "ddim": policy.path.scheduler_settings()}
        options = own.get(self.name, {})
        scheduler = getattr(diffusers, vp).from_config(policy.scheduler_config, **options)
        try:
            scheduler.set_timesteps(self.steps, device=policy.device)
        except (ValueError, IndexError) as error:
            raise EtudeError(
                f"the {self.name} solver refuses {self.steps} steps ({error}): take another number."
            ) from error
        return scheduler

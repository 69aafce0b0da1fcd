"""diffusers' own ODE solvers: the compressed tail of MixGRPO-Flash, and what a tuned model is deployed with.

Nothing is integrated here. A solver of diffusers is told the levels and what the network says, in the two ways that the package
needs one:

* `multistep_tail` takes a batch from the end of a window to the last level in a few steps of DPM-Solver++(2M) (arXiv 2211.01095).
  Its history is empty at the start: what the network said before the last injection of noise belongs to another path.
* `sample_with_solver` makes images as the plain pipeline does with another scheduler put in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etude.batching import MicroBatch, Progress
from etude.errors import EtudeError, unknown
from etude.sampling.model import Policy
from etude.sampling.noise import NoiseSource, to_device
from etude.sampling.paths import FlowPath, Grid
from etude.sampling.tail import pinned_scheduler, scheduler_class


@dataclass(frozen=True)
class Solver:
    """The diffusers schedulers of one name.

    Attributes:
        vp: class for variance preserving models.
        flow: class for rectified flow.
        evaluations: of the network, from the number of steps.
    """

    vp: str
    flow: str
    evaluations: Callable[[int], int] = lambda num_steps: num_steps


SOLVERS: dict[str, Solver] = {
    "ddim": Solver("DDIMScheduler", "FlowMatchEulerDiscreteScheduler"),  # on rectified flow DDIM is Euler's method
    "euler": Solver("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "heun": Solver("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", lambda num_steps: 2 * num_steps - 1),
    "dpmsolver++": Solver("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
    "unipc": Solver("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
}
"""What models are deployed with, by name."""


@torch.no_grad()
def sample_with_solver(
    policy: Policy,
    prompts: list[str],
    solver: str,
    num_steps: int,
    guidance_scale: float = 5.0,
    seed: int = 0,
    batch_size: int | MicroBatch = 32,
    stream: str = "evaluation",
    on_step: Progress = lambda images: None,
) -> Tensor:
    """uint8 images `[len(prompts), 3, h, w]`, as the plain pipeline makes them with that scheduler.

    On VP the solver picks its levels itself, as it does after `pipeline.scheduler = Scheduler.from_config(...)`. On rectified flow
    every solver visits the levels of the model's own pipeline, whatever shift makes them, so that solvers differ in nothing else.

    Args:
        solver: a name in SOLVERS.
        batch_size: images in a network call, at most; halved where they do not fit into memory, like that of `sample_images`.
        num_steps: Heun's method takes the network twice in every one but the last.
        on_step: called with the number of images after every evaluation of the network.

    Image i starts from the same noise as in `sample_images`, so that the two give pairs.

    Raises:
        EtudeError: for an unknown solver, or a number of steps that it cannot take.
    """
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    policy.grid(num_steps)  # refuses a number of steps with this project's own words
    conditioning, noise = policy.encode(prompts), NoiseSource(seed, stream)
    latents: list[Tensor] = []

    def work(rows: slice, report: Progress) -> None:
        scheduler = _scheduler(policy, solver, num_steps)
        told = conditioning.take(rows)
        x = to_device(noise.initial(list(range(len(prompts)))[rows], policy.latent_shape), policy.device)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
        for timestep in scheduler.timesteps.to(policy.device):
            output = policy.predict(scale(x, timestep), timestep.expand(len(x)), told, guidance_scale)
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
            report(len(x))
        latents.append(x)

    MicroBatch.of(batch_size).run(len(prompts), work, on_step)
    return policy.decode(torch.cat(latents))


def _scheduler(policy: Policy, solver: str, num_steps: int) -> Any:
    """A fresh scheduler of that name, ready for the first step."""
    if isinstance(policy.path, FlowPath):
        grid = policy.grid(num_steps)
        if solver == "heun":
            return _pinned_heun(grid)
        return pinned_scheduler(scheduler_class(SOLVERS[solver].flow), grid, policy, prediction_type="flow_prediction")
    options = {"algorithm_type": "dpmsolver++"} if solver == "dpmsolver++" else {}
    scheduler = scheduler_class(SOLVERS[solver].vp).from_config(policy.scheduler_config, **options)
    try:
        scheduler.set_timesteps(num_steps, device=policy.device)
    except (ValueError, IndexError) as error:
        raise EtudeError(f"the {solver} solver refuses {num_steps} steps ({error}): take another number.") from error
    return scheduler


def _pinned_heun(grid: Grid) -> Any:
    """The same for Heun's method, which lists every inner level twice."""
    scheduler = scheduler_class("FlowMatchHeunDiscreteScheduler")()
    scheduler.set_timesteps(grid.num_steps)  # makes its state empty
    sigmas, timesteps = grid.s.float(), grid.timesteps
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
    scheduler.set_begin_index(0)
    return scheduler

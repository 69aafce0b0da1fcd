"""Rollouts by a solver of diffusers: final latents alone, for objectives that need no trajectory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etude.batching import MicroBatch, Progress, silent
from etude.sampling.model import Conditioning, Policy
from etude.sampling.noise import NoiseSource
from etude.sampling.rollout import Trajectory
from etude.sampling.solvers import Solver


@torch.no_grad()
def solved_rollout(
    policy: Policy,
    solver: Solver,
    conditioning: Conditioning,
    noise: NoiseSource,
    samples: list[int],
    batches: MicroBatch,
    on_step: Progress = silent,
    on_rows: Callable[[slice, Tensor], None] | None = None,
) -> Trajectory:
    """Samples one image per row of `conditioning` by a solver; the trajectory has no trained step.

    `samples` are the keys of the initial noise, which is that of `rollout`. `on_step` is called
    with the number of images that just made one network evaluation, `on_rows` as in `rollout`.
    """
    latents = torch.empty((len(samples), *policy.latent_shape), device=policy.device)

    def solve(rows: slice, report: Progress) -> None:
        own = samples[rows]
        latents[rows] = solver._walk(policy, conditioning.take(rows), noise, own, len(own), report)
        if on_rows is not None:
            on_rows(rows, latents[rows])

    batches.run(len(samples), solve, on_step)
    return Trajectory.of_images(latents)

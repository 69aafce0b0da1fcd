"""Plan + policy + noise -> trajectory, and the replay of its trained steps.

The same function, `denoise`, takes one step of the rollout and one micro-batch of the replay: with unchanged weights and the same
batch shape the two give the same bits, so the importance ratio of the first update is exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.kernels import Transition
from etude.noise import keyed_noise
from etude.paths import to_x0_eps
from etude.plans import StepTable
from etude.policies.base import Conditioning, Policy


@dataclass(frozen=True)
class NoiseSource:
    """Noise keyed by what it is for: never by batch size, process or history.

    Attributes:
        seed: of the run.
        stream: what the samples are for ("training", "evaluation").
        iteration: of the run; evaluations use 0, so that every one of them sees the same noise.
    """

    seed: int
    stream: str
    iteration: int = 0

    def initial(self, samples: list[int], shape: tuple[int, ...]) -> Tensor:
        """x_T of each sample, N(0, I) as in diffusers: fp32 `[len(samples), *shape]`."""
        return keyed_noise(self.seed, f"{self.stream}/initial", self.iteration, samples, 0, shape)

    def step(self, samples: list[int], step: int, shape: tuple[int, ...]) -> Tensor:
        """The noise that a stochastic step injects: fp32 `[len(samples), *shape]`."""
        return keyed_noise(self.seed, f"{self.stream}/step", self.iteration, samples, step, shape)


@dataclass(frozen=True)
class Trajectory:
    """What a rollout leaves behind: the images' latents, and what the replay of the trained steps needs.

    Attributes:
        latents: final latents, fp32 `[n, ...]`.
        steps: the K trained steps.
        states: `x` at the source and the target of each trained step, fp32 `[n, L, ...]`, each level once.
        level: level index of a step's source in `states`, by step; its target is the next one.
        log_prob: fp32 `[n, K]`.
        reference_mean: the reference model's means of the trained steps, fp32 `[n, K, ...]`, when asked for.
    """

    latents: Tensor
    steps: tuple[int, ...]
    states: Tensor
    level: dict[int, int]
    log_prob: Tensor
    reference_mean: Tensor | None = None


def denoise(
    policy: Policy, table: StepTable, step: int | Tensor, x: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Transition:
    """The Gaussian transition out of `x` `[n, ...]` at one step, or at one step per sample (int64 `[n]`)."""
    steps = torch.full((len(x),), step, device=x.device) if isinstance(step, int) else step
    output = policy.predict(x, table.timesteps[steps], conditioning, guidance_scale)
    x0_hat, eps_hat = to_x0_eps(output, x, table.a[steps], table.s[steps], policy.prediction_type)
    return table.transition(step, x0_hat, eps_hat)


@torch.no_grad()
def rollout(
    policy: Policy,
    table: StepTable,
    conditioning: Conditioning,
    noise: NoiseSource,
    samples: list[int],
    guidance_scale: float,
    batch_size: int,
    reduction: str = "mean",
    with_reference: bool = False,
    on_step: Callable[[int], None] = lambda images: None,
) -> Trajectory:
    """Samples one image per row of `conditioning`.

    Args:
        samples: the global index of each row: the key of its noise.
        reduction: of the log-probability over latent dimensions, "mean" or "sum".
        with_reference: also computes the reference model's means along the same states, for the KL.
        on_step: called with the number of images that just made one step.
    """
    parts = [
        _rollout_batch(
            policy,
            table,
            conditioning.take(slice(start, start + batch_size)),
            noise,
            samples[start : start + batch_size],
            guidance_scale,
            reduction,
            with_reference,
            on_step,
        )
        for start in range(0, len(samples), batch_size)
    ]
    return Trajectory(
        latents=torch.cat([p.latents for p in parts]),
        steps=parts[0].steps,
        states=torch.cat([p.states for p in parts]),
        level=parts[0].level,
        log_prob=torch.cat([p.log_prob for p in parts]),
        reference_mean=torch.cat([p.reference_mean for p in parts if p.reference_mean is not None])
        if with_reference
        else None,
    )


def _rollout_batch(
    policy: Policy,
    table: StepTable,
    conditioning: Conditioning,
    noise: NoiseSource,
    samples: list[int],
    guidance_scale: float,
    reduction: str,
    with_reference: bool,
    on_step: Callable[[int], None],
) -> Trajectory:
    steps = table.trained_steps
    touched = sorted({*steps, *(i + 1 for i in steps)})
    level = {i: touched.index(i) for i in steps}
    x = noise.initial(samples, policy.latent_shape).to(policy.device)
    states = x.new_empty((len(samples), len(touched), *policy.latent_shape))
    log_prob = x.new_empty((len(samples), len(steps)))
    reference_mean = x.new_empty((len(samples), len(steps), *policy.latent_shape)) if with_reference else None
    for step in range(table.num_steps):
        transition = denoise(policy, table, step, x, conditioning, guidance_scale)
        if step in level:
            states[:, level[step]] = x
        if step in level and reference_mean is not None:
            with policy.reference():
                reference = denoise(policy, table, step, x, conditioning, guidance_scale)
            reference_mean[:, steps.index(step)] = reference.mean
        if table.stochastic[step]:
            x = transition.sample(noise.step(samples, step, policy.latent_shape).to(policy.device))
        else:
            x = transition.mean
        if step in level:
            states[:, level[step] + 1] = x
            log_prob[:, steps.index(step)] = transition.log_prob(x, reduction)
        on_step(len(samples))
    return Trajectory(x, steps, states, level, log_prob, reference_mean)


def replay(
    policy: Policy,
    table: StepTable,
    trajectory: Trajectory,
    rows: Tensor,
    columns: Tensor,
    conditioning: Conditioning,
    guidance_scale: float,
    with_gradient: bool = True,
) -> tuple[Transition, Tensor]:
    """The transition of stored (sample, step) pairs under the current weights, and the stored target of each.

    Args:
        rows: int64 `[m]`, which samples.
        columns: int64 `[m]`, which of the trained steps: indices into `trajectory.steps`.
        conditioning: of all samples of the trajectory.
    """
    device = trajectory.states.device
    steps = torch.tensor(trajectory.steps, device=device)[columns]
    levels = torch.tensor([trajectory.level[step] for step in trajectory.steps], device=device)[columns]
    with nullcontext() if with_gradient else torch.no_grad():
        transition = denoise(
            policy, table, steps, trajectory.states[rows, levels], conditioning.take(rows), guidance_scale
        )
    return transition, trajectory.states[rows, levels + 1]

"""Plan + policy + noise -> trajectory, and the replay of its trained steps.

The same function, `denoise`, takes one step of the rollout and one micro-batch of the replay: with unchanged weights and the same
batch shape the two give the same bits, so the importance ratio of the first update is exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    steps = table.trained_steps
    touched = sorted({*steps, *(step + 1 for step in steps)})
    shape = policy.latent_shape

    def room(*middle: int) -> Tensor:
        return torch.empty((len(samples), *middle), device=policy.device)

    trajectory = Trajectory(
        latents=room(*shape),
        steps=steps,
        states=room(len(touched), *shape),
        level={step: touched.index(step) for step in steps},
        log_prob=room(len(steps)),
        reference_mean=room(len(steps), *shape) if with_reference else None,
    )
    for start in range(0, len(samples), batch_size):
        rows = slice(start, start + batch_size)
        for step, x, transition, target in _walk(
            policy, table, conditioning.take(rows), noise, samples[rows], guidance_scale
        ):
            if step in trajectory.level:
                column, level = steps.index(step), trajectory.level[step]
                trajectory.states[rows, level], trajectory.states[rows, level + 1] = x, target
                trajectory.log_prob[rows, column] = transition.log_prob(target, reduction)
                if trajectory.reference_mean is not None:
                    with policy.reference():
                        reference = denoise(policy, table, step, x, conditioning.take(rows), guidance_scale)
                    trajectory.reference_mean[rows, column] = reference.mean
            trajectory.latents[rows] = target
            on_step(len(target))
    return trajectory


def _walk(
    policy: Policy,
    table: StepTable,
    conditioning: Conditioning,
    noise: NoiseSource,
    samples: list[int],
    guidance_scale: float,
) -> Iterator[tuple[int, Tensor, Transition, Tensor]]:
    """The sampling loop of one batch: each step with its source, its transition and its target."""
    x = noise.initial(samples, policy.latent_shape).to(policy.device)
    for step in range(table.num_steps):
        transition = denoise(policy, table, step, x, conditioning, guidance_scale)
        if table.stochastic[step]:
            target = transition.sample(noise.step(samples, step, policy.latent_shape).to(policy.device))
        else:
            target = transition.mean
        yield step, x, transition, target
        x = target


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

"""The rollout: plan + policy + noise -> trajectory.

`denoise` computes both a step of the rollout and a micro-batch of the replay. With unchanged
weights and the same batch shape the two give the same bits: the first update's ratio is exactly 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from etude.batching import MicroBatch, Progress, Size
from etude.errors import EtudeError
from etude.sampling.finite import FiniteMarks
from etude.sampling.kernels import Transition
from etude.sampling.model import Conditioning, Policy
from etude.sampling.noise import NoiseSource, to_device
from etude.sampling.paths import to_x0_eps
from etude.sampling.plans import StepTable
from etude.sampling.sample_gradients import SampleGradients
from etude.sampling.tail import multistep_tail


@dataclass(frozen=True)
class Trajectory:
    """The final latents of a rollout, fp32 `[n, ...]`, and what a replay of its K trained `steps` needs.

    `states`, fp32 `[n, L, ...]`, holds x at the source and target of each trained step, each of the
    L `levels` once. `step_index` and `level_index`, int64 `[K]` on the device, are the trained
    steps and the places in `states` of their sources; a target is in the next place. `log_prob` is
    `[n, K]`. `reference_mean` `[n, K, ...]` are the reference model's means, if there is one, and
    `mean` the policy's, if they are kept. `gradients` are those of the log-probabilities by image, if
    the rollout took them. The fields are fixed, but `rollout` and `replay_log_prob`
    write into the tensors.
    """

    latents: Tensor
    steps: tuple[int, ...]
    states: Tensor
    log_prob: Tensor
    step_index: Tensor
    level_index: Tensor
    levels: tuple[int, ...]
    reference_mean: Tensor | None = None
    mean: Tensor | None = None
    gradients: SampleGradients | None = None

    @classmethod
    def of_images(cls, latents: Tensor) -> Trajectory:
        """A trajectory of final latents alone, without a trained step."""
        none, steps = latents.new_empty(len(latents), 0), torch.zeros(0, dtype=torch.int64, device=latents.device)
        return cls(latents, (), latents[:, None][:, :0], none, steps, steps, ())


def denoise(
    policy: Policy, table: StepTable, step: int | Tensor, x: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Transition:
    """The Gaussian transition out of `x` `[n, ...]` at one step for all samples, or `[n]` with one for each."""
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
    batch_size: Size | MicroBatch,
    reduction: str = "mean",
    reference: Callable[[], AbstractContextManager[None]] | None = None,
    on_step: Progress = lambda images: None,
    noise_samples: list[int] | None = None,
    prompts: Sequence[Hashable] | None = None,
    starts: int | None = None,
    on_rows: Callable[[slice, Tensor], None] | None = None,
    keep_means: bool = False,
    gradients: SampleGradients | None = None,
) -> Trajectory:
    """Samples one image per row of `conditioning`.

    Args:
        samples: global index of each row, the key of the noise in its stochastic steps.
        batch_size: largest number of rows in a network call; lowered where memory runs out.
        reduction: how a log-probability combines the latent dimensions, "mean" or "sum".
        reference: makes a context inside which the policy is the reference model, whose means at
            the same states are then computed too, for the KL.
        on_step: called with the number of images that just made one step.
        noise_samples: key of each row's initial noise. Default: `samples`.
        prompts: the prompt of each row, or any key that tells prompts apart. Rows of equal initial
            noise and equal prompt then share the steps before the first stochastic one. The images
            do not change: bit for bit where the network's batches have the same size, and up to
            rounding otherwise. Default: each row computes all its steps.
        starts: number of starting states to compute, with copies if need be: under FSDP every process
            must call the network equally often (`most_starts`). Default: one a distinct start.
        on_rows: called with the rows and the final latents of each micro-batch when it is done.
        keep_means: whether the trajectory keeps the means of the trained steps.
        gradients: receiver of the gradients of the trained steps' log-probabilities. Default: none are taken.

    Example:
        >>> import etude
        >>> from etude.sampling.noise import NoiseSource
        >>> from etude.sampling.plans import SamplingPlan
        >>> policy, plan = etude.load_policy("emoji-sd"), SamplingPlan.sde(2, etude.GDDIM(eta=1.2))
        >>> table = plan.tabulate(policy.grid(2)).to(policy.device)
        >>> conditioning, noise = policy.encode(["red heart"]), NoiseSource(0, "training")
        >>> trajectory = etude.rollout(policy, table, conditioning, noise, [0], guidance_scale=5.0, batch_size=1)
        >>> trajectory.steps, trajectory.log_prob.shape
        ((0, 1), torch.Size([1, 2]))
    """
    keys = samples if noise_samples is None else noise_samples
    if len(keys) != len(samples):
        raise EtudeError(f"{len(keys)} keys of the initial noise do not fit {len(samples)} samples: give one each.")
    if prompts is not None and len(prompts) != len(samples):
        raise EtudeError(f"{len(prompts)} prompts do not fit {len(samples)} samples: give one each.")
    trajectory = replace(_empty(policy, table, len(samples), reference is not None, keep_means), gradients=gradients)
    batches = MicroBatch.of(batch_size)
    finite = FiniteMarks(policy.denoiser, policy.computing_dtype, table.num_evaluations)
    latents = trajectory.latents  # first the states from which the rows continue on their own

    def begin() -> int:
        """Fills the latents with the starting states; returns the step at which the rows continue."""
        # The number of network calls depends on `starts` and the number of rows alone.
        seen: dict[tuple[Hashable, Hashable], int] = {}
        marks = range(len(keys)) if prompts is None else prompts
        origin = [seen.setdefault(start, row) for row, start in enumerate(zip(keys, marks, strict=True))]
        sharers = Counter(origin)
        heads = sorted(sharers)
        heads += heads[-1:] * ((starts or 0) - len(heads))
        if not (shared := len(heads) < len(origin)):
            heads = list(range(len(origin)))
        images = [sharers[head] * (i == 0 or heads[i - 1] != head) if shared else 1 for i, head in enumerate(heads)]
        first = table.prefix_steps if shared else 0
        states = (
            torch.empty((len(heads), *latents.shape[1:]), dtype=latents.dtype, device=latents.device)
            if shared
            else latents
        )

        def walk_together(rows: slice, report: Progress) -> None:
            some = heads[rows]
            x = to_device(noise.initial([keys[head] for head in some], policy.latent_shape), policy.device)
            own = conditioning.take(to_device(torch.tensor(some), policy.device)) if first else conditioning
            for step in range(first):
                x = denoise(policy, table, step, x, own, guidance_scale).mean
                finite.add(x, step)
                report(sum(images[rows]))
            states[rows] = x

        batches.run(len(heads), walk_together, on_step)
        if shared:
            place = {head: i for i, head in enumerate(heads)}
            latents.copy_(states[to_device(torch.tensor([place[head] for head in origin]), latents.device)])
        return first

    first = begin()

    def walk(rows: slice, report: Progress) -> None:
        own, x = conditioning.take(rows), latents[rows].clone()
        if gradients is not None:
            gradients.begin(rows)
        for step in range(first, table.num_steps):
            taken = gradients if table.trained[step] else None
            with nullcontext() if taken is None else taken.recording():
                transition = denoise(policy, table, step, x, own, guidance_scale)
            target = transition.mean
            if table.stochastic[step]:
                z = noise.step(samples[rows], step, policy.latent_shape)
                target = transition.sample(to_device(z, policy.device))
            if table.trained[step]:
                level, column = trajectory.levels.index(step), trajectory.steps.index(step)
                trajectory.states[rows, level], trajectory.states[rows, level + 1] = x, target
                with torch.set_grad_enabled(taken is not None):
                    log_prob = transition.log_prob(target, reduction)
                if taken is not None:
                    taken.add(rows, log_prob)
                trajectory.log_prob[rows, column] = log_prob.detach()
                if trajectory.mean is not None:
                    trajectory.mean[rows, column] = transition.mean.detach()
            x = target
            finite.add(x, step)
            report(len(x))
        if table.tail is not None:
            x = multistep_tail(policy, table.tail, own, x, guidance_scale, report)
            finite.add(x, table.num_evaluations - 1)
        latents[rows] = x
        if on_rows is not None:
            finite.check()  # the images that follow wait for the device, too
            on_rows(rows, x)
        if reference is None or trajectory.reference_mean is None:
            return
        # The means have the precision of the replay, with which the KL compares them: in another
        # precision unchanged weights would have a KL above 0. One context serves all steps, since
        # switching an adapter off and on takes as long as an evaluation of a small network.
        with reference(), policy.precision(None):
            for column, step in enumerate(trajectory.steps):
                x = trajectory.states[rows, trajectory.levels.index(step)].contiguous()
                mean = denoise(policy, table, step, x, own, guidance_scale).mean
                trajectory.reference_mean[rows, column] = mean
                report(0)

    batches.run(len(samples), walk, on_step)
    finite.check()
    return trajectory


def _empty(policy: Policy, table: StepTable, count: int, with_reference: bool, with_means: bool) -> Trajectory:
    """A trajectory of `count` images, not yet filled, with room for the trained steps only."""
    steps, shape, device = table.trained_steps, policy.latent_shape, policy.device
    levels = sorted({*steps, *(step + 1 for step in steps)})

    def room(*middle: int) -> Tensor:
        return torch.empty((count, *middle), dtype=torch.float32, device=device)

    return Trajectory(
        latents=room(*shape),
        steps=steps,
        states=room(len(levels), *shape),
        log_prob=room(len(steps)),
        step_index=torch.tensor(steps, dtype=torch.int64, device=device),
        level_index=torch.tensor([levels.index(step) for step in steps], dtype=torch.int64, device=device),
        levels=tuple(levels),
        reference_mean=room(len(steps), *shape) if with_reference else None,
        mean=room(len(steps), *shape) if with_means else None,
    )

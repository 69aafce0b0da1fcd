"""Plan + policy + noise -> trajectory, and the replay of its trained steps.

The same function, `denoise`, takes one step of the rollout and one micro-batch of the replay: with unchanged weights and the same
batch shape the two give the same bits, so the importance ratio of the first update is exactly 1.

Images of one prompt that start from the same noise are the same image until the first stochastic step: that part is computed once
for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.batching import MicroBatch, Progress
from etude.errors import EtudeError
from etude.sampling.kernels import Transition
from etude.sampling.model import Conditioning, Policy
from etude.sampling.noise import NoiseSource as NoiseSource
from etude.sampling.noise import to_device
from etude.sampling.paths import to_x0_eps
from etude.sampling.plans import StepTable
from etude.sampling.tail import multistep_tail


@dataclass(frozen=True)
class Trajectory:
    """What a rollout leaves behind: the images' latents, and what the replay of the trained steps needs.

    Attributes:
        latents: final latents, fp32 `[n, ...]`.
        steps: the K trained steps.
        states: `x` at the source and the target of each trained step, fp32 `[n, L, ...]`, each level once.
        log_prob: fp32 `[n, K]`.
        step_index: the trained steps as a tensor on the device, int64 `[K]`.
        level_index: where `states` has the source of each trained step, int64 `[K]`; its target is the next one.
        levels: the L levels that `states` holds.
        reference_mean: the reference model's means of the trained steps, fp32 `[n, K, ...]`, when asked for.
    """

    latents: Tensor
    steps: tuple[int, ...]
    states: Tensor
    log_prob: Tensor
    step_index: Tensor
    level_index: Tensor
    levels: tuple[int, ...]
    reference_mean: Tensor | None = None

    def store(self, rows: slice, step: int, x: Tensor, target: Tensor, log_prob: Tensor) -> None:
        """Keeps one trained step of some rows."""
        level = self.levels.index(step)
        self.states[rows, level], self.states[rows, level + 1] = x, target
        self.log_prob[rows, self.steps.index(step)] = log_prob


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
    batch_size: int | MicroBatch,
    reduction: str = "mean",
    reference: Callable[[], AbstractContextManager[None]] | None = None,
    on_step: Progress = lambda images: None,
    noise_samples: list[int] | None = None,
    prompts: Sequence[Hashable] | None = None,
    starts: int | None = None,
    on_rows: Callable[[slice, Tensor], None] | None = None,
) -> Trajectory:
    """Samples one image per row of `conditioning`.

    Args:
        samples: the global index of each row: the key of the noise that its steps inject.
        batch_size: rows in a network call, at most; fewer where they do not fit into memory.
        reduction: of the log-probability over latent dimensions, "mean" or "sum".
        reference: context manager inside which the policy is the reference model (`TrainablePolicy.reference`). With it the reference's
            means along the same states are computed, too, for the KL.
        on_step: called with the number of images that just made one step.
        noise_samples: the key of each row's initial noise; rows of a group that share theirs carry the same one. None: `samples`.
        prompts: the prompt of each row, or anything that tells them apart. With it the steps before the first stochastic one are
            computed once for all rows of equal initial noise and equal prompt. The images are the same, bit for bit where the
            network is called with batches of the same size and to rounding otherwise. None: for each row on its own.
        starts: how many beginnings are computed, at least as many as differ here: fewer are filled up with copies. Where the
            network's calls are collective every process must give the same (`most_starts`), and so makes as many calls. None:
            as many as differ.
        on_rows: called with the rows of each micro-batch and their final latents as soon as these are known.

    Raises:
        EtudeError: if `noise_samples` or `prompts` is not one a row.

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
    trajectory = _empty(policy, table, len(samples), reference is not None)
    batches = MicroBatch.of(batch_size)
    origin = list(range(len(keys))) if prompts is None else origins(keys, prompts)
    # Where each image starts from waits in the room of where it ends.
    first = _begin(
        policy, table, conditioning, noise, keys, origin, starts, guidance_scale, batches, on_step, trajectory.latents
    )

    def walk(rows: slice, report: Progress) -> None:
        told, x = conditioning.take(rows), trajectory.latents[rows].clone()
        for step in range(first, table.num_steps):
            transition = denoise(policy, table, step, x, told, guidance_scale)
            target = transition.mean
            if table.stochastic[step]:
                drawn = noise.step(samples[rows], step, policy.latent_shape)
                target = transition.sample(to_device(drawn, policy.device))
            if table.trained[step]:
                trajectory.store(rows, step, x, target, transition.log_prob(target, reduction))
            x = target
            report(len(x))
        if table.tail is not None:
            x = multistep_tail(policy, table.tail, told, x, guidance_scale, report)
        trajectory.latents[rows] = x
        if on_rows is not None:
            on_rows(rows, x)
        if reference is not None:
            _refer(policy, reference, table, trajectory, rows, told, guidance_scale, report)

    batches.run(len(samples), walk, on_step)
    return trajectory


def _refer(
    policy: Policy,
    reference: Callable[[], AbstractContextManager[None]],
    table: StepTable,
    trajectory: Trajectory,
    rows: slice,
    told: Conditioning,
    guidance_scale: float,
    report: Progress,
) -> None:
    """Keeps the reference model's means along the stored states of some rows.

    They are computed in the precision of the replay that they are compared with, or weights that did not move would have a KL; and all
    in one go, since to switch an adapter off and on takes as long as an evaluation of a small network.
    """
    assert trajectory.reference_mean is not None
    with reference(), policy.precision(None):
        for column, step in enumerate(trajectory.steps):
            x = trajectory.states[rows, trajectory.levels.index(step)].contiguous()
            trajectory.reference_mean[rows, column] = denoise(policy, table, step, x, told, guidance_scale).mean
            report(0)


def _empty(policy: Policy, table: StepTable, count: int, with_reference: bool) -> Trajectory:
    """A trajectory of `count` images, not yet filled, with room for the trained steps only."""
    steps, shape, device = table.trained_steps, policy.latent_shape, policy.device
    touched = sorted({*steps, *(step + 1 for step in steps)})

    def room(*middle: int) -> Tensor:
        return torch.empty((count, *middle), device=device)

    return Trajectory(
        latents=room(*shape),
        steps=steps,
        states=room(len(touched), *shape),
        log_prob=room(len(steps)),
        step_index=torch.tensor(steps, dtype=torch.int64, device=device),
        level_index=torch.tensor([touched.index(step) for step in steps], dtype=torch.int64, device=device),
        levels=tuple(touched),
        reference_mean=room(len(steps), *shape) if with_reference else None,
    )


def _begin(
    policy: Policy,
    table: StepTable,
    conditioning: Conditioning,
    noise: NoiseSource,
    keys: list[int],
    origin: list[int],
    starts: int | None,
    guidance_scale: float,
    batches: MicroBatch,
    on_step: Progress,
    out: Tensor,
) -> int:
    """Writes where each row's own path begins to `out` `[n, ...]`, and returns the step it begins with.

    That is the initial noise and 0, or, if some rows share theirs (`origin` names the row that stands for each), the state in
    front of the first stochastic step. What is called how often depends on `starts` and the number of rows alone.
    """
    standing = Counter(origin)
    heads = sorted(standing)
    heads += heads[-1:] * ((starts or 0) - len(heads))
    shared = len(heads) < len(origin)
    if not shared:
        heads = list(range(len(origin)))
    images = [standing[head] * (i == 0 or heads[i - 1] != head) if shared else 1 for i, head in enumerate(heads)]
    first = table.prefix_steps if shared else 0
    states = torch.empty((len(heads), *out.shape[1:]), device=out.device) if shared else out

    def begin(rows: slice, report: Progress) -> None:
        some = heads[rows]
        x = to_device(noise.initial([keys[head] for head in some], policy.latent_shape), policy.device)
        told = conditioning.take(to_device(torch.tensor(some), policy.device)) if first else conditioning
        for step in range(first):
            x = denoise(policy, table, step, x, told, guidance_scale).mean
            report(sum(images[rows]))
        states[rows] = x

    batches.run(len(heads), begin, on_step)
    if shared:
        place = {head: i for i, head in enumerate(heads)}
        out.copy_(states[to_device(torch.tensor([place[head] for head in origin]), out.device)])
    return first


def origins(keys: Sequence[Hashable], prompts: Sequence[Hashable]) -> list[int]:
    """For each row, the first row of the same initial noise and the same prompt: itself if there is no earlier one."""
    first: dict[tuple[Hashable, Hashable], int] = {}
    return [first.setdefault(pair, row) for row, pair in enumerate(zip(keys, prompts, strict=True))]

"""The rollout: plan + policy + noise -> trajectory.

One function, `denoise`, computes both a step of the rollout and a micro-batch of the replay
(`etude.sampling.replay`). With unchanged weights and the same batch shape the two give the same
bits, so the importance ratio of the first update is exactly 1.

Images of one prompt that start from the same noise have the same states until the first stochastic
step. These steps are computed once for all of them.
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
from etude.sampling.noise import NoiseSource, to_device
from etude.sampling.paths import to_x0_eps
from etude.sampling.plans import StepTable
from etude.sampling.tail import multistep_tail


@dataclass(frozen=True)
class Trajectory:
    """The result of a rollout: the images' latents, and the data for a replay of the trained steps.

    The fields are fixed, but `store` and `replay_log_prob` write into the tensors.

    Attributes:
        latents: final latents, fp32 `[n, ...]`.
        steps: the K trained steps.
        states: `x` at the source and the target of each trained step, fp32 `[n, L, ...]`, each
            level once.
        log_prob: fp32 `[n, K]`.
        step_index: the trained steps as a tensor on the device, int64 `[K]`.
        level_index: the index in `states` of each trained step's source, int64 `[K]`; the target is
            at the next index.
        levels: the L levels that `states` holds.
        reference_mean: the reference model's means of the trained steps, fp32 `[n, K, ...]`.
            Default: None, not computed.
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
        """Writes one trained step of some rows: source state, target state and log-probability."""
        level = self.levels.index(step)
        self.states[rows, level], self.states[rows, level + 1] = x, target
        self.log_prob[rows, self.steps.index(step)] = log_prob


def denoise(
    policy: Policy, table: StepTable, step: int | Tensor, x: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Transition:
    """The Gaussian transition out of `x` `[n, ...]`.

    Args:
        step: one step for all samples, or int64 `[n]` with one for each.
    """
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
        samples: global index of each row, the key of the noise in its stochastic steps.
        batch_size: largest number of rows in a network call; lowered where so many rows do not fit
            into memory.
        reduction: how a log-probability combines the latent dimensions, "mean" or "sum". Default:
            "mean".
        reference: makes a context inside which the policy is the reference model
            (`TrainablePolicy.reference`). The rollout then also computes the reference's means at
            the same states, for the KL. Default: None, no means.
        on_step: called with the number of images that just made one step.
        noise_samples: key of each row's initial noise; rows with the same key start from the same
            noise. Default: `samples`.
        prompts: the prompt of each row, or any key that tells prompts apart. Rows of equal initial
            noise and equal prompt then share the steps before the first stochastic one, which are
            computed once. The images do not change: bit for bit where the network's batches have
            the same size, and up to rounding otherwise. Default: each row computes all its steps.
        starts: number of starting states to compute. Under FSDP every process must call the network
            equally often: all pass the largest number that any needs (`most_starts`), and compute
            copies to reach it. Default: one for each distinct start.
        on_rows: called with the rows of each micro-batch and their final latents as soon as these
            are known.

    Raises:
        EtudeError: `noise_samples` or `prompts` does not have one entry per row.

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
    # `trajectory.latents` first holds the state from which each row continues, then its final
    # latents.
    first = _begin(
        policy, table, conditioning, noise, keys, origin, starts, guidance_scale, batches, on_step, trajectory.latents
    )

    def walk(rows: slice, report: Progress) -> None:
        own, x = conditioning.take(rows), trajectory.latents[rows].clone()
        for step in range(first, table.num_steps):
            transition = denoise(policy, table, step, x, own, guidance_scale)
            target = transition.mean
            if table.stochastic[step]:
                z = noise.step(samples[rows], step, policy.latent_shape)
                target = transition.sample(to_device(z, policy.device))
            if table.trained[step]:
                trajectory.store(rows, step, x, target, transition.log_prob(target, reduction))
            x = target
            report(len(x))
        if table.tail is not None:
            x = multistep_tail(policy, table.tail, own, x, guidance_scale, report)
        trajectory.latents[rows] = x
        if on_rows is not None:
            on_rows(rows, x)
        if reference is not None:
            _refer(policy, reference, table, trajectory, rows, own, guidance_scale, report)

    batches.run(len(samples), walk, on_step)
    return trajectory


def _refer(
    policy: Policy,
    reference: Callable[[], AbstractContextManager[None]],
    table: StepTable,
    trajectory: Trajectory,
    rows: slice,
    conditioning: Conditioning,
    guidance_scale: float,
    report: Progress,
) -> None:
    """Stores the reference model's means at the stored states of some rows.

    The means have the precision of the replay, with which the KL compares them: in another
    precision unchanged weights would have a KL above 0. One context serves all steps, since
    switching an adapter off and on takes as long as an evaluation of a small network.

    Args:
        conditioning: the conditioning of these rows.
    """
    assert trajectory.reference_mean is not None
    with reference(), policy.precision(None):
        for column, step in enumerate(trajectory.steps):
            x = trajectory.states[rows, trajectory.levels.index(step)].contiguous()
            trajectory.reference_mean[rows, column] = denoise(policy, table, step, x, conditioning, guidance_scale).mean
            report(0)


def _empty(policy: Policy, table: StepTable, count: int, with_reference: bool) -> Trajectory:
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
    """Fills `out` `[n, ...]` with the state from which each row continues on its own.

    Returns the step at which the rows continue.

    Without shared starts this is the initial noise and step 0. With them, the deterministic steps
    are computed once per distinct start, and rows part at the first stochastic step. The number of
    network calls depends on `starts` and the number of rows alone.

    Args:
        keys: key of each row's initial noise.
        origin: for each row, the first row with the same start (`origins`).
    """
    sharers = Counter(origin)
    heads = sorted(sharers)
    heads += heads[-1:] * ((starts or 0) - len(heads))
    shared = len(heads) < len(origin)
    if not shared:
        heads = list(range(len(origin)))
    images = [sharers[head] * (i == 0 or heads[i - 1] != head) if shared else 1 for i, head in enumerate(heads)]
    first = table.prefix_steps if shared else 0
    states = torch.empty((len(heads), *out.shape[1:]), dtype=out.dtype, device=out.device) if shared else out

    def begin(rows: slice, report: Progress) -> None:
        some = heads[rows]
        x = to_device(noise.initial([keys[head] for head in some], policy.latent_shape), policy.device)
        own = conditioning.take(to_device(torch.tensor(some), policy.device)) if first else conditioning
        for step in range(first):
            x = denoise(policy, table, step, x, own, guidance_scale).mean
            report(sum(images[rows]))
        states[rows] = x

    batches.run(len(heads), begin, on_step)
    if shared:
        place = {head: i for i, head in enumerate(heads)}
        out.copy_(states[to_device(torch.tensor([place[head] for head in origin]), out.device)])
    return first


def origins(keys: Sequence[Hashable], prompts: Sequence[Hashable]) -> list[int]:
    """For each row, the first row with the same initial noise and prompt (perhaps itself)."""
    first: dict[tuple[Hashable, Hashable], int] = {}
    return [first.setdefault(pair, row) for row, pair in enumerate(zip(keys, prompts, strict=True))]

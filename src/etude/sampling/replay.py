"""Replay: the stored steps of a rollout under the present weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from etude.batching import MicroBatch, Progress, Size
from etude.sampling.kernels import Transition
from etude.sampling.model import Conditioning, Policy
from etude.sampling.plans import StepTable
from etude.sampling.rollout import Trajectory, denoise


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
    """The transitions of stored (sample, step) pairs under the current weights, and their targets.

    `rows` are indices of samples and `columns` indices into `trajectory.steps`, int64 `[m]`; the
    conditioning is that of all samples. Nothing is read back from an accelerator.

    Example:
        >>> import etude, torch
        >>> from etude.sampling.noise import NoiseSource
        >>> from etude.sampling.plans import SamplingPlan
        >>> policy, plan = etude.load_policy("emoji-sd"), SamplingPlan.sde(2, etude.GDDIM(eta=1.2))
        >>> table = plan.tabulate(policy.grid(2)).to(policy.device)
        >>> conditioning, noise = policy.encode(["red heart"]), NoiseSource(0, "training")
        >>> trajectory = etude.rollout(policy, table, conditioning, noise, [0], guidance_scale=5.0, batch_size=1)
        >>> row, column = torch.tensor([0]), torch.tensor([1])  # the second trained step of the first image
        >>> step, x = etude.replay(policy, table, trajectory, row, column, conditioning, 5.0, with_gradient=False)
        >>> torch.equal(step.log_prob(x), trajectory.log_prob[row, column])
        True
    """
    steps, levels = trajectory.step_index[columns], trajectory.level_index[columns]
    with nullcontext() if with_gradient else torch.no_grad():
        transition = denoise(
            policy, table, steps, trajectory.states[rows, levels], conditioning.take(rows), guidance_scale
        )
    # Only stochastic steps are trained.
    return replace(transition, stochastic=True), trajectory.states[rows, levels + 1]


@torch.no_grad()
def replay_log_prob(
    policy: Policy,
    table: StepTable,
    trajectory: Trajectory,
    batches: Sequence[tuple[Tensor, Tensor]],
    conditioning: Conditioning,
    guidance_scale: float,
    batch_size: Size | MicroBatch,
    reduction: str = "mean",
    on_step: Progress = lambda pairs: None,
) -> list[Tensor]:
    """Replaces the rollout's log-probabilities by those of a replay under the present weights.

    A second replay of the same pairs in the same micro-batches computes the same bits, with ratios
    of exactly 1, whatever the precision and the batches of sampling were. `batches` holds the rows
    and columns of each optimiser step. A pair in several steps gets its log-probability from the
    first of them. Returns the log ratios, log_prob - the rollout's log_prob, of each micro-batch, in
    no particular order.
    """
    log_ratios = []
    for rows, columns in reversed(batches):

        def score(at: slice, report: Progress, rows: Tensor = rows, columns: Tensor = columns) -> None:
            row, column = rows[at], columns[at]
            with torch.set_grad_enabled(policy.compiled):  # in the graph of the replay that follows
                transition, target = replay(
                    policy, table, trajectory, row, column, conditioning, guidance_scale, with_gradient=policy.compiled
                )
                log_prob = transition.log_prob(target, reduction).detach()
            log_ratios.append(log_prob - trajectory.log_prob[row, column])
            trajectory.log_prob[row, column] = log_prob
            if trajectory.mean is not None:
                trajectory.mean[row, column] = transition.mean.detach()
            report(len(row))

        MicroBatch.of(batch_size).run(len(rows), score, on_step)
    return log_ratios

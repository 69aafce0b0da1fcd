"""The optimiser steps of one iteration: replay, clipped policy gradient, gradients in micro-batches, one step of AdamW each.

The loss itself is `etude.learning.objectives`, the replay `etude.sampling.rollout`: here is only in which order, in how many pieces and with which
processes they are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from etude.batching import MicroBatch, Progress
from etude.config import TrainConfig
from etude.learning.draws import draw_pairs, own_pairs, split_samples
from etude.learning.loss_scale import LossScale
from etude.learning.objectives import PolicyLoss, UpdateStatistics, gaussian_kl, ppo_loss, reinforce_loss
from etude.policies import Conditioning, TrainablePolicy
from etude.policies.sharding import whole
from etude.sampling.noise import keyed_generator
from etude.sampling.plans import StepTable
from etude.sampling.replay import replay, score_again
from etude.sampling.rollout import Trajectory


@dataclass(frozen=True)
class Experience:
    """What an iteration learns from: this process's samples.

    Attributes:
        table: the plan they were made under.
        trajectory: their states and log-probabilities at the trained steps.
        conditioning: their prompts, encoded.
        advantages: `[n]`, on the policy's device.
    """

    table: StepTable
    trajectory: Trajectory
    conditioning: Conditioning
    advantages: Tensor


class PolicyUpdate:
    """Turns the experience of an iteration into optimiser steps.

    Args:
        config: of the run.
        policy: whose network is trained.
        accelerator: brings the gradients of all processes together.
        parameters: the trained ones.
        optimizer: as the accelerator wrapped it.
        loss_scale: for float16.
        micro_batches: the size of the replay's, halved where it does not fit.
        samples: this process's own of an iteration.
        rehearsals: how many micro-batches that are the first and the last of a step are tried before the processes depend on them.
        on_step: told of replayed pairs as they are done; a negative number takes back those of an attempt that failed.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: TrainablePolicy,
        accelerator: Accelerator,
        parameters: Iterable[nn.Parameter],
        optimizer: Any,
        loss_scale: LossScale,
        micro_batches: MicroBatch,
        samples: list[int],
        rehearsals: int,
        on_step: Progress,
    ) -> None:
        self.config, self.policy, self.accelerator = config, policy, accelerator
        self.parameters, self.optimizer, self.loss_scale = list(parameters), optimizer, loss_scale
        self.micro_batches, self.samples, self.rehearsals, self.on_step = micro_batches, samples, rehearsals, on_step

    @property
    def clip_range(self) -> float:
        """The PPO clip range on the ratio, from `clip_range` or from `clip_nats`."""
        objective = self.config.objective
        if objective.clip_range is not None:
            return objective.clip_range
        assert objective.clip_nats is not None
        return objective.clip_nats / (self.policy.dimensions if objective.logprob_reduction == "mean" else 1)

    def run(self, experience: Experience, iteration: int, after_step: Callable[[], None]) -> UpdateStatistics:
        """Takes all optimiser steps of an iteration, each with gradients of its own pairs; calls `after_step` after each."""
        objective, statistics = self.config.objective, UpdateStatistics()
        self.loss_scale.begin_iteration()
        pairs = self.pairs(len(experience.trajectory.steps), iteration)
        if objective.old_log_prob == "replay":
            statistics.rollout_ratio = self._score_again(experience, pairs)
        for rows, columns in pairs:
            statistics.extend(self._accumulate(experience, rows, columns))
            if objective.kind == "ppo" and not statistics.rollout_ratio:  # no weight has moved yet
                statistics.rollout_ratio = [part.ratio for part in statistics.policy]
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
            statistics.grad_norm.append(whole(torch.as_tensor(norm)).detach().to(self.policy.device))
            self.optimizer.step()
            self.optimizer.zero_grad()
            after_step()
        return statistics

    def pairs(self, num_steps: int, iteration: int) -> list[tuple[Tensor, Tensor]]:
        """This process's (sample, trained step) pairs of each optimiser step of the iteration: int64 `[m]` each, on the device."""
        objective, images = self.config.objective, self.config.rollout.images_per_iteration
        generator, pairs = keyed_generator(self.config.seed, "update", iteration), []
        for _ in range(objective.num_inner_epochs):
            for chunk in split_samples(images, objective.updates_per_epoch, generator):
                drawn = draw_pairs(chunk, num_steps, objective.timestep_fraction, generator)
                rows, columns = own_pairs(drawn, self.samples)
                pairs.append((rows.to(self.policy.device), columns.to(self.policy.device)))
        return pairs

    def _score_again(self, experience: Experience, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Holds the updates' ratios against the replay's own log-probabilities; returns by what ratios these differ from the rollout's."""
        objective = self.config.objective
        if objective.timestep_fraction == 1:  # then all passes train the same pairs
            pairs = pairs[: len(pairs) // objective.num_inner_epochs]
        return score_again(
            self.policy,
            experience.table,
            experience.trajectory,
            pairs,
            experience.conditioning,
            self.config.sampling.guidance_scale,
            self.micro_batches,
            objective.logprob_reduction,
            on_step=lambda scored: self.on_step(0),
        )

    def _accumulate(self, experience: Experience, rows: Tensor, columns: Tensor) -> UpdateStatistics:
        """Gradients of the mean loss over the pairs; all over again in smaller micro-batches if one does not fit into memory.

        All over again too under a smaller loss scale where float16 overflowed.
        """
        while True:
            self.loss_scale.begin_step(len(rows))
            seen = UpdateStatistics()
            backward = partial(self._backward, experience, rows, columns, seen)
            fits = self.micro_batches.fits(backward, min(self.micro_batches.size, len(rows)))
            if fits and self.loss_scale.take_back(self.parameters):
                return seen
            self._forget_gradients()
            self.on_step(-sum(len(part.ratio) for part in seen.policy))

    def _backward(self, experience: Experience, rows: Tensor, columns: Tensor, statistics: UpdateStatistics) -> None:
        """Adds the gradients micro-batch by micro-batch.

        Processes exchange them once an optimiser step, in its last micro-batch, when DeepSpeed takes the step, too. There they wait for one
        that had to halve, and none can go back: a micro-batch that is the last and the first is rehearsed.
        """
        size, total = self.micro_batches.size, torch.zeros((), device=self.policy.device)
        starts = range(0, len(rows), size)
        if self.rehearsals and len(starts) == 1:
            with self._exchange(False):
                self._differentiate(experience, rows, columns, 1.0)
            self._forget_gradients()
            self.rehearsals -= 1
        for start in starts:
            row, column = rows[start : start + size], columns[start : start + size]
            with self._exchange(start == starts[-1]):
                result, kl, weighted = self._differentiate(experience, row, column, len(row) / len(rows))
            total += weighted
            statistics.policy.append(result)
            if kl is not None:
                statistics.reference_kl.append(kl.detach())
            self.on_step(len(row))
        statistics.loss.append(total)

    def _exchange(self, now: bool) -> AbstractContextManager[Any]:
        """Inside, several processes bring their gradients together, where a size that does not fit is an error; or each keeps its own."""
        self.accelerator.sync_gradients = now
        if not now:
            apart: AbstractContextManager[Any] = self.accelerator.no_sync(self.policy.network)
            return apart
        return self.micro_batches.settled() if self.accelerator.num_processes > 1 else nullcontext()

    def _forget_gradients(self) -> None:
        self.accelerator.sync_gradients = True  # or the wrapped optimiser keeps them
        self.optimizer.zero_grad()

    def _differentiate(
        self, experience: Experience, rows: Tensor, columns: Tensor, share_of_step: float
    ) -> tuple[PolicyLoss, Tensor | None, Tensor]:
        """Adds the gradients of one micro-batch; returns its policy loss, its KL to the reference, and its part of the step's loss."""
        result, kl = self._loss(experience, rows, columns)
        loss = result.loss if kl is None else result.loss + self.config.objective.kl_coef * kl.mean()
        weighted = loss * share_of_step
        self.accelerator.backward(weighted * self.loss_scale.value)
        return replace(result, loss=result.loss.detach()), kl, weighted.detach()

    def _loss(self, experience: Experience, rows: Tensor, columns: Tensor) -> tuple[PolicyLoss, Tensor | None]:
        objective, trajectory, advantages = self.config.objective, experience.trajectory, experience.advantages[rows]
        transition, target = replay(
            self.policy,
            experience.table,
            trajectory,
            rows,
            columns,
            experience.conditioning,
            self.config.sampling.guidance_scale,
        )
        log_prob, reduction = transition.log_prob(target, objective.logprob_reduction), objective.logprob_reduction
        if objective.kind == "reinforce":
            result = reinforce_loss(log_prob, advantages, objective.adv_clip_max)
        else:
            old = trajectory.log_prob[rows, columns]
            result = ppo_loss(log_prob, old, advantages, self.clip_range, objective.adv_clip_max)
        if trajectory.reference_mean is None:
            return result, None
        return result, gaussian_kl(transition.mean, trajectory.reference_mean[rows, columns], transition.std, reduction)

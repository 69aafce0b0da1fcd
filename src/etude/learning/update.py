"""The optimiser steps of one iteration, each with gradients that are accumulated over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from etude.batching import MicroBatch, Progress
from etude.config import TrainConfig
from etude.errors import EtudeError
from etude.learning.draws import draw_pairs, own_pairs, split_samples
from etude.learning.exchange import gather
from etude.learning.first_backward import check_gradients, order_of_gradients
from etude.learning.loss_scale import LossScale
from etude.learning.metrics import COMMON, LARGEST_WEIGHT, Records, beyond_limit, compute_all, merge
from etude.learning.objectives import Objective, Samples
from etude.learning.objectives.policy_gradient import ROLLOUT_MISMATCH
from etude.policies import TrainablePolicy
from etude.policies.sharding import held_here, whole
from etude.sampling.noise import keyed_generator
from etude.undisturbed import undisturbed

Pairs = tuple[Tensor, Tensor]
"""Rows and columns of some (sample, column) pairs, int64 `[m]` each."""


@dataclass(eq=False)
class Learner:
    """Turns the samples of an iteration into optimiser steps.

    `optimizer` is wrapped by the accelerator. `indices` are the numbers of this process's samples.
    `on_step` is called with the number of pairs done; a negative number takes back those of a
    failed attempt. In a step of one micro-batch the exchange of gradients happens inside that
    micro-batch, so a process that runs out of memory there cannot repeat it: the first `rehearsals`
    such steps are tried alone before, to find the size that fits.
    """

    config: TrainConfig
    policy: TrainablePolicy
    objective: Objective
    accelerator: Accelerator
    parameters: Mapping[str, nn.Parameter]
    optimizer: Any
    micro_batches: MicroBatch
    indices: list[int]
    rehearsals: int
    on_step: Progress

    def __post_init__(self) -> None:
        dimensions = self.objective.averaged_dimensions(self.policy)
        self.loss_scale = LossScale(self.config.dtype == "float16", dimensions, self._everywhere)
        self.metrics = (*self.objective.metrics, *COMMON)
        self.images_per_row = size = self.config.rollout.images_per_prompt if self.objective.by_group else 1
        self.rows = [index // size for index in self.indices[::size]]
        self._first = True

    def update(self, samples: Samples, iteration: int, after_step: Callable[[], None]) -> dict[str, float]:
        """Takes all optimiser steps of an iteration; returns the metrics over all processes.

        The samples are this process's, with advantages. Raises EtudeError if training has diverged.
        """
        self.loss_scale.begin_iteration()
        steps = self.pairs(self.objective.columns(samples.table), iteration)
        distinct = steps
        if self.config.objective.timestep_fraction == 1:  # all passes train the same pairs
            distinct = steps[: len(steps) // self.config.objective.num_inner_epochs]
        with undisturbed(), self._exchange(False) if self.policy.compiled else nullcontext():
            records = self.objective.prepare(self.policy, samples, distinct, self.micro_batches, self.on_step)
        for number, (rows, columns) in enumerate(steps):
            taken = samples.trajectory.gradients is not None
            step_records = self._of_rollout(samples) if taken else self._accumulate(samples, rows, columns)
            _extend(records, step_records)
            if number == 0:  # no weight has moved yet
                with undisturbed():
                    _extend(records, self.objective.after_first_step(step_records))
            norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.optimizer.max_grad_norm)
            records.setdefault("grad_norm", []).append(whole(torch.as_tensor(norm)).detach().to(self.policy.device))
            self.optimizer.step()
            self.optimizer.zero_grad()
            with undisturbed():
                self.objective.after_step(self.parameters)
            after_step()
        with undisturbed():
            self.objective.after_iteration(self.parameters, iteration)
        return self._sound(compute_all(self.metrics, records), iteration)

    def _sound(self, numbers: dict[str, float], iteration: int) -> dict[str, float]:
        """The numbers to log, over all processes; an EtudeError if one exceeds its limit."""
        local = (held_here(p).detach() for p in self.parameters.values())
        numbers[LARGEST_WEIGHT.name] = float(torch.stack([p.abs().max().float() for p in local if p.numel()]).max())
        processes = self.accelerator.num_processes
        if processes > 1:
            columns = gather(
                self.accelerator, torch.tensor([list(numbers.values())], dtype=torch.float32), processes
            ).unbind(1)
            numbers = merge(self.metrics, dict(zip(numbers, columns, strict=True)))
        limit, mismatch = self.config.objective.mismatch_limit, numbers.get(ROLLOUT_MISMATCH.name)
        if limit is not None and mismatch is not None and not mismatch <= limit:
            raise EtudeError(
                f"the log-probabilities of rollout and replay differ by {mismatch:.3g} nats a step in iteration {iteration}, and "
                f"objective.mismatch_limit allows {limit:g}: leave rollout.dtype null or give it more digits, give both the same "
                "batch size, or raise the limit."
            )
        broken = beyond_limit(self.metrics, numbers)
        if broken is not None:
            half = ", or use bfloat16, which has the range of float32," if self.config.dtype == "float16" else ""
            raise EtudeError(
                f"training diverged in iteration {iteration}: the {broken.replace('_', ' ')} is {numbers[broken]}; "
                f"lower optimizer.learning_rate or the clip range{half} and start another run."
            )
        logged = {metric.name for metric in self.metrics if metric.logged}
        return {name: value for name, value in numbers.items() if name in logged}

    def _everywhere(self, answer: Tensor) -> Tensor:
        """Whether the answer is yes in every process."""
        processes = self.accelerator.num_processes
        return answer if processes == 1 else gather(self.accelerator, answer.reshape(1).float(), processes).bool().all()

    def pairs(self, num_columns: int, iteration: int) -> list[Pairs]:
        """This process's pairs of each optimiser step of an iteration, on the device."""
        objective, count = self.config.objective, self.config.rollout.images_per_iteration // self.images_per_row
        generator, pairs = keyed_generator(self.config.seed, "update", iteration), []
        for _ in range(objective.num_inner_epochs):
            for chunk in split_samples(count, objective.updates_per_epoch, generator):
                all_pairs = draw_pairs(chunk, num_columns, objective.timestep_fraction, generator)
                rows, columns = own_pairs(all_pairs, self.rows)
                pairs.append((rows.to(self.policy.device), columns.to(self.policy.device)))
        return pairs

    def _accumulate(self, samples: Samples, rows: Tensor, columns: Tensor) -> Records:
        """Accumulates the gradients of the mean loss over the pairs; returns the records."""
        while True:
            self.loss_scale.begin_step(len(rows))
            records: Records = {}
            done: list[int] = []
            backward = partial(self._backward, samples, rows, columns, records, done)
            with order_of_gradients(self.parameters if self._first else {}) as order:
                fits = self.micro_batches.fits(backward, min(self.micro_batches.size, len(rows)))
            if fits and self.loss_scale.take_back(self.parameters.values()):
                if self._first and bool(records["loss"][0].isfinite()):
                    check_gradients(self.parameters, order)
                self._first = False
                return records
            # Memory ran out, or float16 overflowed: compute all again in less, or at a smaller scale.
            self._forget_gradients()
            self.on_step(-sum(done))

    def _of_rollout(self, samples: Samples) -> Records:
        """Sets the gradients of an iteration's only step from those that the rollout took; returns the records."""
        trajectory, result = samples.trajectory, self.objective.at_ratio_one(samples, self.policy)
        assert trajectory.gradients is not None
        assert result is not None
        loss, slope = result
        # The slope by log-probability is that of the image's advantage, the same at each of its steps.
        for name, gradient in trajectory.gradients.weighted(slope[:, 0]).items():
            self.parameters[name].grad = gradient.to(self.parameters[name])
        if self._first:
            check_gradients(self.parameters, [*self.parameters][::-1])
            self._first = False
        self.on_step(slope.numel())
        return {**{name: [value] for name, value in loss.records.items()}, "loss": [loss.value]}

    def _backward(self, samples: Samples, rows: Tensor, columns: Tensor, records: Records, done: list[int]) -> None:
        """Adds the gradients by micro-batch; processes exchange them in the last one (see `rehearsals`)."""
        size, total = self.micro_batches.size, torch.zeros((), dtype=torch.float32, device=self.policy.device)
        starts = range(0, len(rows), size)
        if self.rehearsals and len(starts) == 1:
            with self._exchange(False):
                self._differentiate(samples, rows, columns, 1.0)
            self._forget_gradients()
            self.rehearsals -= 1
        for start in starts:
            row, column = rows[start : start + size], columns[start : start + size]
            with self._exchange(start == starts[-1]):
                parts, weighted = self._differentiate(samples, row, column, len(row) / len(rows))
            total += weighted
            _extend(records, {name: [value] for name, value in parts.items()})
            done.append(len(row))
            self.on_step(len(row))
        records["loss"] = [total]

    def _exchange(self, now: bool) -> AbstractContextManager[Any]:
        """Context in which the processes average their gradients (`now`), or each keeps its own."""
        self.accelerator.sync_gradients = now
        if not now:
            return self.accelerator.no_sync(self.policy.network)
        # During an exchange the micro-batch cannot be halved.
        return self.micro_batches.settled() if self.accelerator.num_processes > 1 else nullcontext()

    def _forget_gradients(self) -> None:
        self.accelerator.sync_gradients = True  # otherwise the wrapped optimiser keeps the gradients
        self.optimizer.zero_grad()

    def _differentiate(
        self, samples: Samples, rows: Tensor, columns: Tensor, share_of_step: float
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """Adds the gradients of one micro-batch; returns its records and its part of the step's loss."""
        with undisturbed():
            loss = self.objective.loss(self.policy, samples, rows, columns)
        weighted = loss.value * share_of_step
        with self.policy.attention.allowed(self.policy.device, self.policy.denoiser):
            self.accelerator.backward(weighted * self.loss_scale.value)
        return loss.records, weighted.detach()


def _extend(records: Records, more: Mapping[str, Iterable[Tensor]]) -> None:
    for name, values in more.items():
        records.setdefault(name, []).extend(values)

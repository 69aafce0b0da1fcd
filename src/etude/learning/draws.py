"""What is drawn in an iteration: prompts, the keys of the initial noise, and the order in which pairs are trained.

All of it is a function of the seed and the iteration, computed alike by every process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from etude.config import RolloutConfig
from etude.learning.exchange import share
from etude.prompts import PromptSet
from etude.sampling.noise import keyed_generator


@dataclass(frozen=True)
class Draw:
    """What is drawn in an iteration, and which part of it is this process's own.

    Attributes:
        prompts: the prompt of each sample of all processes.
        groups: the group of each, int64 `[images_per_iteration]`; groups are consecutive.
        indices: numbers of this process's own samples, the keys of the noise that their steps inject.
        noise_keys: keys of their initial noise.
        starts: number of starting states that each process computes (`most_starts`).
    """

    prompts: PromptSet
    groups: Tensor
    indices: list[int]
    noise_keys: list[int]
    starts: int

    @property
    def own(self) -> PromptSet:
        """The prompts of this process's own samples."""
        return self.prompts.select(self.indices)


def draw(
    prompts: PromptSet, rollout: RolloutConfig, seed: int, iteration: int, processes: int = 1, index: int = 0
) -> Draw:
    """The draw of an iteration, as process `index` of `processes` sees it."""
    shown, groups = draw_prompts(prompts, rollout, seed, iteration)
    indices = share(len(shown), processes, index)
    return Draw(shown, groups, indices, noise_keys(indices, rollout), most_starts(len(shown), rollout, processes))


def draw_prompts(prompts: PromptSet, rollout: RolloutConfig, seed: int, iteration: int) -> tuple[PromptSet, Tensor]:
    """The prompt of each sample of an iteration, and which group each belongs to: int64 `[images_per_iteration]`.

    Groups are consecutive. No prompt comes twice before every one has come once.
    """
    count = rollout.images_per_iteration // rollout.images_per_prompt
    generator = keyed_generator(seed, "prompts", iteration)
    chosen: list[int] = []
    while len(chosen) < count:
        chosen += generator.permutation(len(prompts)).tolist()
    groups = torch.arange(count).repeat_interleave(rollout.images_per_prompt)
    return prompts.select(chosen[group] for group in groups.tolist()), groups


def noise_keys(samples: list[int], rollout: RolloutConfig) -> list[int]:
    """The key of each sample's initial noise: its own, or with `shared_noise` that of its group's first sample."""
    size = rollout.images_per_prompt if rollout.shared_noise else 1
    return [sample - sample % size for sample in samples]


def most_starts(count: int, rollout: RolloutConfig, processes: int) -> int:
    """The most distinct beginnings that any process has among its samples of an iteration.

    Groups may be cut by the border between two processes, and then some have more of them than others. Every process computes this
    many, so that all call the network equally often, as collective calls must.
    """
    own = (noise_keys(share(count, processes, index), rollout) for index in range(processes))
    return max(len(set(keys)) for keys in own)


def split_samples(count: int, updates: int, generator: np.random.Generator) -> list[Tensor]:
    """Which samples 0..count - 1 each of the optimiser steps of a pass trains, in random order: int64, one tensor a step.

    Of every `updates` consecutive samples each step takes one. So whatever number of processes divides the samples among itself, each has
    equally many of every step's, and together they take the steps that one process takes alone.
    """
    updates = min(updates, count)
    step = np.zeros(count, dtype=np.int64)
    if updates > 1:
        runs = np.tile(np.arange(updates), (-(-count // updates), 1))
        step = generator.permuted(runs, axis=1).flatten()[:count]
    order = generator.permutation(count)
    return [torch.from_numpy(order[step[order] == k]) for k in range(updates)]


def own_pairs(pairs: tuple[Tensor, Tensor], samples: list[int]) -> tuple[Tensor, Tensor]:
    """Of (sample, trained step) pairs those of a process, whose consecutive `samples` it counts from 0."""
    rows, columns = pairs
    first = samples[0]
    own = (rows >= first) & (rows < first + len(samples))
    return rows[own] - first, columns[own]


def draw_pairs(
    samples: Tensor, num_steps: int, fraction: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """(sample, trained step) pairs of one optimiser step, step by step: int64 `[m]` each.

    Args:
        samples: int64 `[n]`.
        num_steps: trained steps of each.
        fraction: share of them that is drawn for each sample, at least one.
    """
    kept = max(1, round(fraction * num_steps))
    drawn = torch.from_numpy(generator.random((len(samples), num_steps)))
    columns = drawn.argsort(dim=1)[:, :kept].sort(dim=1).values
    rows = samples[:, None].expand_as(columns)
    return rows.T.flatten(), columns.T.flatten()

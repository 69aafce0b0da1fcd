"""The random choices of an iteration, functions of the seed and the iteration alone."""

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
    """The draw of an iteration, and the part of it that belongs to this process.

    Prompts and groups (int64 `[images_per_iteration]`, consecutive) are those of all processes;
    indices are the numbers of this process's own samples, which also key the noise of their steps.
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
    """The draw of an iteration for process `index` of `processes`."""
    batch, groups = draw_prompts(prompts, rollout, seed, iteration)
    indices = share(len(batch), processes, index)
    return Draw(batch, groups, indices, noise_keys(indices, rollout), most_starts(len(batch), rollout, processes))


def draw_prompts(prompts: PromptSet, rollout: RolloutConfig, seed: int, iteration: int) -> tuple[PromptSet, Tensor]:
    """The prompt and the group (int64 `[images_per_iteration]`) of each sample of an iteration.

    Groups are consecutive. No prompt comes a second time before every prompt has come once.
    """
    count = rollout.images_per_iteration // rollout.images_per_prompt
    generator = keyed_generator(seed, "prompts", iteration)
    chosen: list[int] = []
    while len(chosen) < count:
        chosen += generator.permutation(len(prompts)).tolist()
    groups = torch.arange(count).repeat_interleave(rollout.images_per_prompt)
    return prompts.select(chosen[group] for group in groups.tolist()), groups


def noise_keys(samples: list[int], rollout: RolloutConfig) -> list[int]:
    """The key of each sample's initial noise: its number, or with `shared_noise` its group's first."""
    size = rollout.images_per_prompt if rollout.shared_noise else 1
    return [sample - sample % size for sample in samples]


def most_starts(count: int, rollout: RolloutConfig, processes: int) -> int:
    """The largest number of distinct starting states that any process has in an iteration."""
    # The border between two processes may cut a group. Every process computes the largest number, so
    # that all call the network equally often, as collective calls require.
    own = (noise_keys(share(count, processes, index), rollout) for index in range(processes))
    return max(len(set(keys)) for keys in own)


def split_samples(count: int, updates: int, generator: np.random.Generator) -> list[Tensor]:
    """The samples of each optimiser step of a pass, in random order: an int64 tensor a step.

    Each step takes one of every `updates` consecutive samples. Therefore processes that share the
    samples have equally many in every step, and together take the same steps as one.
    """
    updates = min(updates, count)
    step = np.zeros(count, dtype=np.int64)
    if updates > 1:
        runs = np.tile(np.arange(updates), (-(-count // updates), 1))
        step = generator.permuted(runs, axis=1).flatten()[:count]
    order = generator.permutation(count)
    return [torch.from_numpy(order[step[order] == k]) for k in range(updates)]


def own_pairs(pairs: tuple[Tensor, Tensor], samples: list[int]) -> tuple[Tensor, Tensor]:
    """The (sample, trained step) pairs of a process, its consecutive `samples` counted from 0."""
    rows, columns = pairs
    first = samples[0]
    own = (rows >= first) & (rows < first + len(samples))
    return rows[own] - first, columns[own]


def draw_pairs(
    samples: Tensor, num_steps: int, fraction: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """(sample, trained step) pairs of one optimiser step, ordered by step: int64 `[m]` each.

    Each of the samples `[n]` gets its own draw of a fraction of the steps, at least one step.
    """
    count = max(1, round(fraction * num_steps))
    order = torch.from_numpy(generator.random((len(samples), num_steps))).argsort(dim=1)
    columns = order[:, :count].sort(dim=1).values
    rows = samples[:, None].expand_as(columns)
    return rows.T.flatten(), columns.T.flatten()

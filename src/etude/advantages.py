"""Advantages: how much better a reward is than what it is compared with, `A = (r - mean) / std`.

All statistics are population moments in float64, in two passes: the mean first, then the squares of the differences.
Equal rewards are found by comparing them, not by a small std, so they give advantage exactly 0 at any magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from etude.errors import EtudeError


def group_advantages(rewards: Tensor, groups: Tensor, global_std: bool = False) -> Tensor:
    """`A_i = (r_i - mean_g) / std_g` over the samples of the same group (GRPO, arXiv 2402.03300).

    Args:
        rewards: `[n]`, any real dtype.
        groups: integers `[n]`; samples with the same id are compared with each other.
        global_std: divide by the std of all `n` rewards instead, the mean still the group's (Flow-GRPO, arXiv
            2505.05470).

    Returns:
        float64 `[n]` on the device of `rewards`; exactly 0 for a group of equal rewards.

    Raises:
        EtudeError: shapes differ, or a reward is NaN or infinite.
    """
    values, index, count = _grouped(rewards, groups)
    mean = _scatter(values, index, count) / _sizes(values, index, count)
    centred = torch.where(_constant(values, index, count)[index], 0.0, values - mean[index])
    if global_std:
        return centred / _safe(_batch_moments(values)[1])
    variance = _scatter(centred.square(), index, count) / _sizes(values, index, count)
    return centred / _safe(variance.sqrt())[index]


def zero_std_ratio(rewards: Tensor, groups: Tensor) -> float:
    """The share of groups whose rewards are all equal: they teach nothing. In [0, 1]."""
    values, index, count = _grouped(rewards, groups)
    return float(_constant(values, index, count).double().mean())


def combine(advantages: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """`A = sum_k w_k A_k` of advantages `[n]` that were normalised for each reward on its own; float64 `[n]`.

    Raises:
        EtudeError: the two do not name the same rewards, or there is none.
    """
    if not weights or advantages.keys() != weights.keys():
        raise EtudeError(
            f"advantages of {sorted(advantages)} cannot be combined with weights for {sorted(weights)}: "
            "give exactly one weight for each reward."
        )
    return torch.stack([weight * advantages[name].double() for name, weight in weights.items()]).sum(dim=0)


class PromptStatistics:
    """DDPO's per-prompt tracking (Black et al. 2023, arXiv 2305.13301): each prompt remembers its last rewards.

    Args:
        buffer_size: rewards remembered for each prompt.
        min_count: a prompt with fewer remembered rewards is compared with the whole batch.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        if buffer_size < 1 or min_count < 1:
            raise EtudeError(f"buffer_size = {buffer_size} and min_count = {min_count} must be at least 1.")
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._buffers: dict[str, list[float]] = {}

    def advantages(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """Remembers the whole batch, then `A_i = (r_i - mean) / std` of the buffer of prompt `i`, or of the batch.

        Equal rewards in a buffer give exactly 0. The order of the batch matters only where a prompt has more than
        `buffer_size` rewards in it: the last ones stay.

        Args:
            prompts: `n` prompts, repeats allowed.
            rewards: `[n]`, in the same order, over all processes.

        Returns:
            float64 `[n]` on the device of `rewards`.

        Raises:
            EtudeError: lengths differ, or a reward is NaN or infinite.
        """
        values = _finite(rewards)
        if len(prompts) != values.numel():
            raise EtudeError(f"{len(prompts)} prompts came with {values.numel()} rewards: give one for each prompt.")
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            buffer = [*self._buffers.get(prompt, []), value]
            self._buffers[prompt] = buffer[-self.buffer_size :]
        batch = _batch_moments(values)
        moments = {prompt: self._moments(prompt, batch) for prompt in dict.fromkeys(prompts)}
        mean = torch.stack([moments[prompt][0] for prompt in prompts])
        std = torch.stack([moments[prompt][1] for prompt in prompts])
        centred = torch.where(std == 0, 0.0, values.cpu() - mean)
        return (centred / _safe(std)).to(rewards.device)

    def _moments(self, prompt: str, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        buffer = self._buffers[prompt]
        return batch if len(buffer) < self.min_count else _batch_moments(torch.tensor(buffer, dtype=torch.float64))

    def state(self) -> dict[str, Any]:
        """The buffers as plain values; JSON keeps them exactly, because Python writes the shortest text of a double."""
        return {prompt: list(buffer) for prompt, buffer in self._buffers.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` gave; replaces the current buffers."""
        self._buffers = {prompt: [float(value) for value in buffer] for prompt, buffer in state.items()}


def _finite(rewards: Tensor) -> Tensor:
    if rewards.ndim != 1 or rewards.numel() == 0:
        raise EtudeError(f"rewards must be a tensor [n] with n of at least 1, not of shape {list(rewards.shape)}.")
    values = rewards.detach().double()
    bad = torch.nonzero(~torch.isfinite(values)).flatten()
    if bad.numel():
        first = int(bad[0])
        raise EtudeError(
            f"reward of sample {first} is {float(values[first])}, which cannot be compared: "
            "a reward must be finite for every image."
        )
    return values


def _grouped(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, int]:
    values = _finite(rewards)
    if groups.shape != rewards.shape:
        raise EtudeError(f"groups of shape {list(groups.shape)} do not match rewards of shape {list(rewards.shape)}.")
    ids, index = torch.unique(groups.to(values.device), return_inverse=True)
    return values, index, ids.numel()


def _scatter(values: Tensor, index: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, index, values)


def _sizes(values: Tensor, index: Tensor, count: int) -> Tensor:
    return _scatter(torch.ones_like(values), index, count)


def _constant(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Bool `[groups]`: whether all rewards of a group are the same number."""
    low = values.new_zeros(count).scatter_reduce(0, index, values, "amin", include_self=False)
    high = values.new_zeros(count).scatter_reduce(0, index, values, "amax", include_self=False)
    return low == high


def _batch_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std on the CPU; equal values give themselves and exactly 0."""
    values = values.cpu()
    if bool((values == values[0]).all()):
        return values[0], values.new_zeros(())
    mean = values.mean()
    return mean, (values - mean).square().mean().sqrt()


def _safe(std: Tensor) -> Tensor:
    """A divisor that is never 0, for numerators that are 0 where `std` is."""
    return torch.where(std > 0, std, 1.0)

"""Advantages: rewards in standard deviations above a mean of comparison, `A = (r - mean) / std`.

All statistics are population moments in float64. The last bits of a network's rewards depend on the
batch that they were computed in. Rewards therefore count as equal, with advantage exactly 0, if
their std is at most EQUAL = 1e-6 (8 units of float32's last place) times the largest magnitude
among them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from etude.config import TrainConfig
from etude.errors import EtudeError
from etude.registry import ADVANTAGES

EQUAL = 8 * torch.finfo(torch.float32).eps
"""Largest std of equal rewards, relative to their magnitude. Also the largest sum of advantages of
order 1 that counts as cancelled."""


class Advantage(ABC):
    """The comparison that turns the rewards of an iteration into advantages, `A = sum_k w_k A_k`.

    Each reward is normalised on its own. The title is the published name of an algorithm with this
    comparison; an objective or a window with such a name comes first.
    """

    title: ClassVar[str] = ""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights

    @classmethod
    def from_config(cls, config: TrainConfig) -> Advantage:
        """The advantage of a configuration. Default: calls `cls(weights, **advantage.options)`."""
        try:
            return cls(config.rewards, **config.advantage.options)
        except TypeError as error:
            raise EtudeError(f"advantage.options do not fit {cls.__name__}: {error}.") from error

    def __call__(self, scores: Mapping[str, Tensor], prompts: list[str], groups: Tensor) -> Tensor:
        """Advantages, float64 `[n]`, over the samples of all processes.

        They come from the scores `[n]` by reward, and each sample's prompt and group `[n]`; samples
        of one group have the same prompt.
        """
        return combine({name: self.normalise(name, scores[name], prompts, groups) for name in scores}, self.weights)

    @abstractmethod
    def normalise(self, name: str, rewards: Tensor, prompts: list[str], groups: Tensor) -> Tensor:
        """`A = (r - mean) / std` of one reward, float64 `[n]`."""

    def state(self) -> dict[str, Any]:
        """Memory of the comparison for a checkpoint, as plain values. Default: empty."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - a hook
        """Restores the result of `state`."""


def make_advantage(config: TrainConfig) -> Advantage:
    """The advantage of a configuration."""
    kind = ADVANTAGES.get(config.advantage.kind)
    if not (isinstance(kind, type) and issubclass(kind, Advantage)):
        raise EtudeError(f"advantage.kind = {config.advantage.kind} is {kind!r}: give {ADVANTAGES.wanted}.")
    return kind.from_config(config)


class Group(Advantage):
    """Rewards compared within their group of at least two images: `group_advantages`."""

    global_std: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: TrainConfig) -> Advantage:
        if config.rollout.images_per_prompt < 2:
            raise EtudeError(
                f"advantage.kind = {config.advantage.kind} needs rollout.images_per_prompt of at least 2, not "
                f"{config.rollout.images_per_prompt}: a group of one image has nothing to be compared with."
            )
        return super().from_config(config)

    def normalise(self, name: str, rewards: Tensor, prompts: list[str], groups: Tensor) -> Tensor:
        return group_advantages(rewards, groups, self.global_std)


class GroupMeanGlobalStd(Group):
    """The group's mean, and the std of all rewards of the iteration (Flow-GRPO, arXiv 2505.05470)."""

    global_std = True


class PerPrompt(Advantage):
    """Rewards compared with the past rewards of their prompt: `PromptStatistics`, one for each reward."""

    def __init__(self, weights: Mapping[str, float], buffer_size: int = 16, min_count: int = 16) -> None:
        super().__init__(weights)
        self.statistics = {name: PromptStatistics(buffer_size, min_count) for name in weights}

    @classmethod
    def from_config(cls, config: TrainConfig) -> PerPrompt:
        return cls(config.rewards, config.advantage.buffer_size, config.advantage.min_count)

    def normalise(self, name: str, rewards: Tensor, prompts: list[str], groups: Tensor) -> Tensor:
        return self.statistics[name].advantages(prompts, rewards)

    def state(self) -> dict[str, Any]:
        return {name: statistics.state() for name, statistics in self.statistics.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, statistics in self.statistics.items():
            statistics.load_state(state[name])


def group_advantages(rewards: Tensor, groups: Tensor, global_std: bool = False) -> Tensor:
    """`A_i = (r_i - mean_g) / std_g` over the samples of the same group (GRPO, arXiv 2402.03300).

    Rewards of any real dtype and integer groups, both `[n]`, give float64 `[n]` on the device of
    the rewards: exactly 0 in a group of equal rewards (see the module). With `global_std` the std
    is that of all `n` rewards, and the mean still the group's (Flow-GRPO, arXiv 2505.05470). Raises
    EtudeError if shapes differ, or a reward is NaN or infinite.
    """
    values, index, count = _grouped(rewards, groups)
    mean, std = (moment[index] for moment in _moments(values, index, count))
    centred = torch.where(std == 0, 0.0, values - mean)
    return _quotient(centred, _batch_moments(values)[1] if global_std else std)


def zero_std_ratio(rewards: Tensor, groups: Tensor, advantages: Tensor | None = None) -> float:
    """The share of groups, in [0, 1], that teach nothing: all rewards equal, or all advantages 0.

    Rewards `[n]` are the weighted sum of several. Advantages `[n]`, combined over them, may cancel
    although the rewards of a group differ. Default: the rewards alone decide.
    """
    values, index, count = _grouped(rewards, groups)
    idle = _moments(values, index, count)[1] == 0
    if advantages is not None:
        largest = values.new_zeros(count).scatter_reduce(0, index, advantages.to(values).abs(), "amax")
        idle |= largest <= EQUAL
    return float(idle.double().mean())


def combine(advantages: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """`A = sum_k w_k A_k`, float64 `[n]`, of advantages `[n]` with exactly one weight for each reward."""
    if not weights or advantages.keys() != weights.keys():
        raise EtudeError(
            f"advantages of {sorted(advantages)} cannot be combined with weights for {sorted(weights)}: "
            "give exactly one weight for each reward."
        )
    return torch.stack([weight * advantages[name].double() for name, weight in weights.items()]).sum(dim=0)


class PromptStatistics:
    """DDPO's per-prompt tracking (arXiv 2305.13301): each prompt remembers its last `buffer_size` rewards.

    A prompt with fewer than `min_count` of them is compared with the whole batch.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        if buffer_size < 1 or min_count < 1:
            raise EtudeError(f"buffer_size = {buffer_size} and min_count = {min_count} must be at least 1.")
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._buffers: dict[str, list[float]] = {}

    def advantages(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """Remembers the batch, then compares each reward with its prompt's buffer, or with the batch.

        `A_i = (r_i - mean) / std`, float64 `[n]` on the device of the rewards, with the moments of
        that buffer or batch. The rewards are those of all processes. Their order matters only for a
        prompt with more than `buffer_size` of them: the last ones stay. Raises EtudeError if
        lengths differ, or a reward is NaN or infinite.
        """
        values = _finite(rewards)
        if len(prompts) != values.numel():
            raise EtudeError(f"{len(prompts)} prompts came with {values.numel()} rewards: give one for each prompt.")
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            buffer = [*self._buffers.get(prompt, []), value]
            self._buffers[prompt] = buffer[-self.buffer_size :]
        moments = dict.fromkeys(prompts, _batch_moments(values))
        for prompt in moments:
            if len(self._buffers[prompt]) >= self.min_count:
                moments[prompt] = _batch_moments(torch.tensor(self._buffers[prompt], dtype=torch.float64))
        mean, std = (torch.stack([moments[prompt][k] for prompt in prompts]) for k in (0, 1))
        return _quotient(values.cpu() - mean, std).to(rewards.device)

    def state(self) -> dict[str, Any]:
        """The buffers as plain values, which JSON keeps exactly."""
        return {prompt: list(buffer) for prompt, buffer in self._buffers.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Replaces the buffers by the result of `state`."""
        self._buffers = {prompt: [float(value) for value in buffer] for prompt, buffer in state.items()}


def _finite(rewards: Tensor) -> Tensor:
    if rewards.ndim != 1 or rewards.numel() == 0:
        raise EtudeError(f"rewards must be a tensor [n] with n of at least 1, not of shape {list(rewards.shape)}.")
    values = rewards.detach().double()
    bad = torch.nonzero(~torch.isfinite(values)).flatten()
    if bad.numel():
        first = int(bad[0])
        raise EtudeError(
            f"reward of sample {first} is {float(values[first])}, which cannot be compared: a reward must be finite for every image."
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


def _moments(values: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and population std of each group `[groups]`; the std of equal values is exactly 0."""
    sizes = _scatter(torch.ones_like(values), index, count)
    mean = _scatter(values, index, count) / sizes
    std = (_scatter((values - mean[index]).square(), index, count) / sizes).sqrt()
    largest = values.new_zeros(count).scatter_reduce(0, index, values.abs(), "amax")
    return mean, torch.where(std <= EQUAL * largest, 0.0, std)


def _batch_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std of all values, on the CPU."""
    values = values.cpu()
    mean, std = _moments(values, torch.zeros(len(values), dtype=torch.int64), 1)
    return mean[0], std[0]


def _quotient(centred: Tensor, std: Tensor) -> Tensor:
    """The numbers in units of the std, and exactly 0 where the std is 0."""
    return torch.where(std == 0, 0.0, centred / torch.where(std == 0, 1.0, std))

"""The place of MixGRPO's window of stochastic, trained steps in each iteration (arXiv 2507.21802).

    progressive   stays for `iters_per_shift` iterations at each place, then moves on by `stride`
    decay         stays for round(iters_per_shift exp(-k max(0, l - l0))) iterations at left edge l
    random        draws its left edge uniformly in every iteration
    fixed         never moves

A window holds only steps that the sampler can make stochastic (`trainable_range`): neither the step
out of pure noise nor the step into clean data. At its last place it ends with the last such step,
also where the stride does not divide the distance. The place is a function of the iteration alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from etude.errors import EtudeError, unknown
from etude.registry import WINDOWS

if TYPE_CHECKING:
    from etude.sampling.plans import StepTable


@dataclass(frozen=True)
class WindowSchedule(ABC):
    """The window by iteration: `size` steps from `start_at(iteration)` on.

    A strategy is a frozen dataclass with `start_at`; its fields are what a recipe may set. The
    steps that can be trained are `start .. stop - 1` (`trainable_range`); a window that does not
    fit them is an EtudeError. Strategies that draw use the run's seed.
    """

    stop: int
    start: int = 0
    size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.start < 0 or self.start + self.size > self.stop:
            raise EtudeError(
                f"a window of size {self.size} does not fit in steps {self.start} to {self.stop - 1}, those that can "
                "be trained: lower window.size (to at least 1), or raise num_steps."
            )

    @abstractmethod
    def start_at(self, iteration: int) -> int:
        """The left edge in an iteration: from `start` to `stop - size`. Iterations count from 1."""


@dataclass(frozen=True)
class FixedWindow(WindowSchedule):
    """A window that never moves."""

    def start_at(self, iteration: int) -> int:
        return self.start


@dataclass(frozen=True)
class RandomWindow(WindowSchedule):
    """A window with a uniform left edge in every iteration, keyed by seed and iteration."""

    def start_at(self, iteration: int) -> int:
        from etude.sampling.noise import keyed_generator

        places = range(self.start, self.stop - self.size + 1)
        return places[int(keyed_generator(self.seed, "window", iteration).integers(len(places)))]


@dataclass(frozen=True)
class ProgressiveWindow(WindowSchedule):
    """A window that stays for `iters_per_shift` iterations at a place, then moves by `stride`.

    The stride is at most `size`, so that no step is passed over. After its last place the window
    begins again (`roll_back`) or stays there.
    """

    iters_per_shift: int = 25
    stride: int = 1
    roll_back: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iters_per_shift < 1:
            raise EtudeError(f"iters_per_shift = {self.iters_per_shift}: the window stays for at least 1 iteration.")
        if not 1 <= self.stride <= self.size:
            raise EtudeError(
                f"a window of size {self.size} that moves by stride = {self.stride} would pass over steps and never "
                f"train them: give a stride from 1 to {self.size}."
            )

    @property
    def places(self) -> tuple[int, ...]:
        """The left edges in the order of the visits."""
        last = self.stop - self.size
        return tuple(dict.fromkeys((*range(self.start, last, self.stride), last)))

    def dwell(self, place: int) -> int:
        """Number of iterations that the window stays at a left edge."""
        return self.iters_per_shift

    def start_at(self, iteration: int) -> int:
        dwells = [self.dwell(place) for place in self.places]
        offset = (iteration - 1) % sum(dwells) if self.roll_back else iteration - 1
        for place, dwell in zip(self.places, dwells, strict=True):
            if offset < dwell:
                return place
            offset -= dwell
        return self.places[-1]


@dataclass(frozen=True)
class DecayWindow(ProgressiveWindow):
    """A progressive window whose stays become shorter as it moves on.

        dwell(l) = max(1, round(iters_per_shift exp(-decay_rate max(0, l - decay_threshold))))

    The rate is at least 0. The default threshold is meant for 25 steps.
    """

    decay_rate: float = 0.1
    decay_threshold: int = 13

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay_rate < math.inf:
            raise EtudeError(f"decay_rate = {self.decay_rate}: give a number of at least 0.")

    def dwell(self, place: int) -> int:
        beyond = max(0, place - self.decay_threshold)
        return max(1, round(self.iters_per_shift * math.exp(-self.decay_rate * beyond)))


def make_window(strategy: str, settings: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> WindowSchedule:
    """The window of a strategy: a name in `WINDOWS`, or `module:Class`.

    Args:
        settings: values that the built-in strategies share, of which a strategy takes those it has fields for.
        options: values for fields of its own; one that it lacks is an EtudeError.
    """
    kind = WINDOWS.get(strategy)
    if not (isinstance(kind, type) and issubclass(kind, WindowSchedule)):
        raise EtudeError(f"window strategy '{strategy}' is {kind!r}: give {WINDOWS.wanted}.")
    names = [field.name for field in fields(kind)]
    for name in options or {}:
        if name not in names:
            raise unknown("key of sampling.window.options", name, names)
    try:
        return kind(**{name: value for name, value in {**settings, **(options or {})}.items() if name in names})
    except TypeError as error:
        raise EtudeError(f"sampling.window does not fit the strategy '{strategy}': {error}.") from error


def trainable_range(table: StepTable) -> range:
    """The steps that a window can train, from the table of the plan that trains all (`SamplingPlan.sde`)."""
    steps = table.trained_steps
    if not steps:
        raise EtudeError(f"none of the {table.num_steps} sampling steps is stochastic: raise eta, or take more steps.")
    trainable = range(steps[0], steps[-1] + 1)
    if len(trainable) != len(steps):
        gap = min(set(trainable) - set(steps))
        raise EtudeError(
            f"step {gap} is deterministic between stochastic ones, so no window can pass it: raise eta there."
        )
    return trainable

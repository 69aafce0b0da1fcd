"""Where MixGRPO's window of stochastic, trained steps is in each iteration (arXiv 2507.21802).

    progressive   it stays for `iters_per_shift` iterations at each place, then moves on by `stride`
    decay         the same, but it stays for round(iters_per_shift exp(-k max(0, l - l0))) iterations at left edge l
    random        its left edge is drawn uniformly in every iteration
    fixed         it never moves

Only steps that the sampler can make stochastic are counted, so that no part of a window is lost on a step that has no
log-probability (the one out of pure noise, the one into clean data): `trainable_range` finds them. The window is always full:
its last place ends with the last of these steps, also where the stride does not divide the way. From there it goes back to the
first one (`roll_back`) or stays.

The place is a function of the iteration alone: all processes agree on it, and so does a run that was resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from etude.errors import EtudeError, unknown
from etude.sampling.noise import keyed_generator
from etude.sampling.plans import StepTable

STRATEGIES = ("progressive", "random", "decay", "fixed")


@dataclass(frozen=True)
class WindowSchedule:
    """The window's left edge by iteration; the window is the steps `start_at(i) .. start_at(i) + size - 1`.

    Attributes:
        strategy: "progressive", "random", "decay" or "fixed".
        num_steps: where the trainable steps end (`trainable_range(table).stop`).
        start: the first of them (`.start`), and the left edge of the first window; of every window if fixed.
        size: steps in the window.
        iters_per_shift: iterations between two moves (progressive), or up to the threshold (decay).
        stride: steps that it moves by; more than `size` would leave steps out, which is an error.
        roll_back: after the last place, begin again; False: stay there.
        seed: of the random strategy.
        decay_rate: k, per step, at least 0.
        decay_threshold: l0, the left edge from which on the dwell shrinks; the default is meant for 25 steps.

    Raises:
        EtudeError: for an unknown strategy, a window that does not fit, or numbers that make no schedule.
    """

    strategy: str
    num_steps: int
    start: int = 0
    size: int = 4
    iters_per_shift: int = 25
    stride: int = 1
    roll_back: bool = True
    seed: int = 0
    decay_rate: float = 0.1
    decay_threshold: int = 13

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise unknown("window strategy", self.strategy, STRATEGIES)
        if self.size < 1 or self.start < 0 or self.start + self.size > self.num_steps:
            raise EtudeError(
                f"a window of {self.size} steps does not fit the steps {self.start} to {self.num_steps - 1} that can be "
                "trained: make it smaller (at least 1), or take more sampling steps."
            )
        if self.iters_per_shift < 1:
            raise EtudeError(f"iters_per_shift = {self.iters_per_shift}: the window stays for at least 1 iteration.")
        if not 1 <= self.stride <= self.size:
            raise EtudeError(
                f"a window of {self.size} steps that moves by {self.stride} would never train the steps between two "
                f"places: give a stride from 1 to {self.size}."
            )
        if not 0 <= self.decay_rate < math.inf:
            raise EtudeError(f"decay_rate = {self.decay_rate}: give a number of at least 0.")

    @property
    def places(self) -> tuple[int, ...]:
        """The left edges in the order of the visits; any of them for the random strategy."""
        last = self.num_steps - self.size
        if self.strategy == "fixed":
            return (self.start,)
        if self.strategy == "random":
            return tuple(range(self.start, last + 1))
        return tuple(dict.fromkeys((*range(self.start, last, self.stride), last)))

    def dwell(self, place: int) -> int:
        """For how many iterations a progressive or decaying window stays at a left edge: at least 1."""
        if self.strategy != "decay":
            return self.iters_per_shift
        beyond = max(0, place - self.decay_threshold)
        return max(1, round(self.iters_per_shift * math.exp(-self.decay_rate * beyond)))

    def start_at(self, iteration: int) -> int:
        """The left edge in an iteration; the first one is iteration 1.

        Raises:
            EtudeError: for an iteration before the first.
        """
        if iteration < 1:
            raise EtudeError(f"iteration {iteration} has no window: training counts its iterations from 1.")
        if self.strategy == "random":
            generator = keyed_generator(self.seed, "window", iteration)
            return self.places[int(generator.integers(len(self.places)))]
        dwells = [self.dwell(place) for place in self.places]
        into = iteration - 1
        if self.roll_back:
            into %= sum(dwells)
        for place, dwell in zip(self.places, dwells, strict=True):
            if into < dwell:
                return place
            into -= dwell
        return self.places[-1]


def trainable_range(table: StepTable) -> range:
    """The steps a window can train, from the table of the plan that would train all of them (`SamplingPlan.sde`).

    Raises:
        EtudeError: if there is none, or a deterministic step lies between them.
    """
    steps = table.trained_steps
    if not steps:
        raise EtudeError(f"none of the {table.num_steps} sampling steps is stochastic: raise eta, or take more steps.")
    found = range(steps[0], steps[-1] + 1)
    if len(found) != len(steps):
        gap = min(set(found) - set(steps))
        raise EtudeError(
            f"step {gap} is deterministic between stochastic ones, so no window can pass it: raise eta there."
        )
    return found

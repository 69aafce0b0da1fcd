"""Etas: the stochasticity of each step in each iteration.

An eta is one number for all steps, a list over the steps, or a schedule from one number to another:

    eta(x) = eta + w(x) (end - eta)

with w(x) = x (linear), (1 - cos(pi x)) / 2 (cosine) or 0 (constant). Over iterations, x = (k - 1) /
(K - 1) in iteration k of K, and all steps have that eta. Over steps, x = i / (N - 1) at step i of
N, the same in every iteration. Both ends are reached exactly. A schedule with two equal ends is
that number, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Eta = float | Sequence[float]
"""One eta for all steps, or one for each."""


@dataclass(frozen=True)
class Etas:
    """The etas of a run of K iterations, a function of the iteration alone: all processes agree.

    The schedule goes from `first` to `last`; a tuple `first` is the list over the steps, which has
    no schedule. It is of kind "constant", "linear" or "cosine", over "iterations" or "steps".
    """

    first: float | tuple[float, ...]
    last: float = 0.0
    kind: str = "constant"
    over: str = "iterations"
    iterations: int = 1

    def at(self, iteration: int, num_steps: int) -> tuple[float, ...]:
        """The eta of each step in an iteration, from 1 on; 0, the base model's evaluation, has those of 1."""
        if isinstance(self.first, tuple):
            return self.first
        if self.over == "steps":
            return tuple(self._along(i, num_steps) for i in range(num_steps))
        return (self._along(max(iteration, 1) - 1, self.iterations),) * num_steps

    @property
    def extremes(self) -> tuple[int, ...]:
        """The iterations of the smallest and largest eta: a plan legal in these is legal in all."""
        moves = self.kind != "constant" and self.over == "iterations" and not isinstance(self.first, tuple)
        return (1, self.iterations) if moves else (1,)

    def _along(self, place: int, count: int) -> float:
        assert isinstance(self.first, float)
        x = place / (count - 1) if count > 1 else 0.0
        share = {"constant": 0.0, "linear": x, "cosine": (1 - math.cos(math.pi * x)) / 2}[self.kind]
        return self.last if share == 1 else self.first + share * (self.last - self.first)


def compact(etas: Sequence[float]) -> float | list[float]:
    """The number that all steps share, or the list."""
    return etas[0] if len(set(etas)) == 1 else list(etas)


def eta_text(eta: Eta) -> str:
    """`1.2`, or `1.5 to 0.2 by step` where the steps differ."""
    return f"{eta:g}" if isinstance(eta, int | float) else f"{eta[0]:g} to {eta[-1]:g} by step"


def setting_text(eta: Eta, schedule: Mapping[str, Any] | None) -> str:
    """The eta of a configuration in words: `1.2`, or `1.2 to 0.5 over iterations (cosine)`."""
    if schedule is None or schedule["kind"] == "constant":
        return eta_text(eta)
    return f"{eta_text(eta)} to {schedule['end']:g} over {schedule['over']} ({schedule['kind']})"

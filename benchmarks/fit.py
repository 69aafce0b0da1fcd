"""A line through points, by least squares; standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A line `y = intercept + slope x`, and R2, the share of the variance of y that it explains."""

    intercept: float
    slope: float
    r2: float

    def __call__(self, x: float) -> float:
        return self.intercept + self.slope * x


def line(x: Sequence[float], y: Sequence[float], weights: Sequence[float] | None = None) -> Line:
    """The line of least squares: slope = cov(x, y) / var(x), through the means.

    Args:
        x: abscissas.
        y: ordinates.
        weights: weights of the points. Default: equal.

    Raises:
        ValueError: there are fewer than two different x.
    """
    if len(set(x)) < 2:
        raise ValueError(f"a line needs two different x at least, not {list(x)}.")
    w = weights or [1.0] * len(x)
    centre_x, centre_y = (sum(a * b for a, b in zip(w, v, strict=True)) / sum(w) for v in (x, y))
    variance = sum(c * (a - centre_x) ** 2 for a, c in zip(x, w, strict=True))
    slope = sum(c * (a - centre_x) * (b - centre_y) for a, b, c in zip(x, y, w, strict=True)) / variance
    spread = sum(c * (b - centre_y) ** 2 for b, c in zip(y, w, strict=True))
    left = sum(c * (b - centre_y - slope * (a - centre_x)) ** 2 for a, b, c in zip(x, y, w, strict=True))
    return Line(centre_y - slope * centre_x, slope, 1 - left / spread if spread else 1.0)

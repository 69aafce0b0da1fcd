"""Means with honest intervals: images of one prompt are not independent, so prompts are resampled.

For n values x_i in G clusters (prompts) of sizes n_g,

    mean            m  = sum_i x_i / n
    standard error  se = sqrt(G / (G - 1) * sum_g u_g^2) / n,   u_g = sum_{i in g} (x_i - m)
    bootstrap       m* = sum_j S_{g_j} / sum_j n_{g_j},          g_1..g_G drawn with replacement, S_g = sum_{i in g} x_i

With one sample in each cluster, se is the usual s / sqrt(n). The interval takes quantiles of m*, at
levels widened for few clusters: the expanded percentile interval of Hesterberg (arXiv 1411.5279).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from etude.errors import EtudeError

RESAMPLES = 10_000
_BLOCK = 2_000_000  # indices drawn at a time: bounds the memory, whatever the number of clusters

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval from `low` to `high`.

    Attributes:
        standard_error: standard error of the mean, robust to clusters.
        n: number of values.
        clusters: number of distinct prompts.
        clustered: whether prompts were resampled. False where there is one prompt only: then values
            were resampled.

    Example:
        >>> import etude
        >>> gap = etude.Estimate(1.27, 0.12, low=1.02, high=1.51, n=64, clusters=16, clustered=True)
        >>> print(gap)
        +1.27 [+1.02, +1.51]
    """

    mean: float
    standard_error: float
    low: float
    high: float
    n: int
    clusters: int
    clustered: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Estimate:
        """Rebuild an estimate from the values of `to_dict`."""
        return cls(**values)

    def __str__(self) -> str:
        return self.format()

    def format(self, signed: bool = True) -> str:
        """`+1.27 [+1.02, +1.51]`; `signed=False` leaves out the plus signs."""
        return format_interval(self.mean, self.low, self.high, signed)


def estimate_mean(
    values: ArrayLike, clusters: Sequence[Any] | NDArray[Any], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Estimate a mean with its cluster-robust standard error and 95 % interval.

    Args:
        values: `[n]`, one for each image, or for each pair of images from the same prompt and noise
            their difference. All zeros give exactly 0 [0, 0].
        clusters: `[n]`, the prompt of each value, as integers or strings.
        seed: seed of the resampling.
        resamples: number of bootstrap draws.

    Raises:
        EtudeError: for fewer than 2 values, a value that is not finite, or another number of
            clusters than of values.
    """
    x, group = _checked(values, clusters)
    prompts = int(group.max()) + 1
    if prompts == 1:
        group = np.arange(len(x))
    origin = x[0]  # equal values then have exactly their value as mean, and an interval of no width
    x = x - origin
    mean, sizes = x.mean(), np.bincount(group)
    count, residuals = len(sizes), np.bincount(group, weights=x - mean)
    error = math.sqrt(count / (count - 1) * float(residuals @ residuals)) / len(x)
    sums = np.asarray(np.bincount(group, weights=x), dtype=np.float64)
    means, tail = _bootstrap(sums, sizes, resamples, np.random.default_rng(seed)), _tail(count)
    low, high = (float(origin + end) for end in np.quantile(means, [tail, 1 - tail]))
    return Estimate(float(origin + mean), error, low, high, n=len(x), clusters=prompts, clustered=prompts > 1)


def format_interval(mean: float, low: float, high: float, signed: bool = True) -> str:
    """Write `+1.27 [+1.02, +1.51]`, rounded to two digits of the interval's half-width.

    Where the interval has no width, the mean keeps four digits.
    """
    half = (high - low) / 2
    scale = half / 10 if half > 0 else abs(mean) / 1000
    decimals = max(0, -math.floor(math.log10(scale))) if scale > 0 else 0

    def text(value: float) -> str:
        rounded = round(value, decimals) or 0  # no minus zero
        return f"{rounded:{'+' if signed and rounded else ''}.{decimals}f}"

    return f"{text(mean)} [{text(low)}, {text(high)}]"


def sure_since(points: Sequence[tuple[int, Mapping[str, Any]]]) -> int | None:
    """The first iteration from which on every interval lies above 0; None if the last one does not.

    Args:
        points: (iteration, estimate as plain values), in order.
    """
    since = None
    for iteration, estimate in points:
        since = None if estimate["low"] <= 0 else iteration if since is None else since
    return since


def _checked(values: ArrayLike, clusters: Sequence[Any] | NDArray[Any]) -> tuple[Floats, NDArray[np.intp]]:
    array, labels = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    if array.ndim != 1 or labels.shape != array.shape:
        raise EtudeError(
            f"an interval needs one cluster per value, not {labels.shape} clusters for {array.shape} values."
        )
    if len(array) < 2:
        raise EtudeError(f"an interval needs at least 2 values, not {len(array)}: evaluate more images.")
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise EtudeError(f"value {bad} is {array[bad]}; an interval needs finite values.")
    return array, np.unique(labels, return_inverse=True)[1]


def _bootstrap(sums: Floats, sizes: NDArray[np.intp], resamples: int, rng: np.random.Generator) -> Floats:
    """[resamples] means of G clusters drawn with replacement; a cluster weighs what it holds."""
    count, means = len(sums), []
    rows = max(1, _BLOCK // count)
    for start in range(0, resamples, rows):
        drawn = rng.integers(count, size=(min(rows, resamples - start), count))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)


def _tail(count: int) -> float:
    """The level of the interval's lower end, 0.025 for large G: Phi(-sqrt(G / (G - 1)) t).

    Here t is the 97.5 % quantile of Student's t with G - 1 degrees of freedom, by its Cornish-Fisher
    expansion to third order: within 0.1 % from 6 clusters on. With 2 or 3 clusters no bootstrap
    interval is trustworthy; the tail is then so small that the bootstrap's extremes are taken.
    """
    z, nu = NormalDist().inv_cdf(0.975), count - 1
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    t = z + first / nu + second / nu**2 + third / nu**3
    return NormalDist().cdf(-math.sqrt(count / nu) * t)

"""What a study may say about a mean: over seeds, prompts and images, and how many comparisons were made.

Every seed is measured on the same prompts, so seeds s and prompts p are crossed and images lie within both. With m_sp the mean of
the images of a prompt in a seed,

    m_sp = mu + a_s + b_p + e_sp,        mean = sum_sp m_sp / (S P)
    se^2 = (MS_seed + MS_prompt - MS_rest) / (S P)          mean squares of the two-way table, E se^2 = Var mean

and the degrees of freedom are Satterthwaite's. The interval is a hierarchical bootstrap, stretched to that width:

    m*   = mean over seeds, prompts and images drawn anew: seed effects from N(0, sigma_seed^2), because the few seeds that
           anybody runs cannot be resampled (three know ten samples); prompts with replacement, the same in every seed; the
           images of each with replacement
    ends = mean + (quantile* - mean*) (se / sd*) (t_df / z)

The shape comes from the bootstrap, and se and Student's t make up for what resampling few seeds and prompts leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from etude.errors import EtudeError

RESAMPLES = 1_000
_BLOCK = 4_000_000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """A mean over seeds and prompts.

    Attributes:
        mean: each seed and each prompt weighs the same.
        standard_error: of the mean, seeds and prompts being samples.
        low: lower end of the 95 % interval.
        high: upper end.
        p: two-sided, that the mean is 0; None where nothing varies.
        degrees: Satterthwaite's degrees of freedom.
        seeds: how many.
        clusters: prompts.
        n: images in all.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    p: float | None
    degrees: float
    seeds: int
    clusters: int
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def effect(
    values: Sequence[ArrayLike], clusters: Sequence[Any], *, seed: int = 0, resamples: int = RESAMPLES
) -> Effect:
    """The mean of values of several seeds, which show the same prompts, with its 95 % interval and p-value.

    Args:
        values: of each seed `[n]`: scores, or differences of scores from the same prompt and noise.
        clusters: `[n]`, which prompt each shows; the same for every seed.
        seed: of the resampling.
        resamples: bootstrap draws.

    With one seed the interval is over prompts alone. Equal values give exactly their value and no width.

    Raises:
        EtudeError: the seeds have other numbers of images, there are fewer than 2 prompts and seeds, or a value is not finite.
    """
    table, counts = _table(values, clusters)
    seeds, prompts, _ = table.shape
    origin = table[0, 0, 0]
    table = table - origin
    means = _cell_means(table, counts)
    center = float(means.mean())
    error, degrees, seed_error = _standard_error(means)
    n = seeds * int(counts.sum())
    if error == 0:
        mean = float(origin + center)
        return Effect(mean, 0.0, mean, mean, None, degrees, seeds, prompts, n)
    from scipy import stats

    t = float(stats.t.ppf(0.975, degrees))
    drawn = _bootstrap(table, counts, seed_error, resamples, np.random.default_rng(seed))
    stretch = error / float(drawn.std()) * t / float(stats.norm.ppf(0.975))
    low, high = center + (np.quantile(drawn, [0.025, 0.975]) - drawn.mean()) * stretch
    mean = float(origin + center)
    p = float(2 * stats.t.sf(abs(mean) / error, degrees))
    return Effect(mean, error, float(origin + low), float(origin + high), p, degrees, seeds, prompts, n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values: reject those below alpha, and the chance of any false rejection is at most alpha.

        p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),    p_(1) <= ... <= p_(m)

    None (nothing varied) stays None and is no comparison.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = highest
    return adjusted


def _table(values: Sequence[ArrayLike], clusters: Sequence[Any]) -> tuple[Floats, NDArray[np.intp]]:
    """`[S, P, I]` values and `[P]` numbers of images; what lies beyond a prompt's number is not used."""
    arrays = [np.asarray(each, dtype=np.float64) for each in values]
    group = np.unique(np.asarray(clusters), return_inverse=True)[1]
    if not arrays or any(each.shape != group.shape for each in arrays):
        shapes = ", ".join(str(each.shape) for each in arrays) or "no seed"
        raise EtudeError(f"every seed needs one value per image of the same prompts, {group.shape}, not {shapes}.")
    stacked = np.stack(arrays)
    if not np.isfinite(stacked).all():
        raise EtudeError("an interval needs finite values.")
    counts = np.bincount(group)
    if len(arrays) < 2 and len(counts) < 2:
        raise EtudeError("an interval needs at least 2 prompts or 2 seeds: measure more.")
    table = np.zeros((len(arrays), len(counts), int(counts.max())))
    place = np.zeros(len(counts), dtype=np.intp)
    for image, prompt in enumerate(group):
        table[:, prompt, place[prompt]] = stacked[:, image]
        place[prompt] += 1
    return table, counts


def _cell_means(table: Floats, counts: NDArray[np.intp]) -> Floats:
    inside = np.arange(table.shape[2]) < counts[:, None]
    return np.asarray(np.where(inside, table, 0.0).sum(axis=2) / counts)


def _standard_error(means: Floats) -> tuple[float, float, float]:
    """Of the mean of the table `[S, P]`, its degrees of freedom, and the part that seeds add to it.

    Never below what prompts or seeds alone give.
    """
    seeds, prompts = means.shape
    if seeds == 1 or prompts == 1:
        error = float(means.std(ddof=1) / math.sqrt(means.size))
        return error, float(means.size - 1), error if seeds > 1 else 0.0
    rows, columns = means.mean(axis=1), means.mean(axis=0)
    rest = means - rows[:, None] - columns + means.mean()
    squares = np.array([prompts * rows.var(ddof=1), seeds * columns.var(ddof=1), 0.0])
    freedom = np.array([seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)], dtype=np.float64)
    squares[2] = (rest**2).sum() / freedom[2]
    seed_error = math.sqrt(max(0.0, squares[0] - squares[2]) / means.size)
    total = squares[0] + squares[1] - squares[2]
    if total >= squares[:2].max() and total > 0:
        return math.sqrt(total / means.size), float(total**2 / (squares**2 / freedom).sum()), seed_error
    larger = int(squares[:2].argmax())
    return math.sqrt(squares[larger] / means.size), float(freedom[larger]), seed_error


def _bootstrap(
    table: Floats, counts: NDArray[np.intp], seed_error: float, resamples: int, rng: np.random.Generator
) -> Floats:
    """`[resamples]` means: a normal part for the seeds, and prompts and their images with replacement."""
    seeds, prompts, images = table.shape
    block = max(1, _BLOCK // table.size)
    found = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        shown = rng.integers(prompts, size=(size, prompts)) if prompts > 1 else np.zeros((size, 1), dtype=np.intp)
        many = counts[shown][:, None, :, None]
        drawn = (rng.random((size, seeds, prompts, images)) * many).astype(np.intp)
        picked = table[np.arange(seeds)[:, None, None], shown[:, None, :, None], drawn]
        inside = np.arange(images) < many
        means = (np.where(inside, picked, 0.0).sum(axis=3) / many[..., 0]).mean(axis=(1, 2))
        found.append(means + seed_error * rng.standard_normal(size))
    return np.concatenate(found)

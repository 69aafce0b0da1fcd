"""Inference on means over seeds, prompts and images: intervals, p-values, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from etude.errors import EtudeError
from etude.measuring.statistics import Estimate

_BLOCK = 4_000_000  # images drawn at a time: bounds the memory
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Effect(Estimate):
    """A mean over seeds and prompts, in which each seed and each prompt weighs the same.

    Attributes:
        p: two-sided p-value of a mean of 0; None where nothing varies.
        degrees: Satterthwaite's degrees of freedom.
    """

    p: float | None
    degrees: float
    seeds: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. `clustered` is left out: it is true for more than one prompt."""
        names = ("mean", "standard_error", "low", "high", "p", "degrees", "seeds", "clusters", "n")
        return {name: getattr(self, name) for name in names}


def effect(values: Sequence[ArrayLike], clusters: Sequence[Any], *, resamples: int = 1_000) -> Effect:
    """Estimate a mean over seeds that show the same prompts, with its 95 % interval and p-value.

    Seeds s and prompts p are crossed, and images lie within both. Let m_sp be the mean of the
    images of a prompt in a seed. Then

        m_sp = mu + a_s + b_p + e_sp,        mean = sum_sp m_sp / (S P)
        se^2 = (MS_seed + MS_prompt - MS_rest) / (S P)    from the mean squares of the two-way table

    with E se^2 = Var mean, and Satterthwaite's degrees of freedom. The interval is a hierarchical
    bootstrap, stretched to that width, since resampling few seeds and prompts loses some of it:

        m*   = mean over redrawn seeds, prompts and images
        ends = mean + (quantile* - mean*) (se / sd*) (t_df / z)

    Seed effects are drawn from N(0, sigma_seed^2), since few seeds cannot be resampled (three allow
    ten samples). Prompts are drawn with replacement, the same in every seed, and so are the images
    of each prompt. With one seed the interval is over prompts alone. Equal values give exactly
    their value, and an interval of no width.

    Args:
        values: `[n]` for each seed: scores, or differences of scores of the same prompt and noise.
        clusters: `[n]`, the prompt of each image, equal for all seeds.

    Raises:
        EtudeError: seeds differ in the number of images, there are only one prompt and one seed, or
            a value is not finite.
    """
    table, counts = _table(values, clusters)
    seeds, prompts, _ = table.shape
    origin = table[0, 0, 0]
    table = table - origin
    inside = np.arange(table.shape[2]) < counts[:, None]
    means = np.where(inside, table, 0.0).sum(axis=2) / counts
    center = float(means.mean())
    error, degrees, seed_error = _standard_error(means)
    mean = float(origin + center)
    low, high, p = mean, mean, None
    if error > 0:
        from scipy import stats

        t = float(stats.t.ppf(0.975, degrees))
        drawn = _bootstrap(table, counts, seed_error, resamples)
        stretch = error / float(drawn.std()) * t / float(stats.norm.ppf(0.975))
        ends = center + (np.quantile(drawn, [0.025, 0.975]) - drawn.mean()) * stretch
        low, high = float(origin + ends[0]), float(origin + ends[1])
        p = float(2 * stats.t.sf(abs(mean) / error, degrees))
    n = seeds * int(counts.sum())
    return Effect(mean, error, low, high, n, prompts, clustered=prompts > 1, p=p, degrees=degrees, seeds=seeds)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's method.

    Rejecting those below alpha makes a false rejection with a chance of at most alpha:

        p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),    p_(1) <= ... <= p_(m)

    None stands where nothing varied. It stays None and does not count as a comparison.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = highest
    return adjusted


def _table(values: Sequence[ArrayLike], clusters: Sequence[Any]) -> tuple[Floats, NDArray[np.intp]]:
    """The values `[S, P, I]`, padded with 0, and the number of images of each prompt `[P]`."""
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


def _standard_error(means: Floats) -> tuple[float, float, float]:
    """The standard error of the mean of `[S, P]`, its degrees of freedom, and the seeds' part."""
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
    larger = int(squares[:2].argmax())  # never below the error from prompts alone or from seeds alone
    return math.sqrt(squares[larger] / means.size), float(freedom[larger]), seed_error


def _bootstrap(table: Floats, counts: NDArray[np.intp], seed_error: float, resamples: int) -> Floats:
    """Draw means `[resamples]`: prompts and images with replacement, seed effects as normal."""
    seeds, prompts, images = table.shape
    block, rng = max(1, _BLOCK // table.size), np.random.default_rng(0)
    draws = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        shown = rng.integers(prompts, size=(size, prompts)) if prompts > 1 else np.zeros((size, 1), dtype=np.intp)
        many = counts[shown][:, None, :, None]
        drawn = (rng.random((size, seeds, prompts, images)) * many).astype(np.intp)
        picked = table[np.arange(seeds)[:, None, None], shown[:, None, :, None], drawn]
        inside = np.arange(images) < many
        means = (np.where(inside, picked, 0.0).sum(axis=3) / many[..., 0]).mean(axis=(1, 2))
        draws.append(means + seed_error * rng.standard_normal(size))
    return np.concatenate(draws)

"""A linear reward from votes: Davidson's model on frozen features, with ridge, judged on held-out prompts.

    d = z_left . w - z_right . w + side_r,     eta = eta_r
    minimise  - sum log P(vote | d, eta) + ridge / 2 |w|^2

z are the features, centred within each prompt, each block of them with an equal share of the
variance, in their 256 largest principal components; voted pairs differ by 1 on average (root mean
square). side and eta are one number each, or one for each rater. The ridge strength has the best
likelihood on held-out prompts. Figures of a prompt come from a fit without that prompt, at the
strength that the other folds choose.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.errors import EtudeError
from etude.measuring.statistics import format_interval
from etude.preferences import davidson
from etude.preferences.agreement import Agreement, measure
from etude.preferences.clustering import Clusters, Floats
from etude.preferences.features import pool_features
from etude.preferences.pool import Ballots, Pool
from etude.preferences.shares import Share, estimate_share
from etude.preferences.verdict import describe
from etude.sampling.noise import keyed_generator

COMPONENTS, FOLDS, BINS = 256, 5, 8
RIDGES = tuple(float(10.0**power) for power in np.arange(1, -3.5, -0.5))
"""Strengths that cross-validation tries, from strong to weak."""
FEWEST = 20
"""Decided votes that a fit needs."""
_RATER_RIDGE, _COMMON_RIDGE = 1.0, 1e-4
_LEAST_DEVIATION = 0.1  # of a feature, in root mean squares of its block
_FRACTIONS = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Space:
    """Features as a fit sees them: z = (f - mean) @ basis.

    Attributes:
        mean: `[D]`.
        basis: `[D, k]`.
        z: `[images, k]`.
    """

    mean: Floats
    basis: Floats
    z: Floats


@dataclass(frozen=True)
class Votes:
    """Votes in rows of the features.

    Attributes:
        left: row of the left image, `[n]`.
        right: row of the right image, `[n]`.
        outcome: 1, 0 or -1, `[n]`.
        rater: number of the rater; all 0 without rater effects, `[n]`.
    """

    left: NDArray[np.intp]
    right: NDArray[np.intp]
    outcome: NDArray[np.int8]
    rater: NDArray[np.intp]

    def take(self, rows: NDArray[Any]) -> Votes:
        """Some of the votes."""
        return Votes(self.left[rows], self.right[rows], self.outcome[rows], self.rater[rows])


@dataclass(frozen=True)
class Parameters:
    """A minimum: w `[k]`, side and eta `[raters]`; eta is -inf without ties."""

    w: Floats
    side: Floats
    eta: Floats


@dataclass(frozen=True)
class RewardFit:
    """A reward and what is known about it.

    Attributes:
        weight: of raw features, `[D]`; the reward is f . weight - offset, in logits.
        offset: makes the mean reward of the pool 0.
        basis: `[D, k]`, from raw features to the components of `covariance`.
        covariance: of w after the votes, `[k, k]` (Laplace).
        eta: log nu of the tie parameter, the raters' mean; None without ties.
        accuracy: share of decided votes on held-out prompts that the reward gets right.
        agreement: the raters with themselves, and their sides.
        card: everything else, as plain values.
    """

    weight: Floats
    offset: float
    basis: Floats
    covariance: Floats
    eta: float | None
    accuracy: Share
    agreement: Agreement
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def told_from_chance(self) -> bool:
        """Whether the interval of the accuracy lies above one half."""
        return self.accuracy.low > 0.5

    def lines(self) -> list[str]:
        """The fit for a terminal, one fact a line."""
        card = self.card
        raters = ", ".join(f"{name} {count}" for name, count in list(card["raters"].items())[:6])
        lines = [
            f"{card['votes']} votes ({raters}) on {card['prompts']} prompts, {card['votes'] - card['decided']} of them ties",
            f"held-out accuracy {self.accuracy} of {self.accuracy.n} decided votes ({self.accuracy.basis})",
            *describe(self.agreement),
            "accuracy by votes: " + ", ".join(f"{row['votes']}: {100 * row['mean']:.1f} %" for row in card["curve"]),
            "calibration (said, seen): "
            + ", ".join(f"{100 * row['predicted']:.0f} {100 * row['observed']:.0f}" for row in card["calibration"]),
        ]
        for name, words in (
            ("slope", "calibration slope {} (1 is calibrated)"),
            ("side", "leaning to the left {} logits"),
        ):
            if (each := card[name]) is not None:
                lines.append(
                    words.format(format_interval(each["mean"], each["low"], each["high"], signed=name == "side"))
                )
        lines.append(f"ridge {card['ridge']:g}")
        for maker in card["makers"][1:]:
            first = card["makers"][0]["label"]
            value = format_interval(maker["strength"], maker["low"], maker["high"])
            lines.append(f"{maker['label']} against {first}: {value} logits")
        return lines


def fit_reward(
    pool: Pool,
    backbone: str = "embedded",
    *,
    rater_effects: bool = False,
    seed: int = 0,
    advance: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> RewardFit:
    """Fit a reward to the votes of a pool.

    Args:
        pool: images and votes.
        backbone: the frozen features, as in `features.load_backbone`.
        rater_effects: give each rater a side bias and a tie rate.
        seed: seed of the folds.
        advance: called with a stage, its work just done and its total.

    Raises:
        EtudeError: there are fewer than 20 decided votes, or they are on one prompt only.
    """
    ballots = pool.ballots()
    prompts = {image.id: image.prompt for image in pool.images()}
    decided = int((ballots.outcome != 0).sum())
    voted_on = np.array([prompts[each] for each in ballots.left.tolist()], np.str_)
    if decided < FEWEST or len(set(voted_on.tolist())) < 2:
        raise EtudeError(
            f"the pool '{pool.root}' has {decided} decided votes on {len(set(voted_on.tolist()))} prompts: a fit needs "
            f"{FEWEST} on 2 prompts or more; go on voting."
        )
    features = pool_features(pool, backbone, lambda done, total: advance("features", done, total))
    texts = np.array([prompts[each] for each in features.images.tolist()], np.str_)
    people, rater = np.unique(ballots.rater, return_inverse=True)
    votes = Votes(
        features.rows(ballots.left),
        features.rows(ballots.right),
        ballots.outcome,
        rater if rater_effects else np.zeros_like(rater),
    )
    space = make_space(features.values, texts, votes, features.blocks)
    clusters = Clusters.of(voted_on, ballots.rater)
    checked = cross_validate(space.z, votes, clusters.prompt, seed, lambda d, t: advance("cross-validation", d, t))
    best = minimise(space.z, votes, checked.ridge)
    agreement = measure(ballots, prompts)
    right = checked.right(votes)
    rows = np.flatnonzero(votes.outcome)
    accuracy = estimate_share(right[rows], clusters.take(rows))
    weight = space.basis @ best.w
    eta = float(best.eta.mean())
    card = {
        "backbone": backbone,
        "votes": len(votes.outcome),
        "decided": decided,
        "raters": dict(Counter(ballots.rater.tolist()).most_common()),
        "prompts": clusters.prompts,
        "images": len(features.images),
        "ridge": checked.ridge,
        "accuracy": accuracy.to_dict(),
        "self_agreement": None if agreement.own is None else agreement.own.to_dict(),
        "between_raters": None if agreement.between is None else agreement.between.to_dict(),
        "ceiling": None if agreement.ceiling is None else agreement.ceiling.mean,
        "ceiling_interval": None if agreement.ceiling is None else [agreement.ceiling.low, agreement.ceiling.high],
        "left": None if agreement.left is None else agreement.left.to_dict(),
        "ties": None if agreement.ties is None else agreement.ties.to_dict(),
        "side_bias_logits": {
            str(name): float(each) for name, each in zip(people if rater_effects else ["all"], best.side, strict=True)
        },
        **check(checked, votes, clusters),
        "calibration": calibration(checked.differences + checked.sides, votes),
        "curve": learning_curve(
            space.z, votes, clusters, checked, seed, lambda d, t: advance("accuracy by votes", d, t)
        ),
        "makers": maker_strengths(pool, ballots, clusters),
    }
    return RewardFit(
        weight,
        float(space.mean @ weight),
        space.basis,
        posterior(space.z, votes, best, checked.ridge),
        eta if np.isfinite(eta) else None,
        accuracy,
        agreement,
        card,
    )


def make_space(
    features: NDArray[np.float32], prompts: NDArray[np.str_], votes: Votes, blocks: tuple[int, ...]
) -> Space:
    """Scale the features within prompts to unit variance, a nearly constant one to less, and each
    block of them to an equal share; keep the largest components.
    """
    f = features.astype(np.float64)
    group = np.unique(prompts, return_inverse=True)[1]
    sizes = np.bincount(group)
    means = np.zeros((len(sizes), f.shape[1]))
    np.add.at(means, group, f)
    within = f - (means / sizes[:, None])[group]
    deviation = np.sqrt((within**2).mean(axis=0))
    scale = np.zeros_like(deviation)
    ends = np.cumsum(blocks)
    for start, end in zip(ends - np.array(blocks), ends, strict=True):
        own = deviation[start:end]
        # A feature that hardly varies in the pool may vary in other images: it must not be blown up.
        floor = _LEAST_DEVIATION * math.sqrt(float((own**2).mean()))
        scale[start:end] = 1 / np.maximum(own, floor or np.inf) / math.sqrt(end - start)
    within *= scale
    if len(within) < within.shape[1]:
        values, vectors = np.linalg.eigh(within @ within.T)
        kept = values > 1e-9 * values[-1]
        components = within.T @ (vectors[:, kept] / np.sqrt(values[kept]))
    else:
        values, components = np.linalg.eigh(within.T @ within)
    components = components[:, ::-1][:, : min(COMPONENTS, max(1, len(f) - len(sizes)))]
    basis = scale[:, None] * components
    mean = f.mean(axis=0)
    z = (f - mean) @ basis
    length = np.sqrt((((z[votes.left] - z[votes.right]) ** 2).sum(axis=1)).mean())
    basis = basis / (length or 1.0)
    return Space(mean, basis, (f - mean) @ basis)


def minimise(z: Floats, votes: Votes, ridge: float, start: Parameters | None = None) -> Parameters:
    """The minimum at one ridge strength (scipy's L-BFGS-B, scaled by the diagonal of the curvature)."""
    from scipy.optimize import minimize

    k, raters = z.shape[1], int(votes.rater.max()) + 1
    ties = bool((votes.outcome == 0).any())
    spread = sum(((z[chunk.left] - z[chunk.right]) ** 2).sum(axis=0) for chunk in _chunks(votes))
    scale = 1 / np.sqrt(0.15 * spread + ridge)
    common = 1 / np.sqrt(0.15 * len(votes.outcome) / raters + 1)
    shape = np.concatenate([scale, np.full(raters * (1 + ties), common)])

    def unpack(u: Floats) -> Parameters:
        x = u * shape
        eta = x[k + raters :] if ties else np.full(raters, -np.inf)
        return Parameters(x[:k], x[k : k + raters], eta)

    def objective(u: Floats) -> tuple[float, Floats]:
        p = unpack(u)
        score = z @ p.w
        d = score[votes.left] - score[votes.right] + p.side[votes.rater]
        ell, by_d, by_eta = davidson.log_likelihood(d, p.eta[votes.rater], votes.outcome)
        by_image = np.bincount(votes.left, by_d, len(z)) - np.bincount(votes.right, by_d, len(z))
        value = -ell.sum() + ridge / 2 * (p.w @ p.w)
        gradient = [ridge * p.w - z.T @ by_image]
        for each, slope in ((p.side, by_d), (p.eta, by_eta))[: 1 + ties]:
            apart = each - each.mean()
            value += _RATER_RIDGE / 2 * (apart @ apart) + _COMMON_RIDGE / 2 * (each @ each)
            gradient.append(_RATER_RIDGE * apart + _COMMON_RIDGE * each - np.bincount(votes.rater, slope, raters))
        return float(value), np.concatenate(gradient) * shape

    if start is None:
        begin = np.zeros(len(shape))
    else:
        begin = np.concatenate([start.w, start.side, *([start.eta] if ties else [])]) / shape
        begin[~np.isfinite(begin)] = 0.0
    result = minimize(
        objective, begin, jac=True, method="L-BFGS-B", options={"maxiter": 400, "ftol": 1e-10, "gtol": 1e-4}
    )
    return unpack(result.x)


def posterior(z: Floats, votes: Votes, best: Parameters, ridge: float) -> Floats:
    """Laplace's covariance of w: the inverse of the curvature at the minimum."""
    score = z @ best.w
    curvature = np.eye(z.shape[1]) * ridge
    for chunk in _chunks(votes):
        x = z[chunk.left] - z[chunk.right]
        d = score[chunk.left] - score[chunk.right] + best.side[chunk.rater]
        curvature += x.T @ (x * davidson.information(d, best.eta[chunk.rater])[:, 0, 0, None])
    return np.asarray(np.linalg.inv(curvature))


@dataclass(frozen=True)
class Checked:
    """Cross-validation: figures of each vote from fits without its prompt.

    Attributes:
        ridge: strength with the best held-out likelihood.
        fold: the fold of each vote, `[n]`.
        differences: predicted utility of left minus right, `[n]`.
        sides: predicted leaning of the rater, `[n]`.
    """

    ridge: float
    fold: NDArray[np.intp]
    differences: Floats
    sides: Floats

    def right(self, votes: Votes) -> Floats:
        """1 where the reward prefers the image that was chosen, 1/2 where it has no preference, else 0."""
        return np.asarray((1 + np.sign(self.differences) * np.sign(votes.outcome)) / 2)


def cross_validate(
    z: Floats, votes: Votes, prompt: NDArray[np.intp], seed: int, advance: Callable[[int, int], None]
) -> Checked:
    """Choose the ridge strength on held-out prompts, and predict each vote without its prompt."""
    count = int(prompt.max()) + 1
    folds = min(FOLDS, count)
    fold = (keyed_generator(seed, "preference folds").permutation(count) % folds)[prompt]
    losses = np.zeros((folds, len(RIDGES)))
    differences = np.zeros((len(RIDGES), len(fold)))
    sides = np.zeros_like(differences)
    advance(0, folds * len(RIDGES))
    for f in range(folds):
        trained, held = votes.take(fold != f), votes.take(fold == f)
        last = None
        for i, ridge in enumerate(RIDGES):
            last = minimise(z, trained, ridge, last)
            side, eta = _of_raters(last, held, trained)
            score = z @ last.w
            d = score[held.left] - score[held.right]
            loss = -davidson.log_likelihood(d + side, np.maximum(eta, -12.0), held.outcome)[0]
            losses[f, i] = loss.sum()
            differences[i, fold == f], sides[i, fold == f] = d, side
            advance(1, folds * len(RIDGES))
    others = losses.sum(axis=0) - losses if folds > 1 else losses
    own = np.argmin(others, axis=1)[fold]
    at = np.arange(len(fold))
    return Checked(RIDGES[int(np.argmin(losses.sum(axis=0)))], fold, differences[own, at], sides[own, at])


def check(checked: Checked, votes: Votes, clusters: Clusters) -> dict[str, Any]:
    """Davidson's model on the held-out differences alone, d = slope difference + side, with intervals.

    A slope of 1 is a calibrated reward. `side` is the leaning to the left in logits, other things
    equal. Both are None where the votes do not tell.
    """
    spread = float(checked.differences.std())
    design = np.column_stack([checked.differences / (spread or 1.0), np.ones(len(checked.fold))])
    try:
        fitted = davidson.fit(design, votes.outcome, clusters)
    except EtudeError:
        return {"slope": None, "side": None}
    slope, side = fitted.interval([1 / (spread or 1.0), 0.0]), fitted.interval([0.0, 1.0])
    return {
        "slope": dict(zip(("mean", "low", "high"), slope, strict=True)),
        "side": dict(zip(("mean", "low", "high"), side, strict=True)),
    }


def learning_curve(
    z: Floats, votes: Votes, clusters: Clusters, checked: Checked, seed: int, advance: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Held-out accuracy by the number of votes that were learnt from, at the chosen ridge strength."""
    order = keyed_generator(seed, "preference curve").permutation(len(checked.fold))
    folds = np.unique(checked.fold)
    rows, done = [], np.flatnonzero(votes.outcome)
    advance(0, len(_FRACTIONS) * len(folds))
    for fraction in _FRACTIONS:
        right, learnt = np.zeros(len(order)), []
        for f in folds:
            known = order[checked.fold[order] != f]
            known = known[: max(2, round(fraction * len(known)))]
            score = z @ minimise(z, votes.take(known), checked.ridge).w
            d = score[votes.left] - score[votes.right]
            right[checked.fold == f] = ((1 + np.sign(d) * np.sign(votes.outcome)) / 2)[checked.fold == f]
            learnt.append(len(known))
            advance(1, len(_FRACTIONS) * len(folds))
        share = estimate_share(right[done], clusters.take(done))
        rows.append({"votes": int(np.mean(learnt)), **share.to_dict()})
    return rows


def calibration(differences: Floats, votes: Votes) -> list[dict[str, float]]:
    """Predicted and observed share of the left image among decided votes, in bins of equal size."""
    rows = np.flatnonzero(votes.outcome)
    predicted = 1 / (1 + np.exp(-differences[rows]))
    observed = votes.outcome[rows] == 1
    bins = np.array_split(np.argsort(predicted, kind="stable"), min(BINS, max(1, len(rows) // 10)))
    return [
        {"predicted": float(predicted[b].mean()), "observed": float(observed[b].mean()), "votes": len(b)} for b in bins
    ]


def maker_strengths(pool: Pool, ballots: Ballots, clusters: Clusters) -> list[dict[str, Any]]:
    """Strength of each maker against the first, in logits with intervals; empty where votes do not tell."""
    made = {image.id: image.maker for image in pool.images()}
    left = np.array([made[each] for each in ballots.left.tolist()])
    right = np.array([made[each] for each in ballots.right.tolist()])
    rows = np.flatnonzero(left != right)
    names = sorted({*left[rows].tolist(), *right[rows].tolist()})
    if len(names) < 2:
        return []
    design = np.stack([(left[rows] == name) * 1.0 - (right[rows] == name) for name in names[1:]], axis=1)
    try:
        fitted = davidson.fit(design, ballots.outcome[rows], clusters.take(rows))
    except EtudeError:
        return []
    makers, strengths = pool.makers(), []
    for i, name in enumerate(names):
        contrast = np.zeros(len(names) - 1)
        if i:
            contrast[i - 1] = 1.0
        value, low, high = fitted.interval(contrast)
        strengths.append({"label": makers[name].label, "strength": value, "low": low, "high": high})
    return strengths


def _of_raters(p: Parameters, held: Votes, trained: Votes) -> tuple[Floats, Floats]:
    """Side and eta of each held-out vote's rater; a rater without trained votes has the others' mean."""
    known = np.zeros(max(len(p.side), int(held.rater.max()) + 1), bool)
    known[np.unique(trained.rater)] = True

    def of(each: Floats) -> Floats:
        padded = np.full(len(known), each[known[: len(each)]].mean())
        padded[: len(each)][known[: len(each)]] = each[known[: len(each)]]
        return padded[held.rater]

    return of(p.side), of(p.eta)


def _chunks(votes: Votes, size: int = 20_000) -> list[Votes]:
    """The votes in parts whose features fit into memory."""
    return [
        votes.take(np.arange(start, min(start + size, len(votes.outcome))))
        for start in range(0, len(votes.outcome), size)
    ]

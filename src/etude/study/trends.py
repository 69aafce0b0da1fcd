"""Trends over training: slopes of the gap, bands over seeds, and rewards at equal work.

A run's evaluations are repeated measurements of one run, so they are no independent points. Each run
is therefore summarised first, by the least-squares slope of its gap over the iterations, and runs
are compared then. For evaluations at the same iterations this is the estimate of the mixed model
with a random intercept and a random slope for each run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from etude.errors import EtudeError
from etude.study.collect import SAMPLER_KEYS, CellResult, Condition, families
from etude.study.directory import work
from etude.study.inference import Floats, effect, holm
from etude.study.study_file import TrendsConfig

Row = dict[str, Any]
UNIT = 100  # iterations of a slope


def slopes(iterations: Sequence[int], curves: Floats) -> Floats:
    """Compute the least-squares slope of each curve `[..., T]` over the iterations `[T]`.

    EtudeError for fewer than three iterations.
    """
    t = np.asarray(iterations, dtype=np.float64)
    if len(t) < 3:
        raise EtudeError(f"a slope over {len(t)} evaluations says nothing of a trend: give at least 3.")
    t = t - t.mean()
    return np.asarray(curves @ t / (t @ t))


def pooled(groups: Sequence[Floats]) -> list[Row]:
    """Estimate the mean of each group of runs, with the spread over seeds that all groups share.

    With the values x_gs of seed s in group g, [S_g] or [S_g, T], and m_g their mean,

        var = sum_gs (x_gs - m_g)^2 / sum_g (S_g - 1),
        se_g^2 = max(var, var_g) / S_g,    var_g the variance within the group

    and t with `sum_g (S_g - 1)` degrees of freedom: a few seeds of several etas tell the spread
    better than those of one, and three seeds alone would need t = 4.3. Five groups of three normal
    values are covered 96 times of 100 at a nominal 95 %, and a Holm test of all five rejects a true
    hypothesis in 3 cases of 100. If one group is twice as spread as the others it is covered 88
    times, and the test errs in 6. The intervals are over seeds, for the prompts at hand. One seed in
    every group gives means without intervals.
    """
    from scipy import stats

    means = [np.asarray(values.mean(axis=0)) for values in groups]
    degrees = sum(len(values) - 1 for values in groups)
    if not degrees:
        return [{"mean": _plain(mean), "low": None, "high": None, "p": None, "seeds": 1} for mean in means]
    squares = [((v - m) ** 2).sum(axis=0) for v, m in zip(groups, means, strict=True)]
    shared = sum(squares, np.zeros_like(means[0])) / degrees
    rows, reach = [], float(stats.t.ppf(0.975, degrees))
    for values, mean, square in zip(groups, means, squares, strict=True):
        error = np.sqrt(np.maximum(shared, square / max(len(values) - 1, 1)) / len(values))
        with np.errstate(divide="ignore", invalid="ignore"):
            p = np.where(error > 0, 2 * stats.t.sf(np.abs(mean) / error, degrees), np.nan)
        row: Row = {"mean": _plain(mean), "low": _plain(mean - reach * error), "high": _plain(mean + reach * error)}
        row |= {"standard_error": _plain(error), "degrees": degrees, "seeds": len(values)}
        rows.append(row | {"p": None if p.ndim or np.isnan(p) else float(p)})
    return rows


def _plain(values: Floats) -> Any:
    return values.tolist() if values.ndim else float(values)


def trend_rows(settings: TrendsConfig, groups: list[Condition]) -> Row:
    """Analyse all families of conditions that differ in a constant eta alone.

    Slopes, and changes of the gap at the reference eta, are each one family of Holm's correction.
    """
    found: list[Row] = []
    for label, family in families(groups, SAMPLER_KEYS):
        members = [c for c in family if c.eta is not None]
        found += [_family(settings, label, members, reward) for reward in (members[0].trained if members else [])]
    rows = [row for each in found for row in each["rows"]]
    corrected([slope for row in rows for slope in row["slopes"]])
    corrected([row["reference"]["change"] for row in rows if row["reference"]])
    judged = dict.fromkeys((c.config.model, reward) for c in groups for reward in c.trained)
    budgets = [
        {"model": model, "reward": reward, "rows": rows}
        for model, reward in judged
        if (rows := _equal_work([c for c in groups if c.config.model == model and reward in c.trained], reward))
    ]
    return {"reference_eta": settings.reference_eta, "families": found, "budgets": budgets}


def _family(settings: TrendsConfig, label: str, members: list[Condition], reward: str) -> Row:
    curves = {q: [_curve(c, q, reward) for c in members] for q in ("gap", "ode", "improvement")}
    shared = sorted(set.intersection(*(set(its) for its, _ in [*curves["gap"], *curves["ode"]])))
    table = {q: [values[:, [its.index(i) for i in shared]] for its, values in each] for q, each in curves.items()}
    periods = [[shared[0], shared[-1]], *settings.periods] if shared else []
    by_period = []
    for first, last in periods:
        inside = [k for k, i in enumerate(shared) if first <= i <= last]
        if len(inside) > 2:
            chosen = [shared[k] for k in inside]
            each = pooled([UNIT * slopes(chosen, values[:, inside]) for values in table["gap"]])
            by_period.append(([chosen[0], chosen[-1]], each))
    bands = pooled(table["gap"]) if shared else []
    ends = {q: pooled([values[:, -1] for values in table[q]]) for q in table} if shared else {}
    rows = []
    for index, c in enumerate(members):
        gap, rise = (table[q][index] for q in ("gap", "improvement"))
        row: Row = {"label": c.text(), "eta": c.eta, "seeds": c.seeds, "iteration": shared}
        row["slopes"] = [{"period": period, **each[index]} for period, each in by_period]
        row["band"] = bands[index] if shared else None
        row["gap"], row["start"] = (ends["gap"][index], float(gap[:, 0].mean())) if shared else (None, None)
        row["relative"] = _ratio(gap[:, -1], rise[:, -1]) if shared else None
        row["final"] = ends["ode"][index] if shared else None
        row["best"] = _best(shared, table["ode"][index]) if shared else None
        row["reference"] = _at_reference(settings, c, reward)
        rows.append(row)
    return {"label": label, "reward": reward, "rows": rows}


def _curve(condition: Condition, quantity: str, reward: str) -> tuple[list[int], Floats]:
    """The means of each seed's evaluations, [S, T], at the iterations that all seeds share."""
    series = [_means(result, quantity, reward) for result in condition.results]
    shared = sorted(set.intersection(*(set(each) for each in series)))
    return shared, np.array([[each[i] for i in shared] for each in series])


def _means(result: CellResult, quantity: str, reward: str) -> dict[int, float]:
    means = {i: e[quantity][reward]["mean"] for i, e in result.evaluations if reward in e.get(quantity, {})}
    if quantity == "improvement" and means:
        means[0] = 0.0
    return means


def _ratio(numerator: Floats, denominator: Floats) -> Row | None:
    """The ratio of two means over seeds, with Fieller's interval; None where that is unbounded.

    The interval holds every ratio r at which numerator - r denominator is not surely away from 0.
    """
    from scipy import stats

    seeds, a, b = len(numerator), float(numerator.mean()), float(denominator.mean())
    if seeds < 2:
        return {"mean": a / b, "low": None, "high": None} if b else None
    cov = np.cov(numerator, denominator) / seeds * float(stats.t.ppf(0.975, seeds - 1)) ** 2
    square = b**2 - cov[1, 1]
    middle = a * b - cov[0, 1]
    if square <= 0:
        return None
    inside = max(0.0, middle**2 - square * (a**2 - cov[0, 0]))
    return {"mean": a / b, "low": (middle - inside**0.5) / square, "high": (middle + inside**0.5) / square}


def _best(iterations: list[int], ode: Floats) -> Row | None:
    """The reward at the best iteration, which for each seed the other seeds choose: no luck of the choice is in it."""
    if len(ode) < 2:
        return None
    chosen = [int(np.delete(ode, s, axis=0).mean(axis=0).argmax()) for s in range(len(ode))]
    values = np.array([ode[s, k] for s, k in enumerate(chosen)])
    return {**pooled([values])[0], "iterations": [iterations[k] for k in chosen]}


def _at_reference(settings: TrendsConfig, condition: Condition, reward: str) -> Row | None:
    """The gap of the base and of the tuned model under one SDE for all conditions, image by image."""
    eta, steps = settings.reference_eta, condition.steps
    pairs = [[condition.scores(reward, kind, steps, name, at, base=base) for base in (True, False)]
             for kind, name, at in (("ode", None, None), ("sde", "gddim", eta))]  # fmt: skip
    if any(values is None for each in pairs for values in each):
        return None
    before, after = (ode - sde for ode, sde in zip(*pairs, strict=True))
    rows = {"before": before, "after": after, "change": after - before}
    return {name: effect(list(values), condition.clusters).to_dict() for name, values in rows.items()}


def _equal_work(members: list[Condition], reward: str) -> list[Row]:
    """The ODE reward of each condition at the work of the cheapest, between evaluations on a line.

    Work is the network evaluations of training, without those of the evaluations.
    """
    costs = [training_work(c) for c in members]
    budget = min((c.config.iterations * cost for c, cost in zip(members, costs, strict=True)), default=0.0)
    reached, values = [], []
    for condition, cost in zip(members, costs, strict=True):
        iterations, ode = _curve(condition, "ode", reward)
        at = min(budget / cost, iterations[-1]) if iterations else 0.0
        reached.append(at)
        values.append(np.array([np.interp(at, iterations, each) for each in ode]) if iterations else np.zeros(0))
    if not all(len(each) for each in values):
        return []
    return [
        {"label": c.text(), "eta": c.eta, "iteration": at, **row}
        for c, at, row in zip(members, reached, pooled(values), strict=True)
    ]


def training_work(condition: Condition) -> float:
    """Network evaluations of one iteration; one with its backward pass counts 3."""
    config = condition.config
    alone = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"num_images": 0})})
    return work(alone) / config.iterations


def corrected(rows: Iterable[Row]) -> None:
    """Add Holm's adjusted p to estimates of one family of comparisons."""
    present = list(rows)
    for row, adjusted in zip(present, holm([row["p"] for row in present]), strict=True):
        row["p_holm"] = adjusted

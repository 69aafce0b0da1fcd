"""Analysis of the scores of a study, from cells to the numbers of its tables and figures."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np

from etude.config import parse_config
from etude.config.tree import set_key
from etude.errors import EtudeError
from etude.study.collect import SAMPLER_KEYS, CellResult, Condition, conditions, families
from etude.study.inference import Floats, effect
from etude.study.labels import sampler_label
from etude.study.study_file import Study
from etude.study.trends import corrected, trend_rows
from etude.theory import Gaussian, QuadraticReward, gap_split
from etude.theory.levels import explicit

Row = dict[str, Any]


def analyse(study: Study, results: list[CellResult]) -> Row:
    """Analyse a study: all that its tables, figures and files say, as plain values (JSON)."""
    groups = conditions(results)
    rows = [_condition(group) for group in groups]
    compared, discretised = _comparisons(study, groups), _discretisation(groups, rows)
    corrected(row["difference"] for row in compared)
    corrected(row["gap_change"] for row in discretised if row["gap_change"] is not None)
    trends = study.settings.trends
    return {
        "name": study.settings.name,
        "cells": len(study.cells),
        "done": len(results),
        "seconds": sum(result.seconds for result in results),
        "conditions": rows,
        "comparisons": compared,
        "discretisation": discretised,
        "matrix": _matrix(groups),
        **({} if trends is None else {"trends": trend_rows(trends, groups)}),
        "rows": [row for result in results for row in _cell_rows(result)],
    }


def _pooled(condition: Condition, values: Floats | None, first: int = 0) -> Row | None:
    """The mean over seeds, prompts and images from the `first` on; None where no image is left."""
    if values is None or first >= len(condition.clusters):
        return None
    return effect(list(values[:, first:]), condition.clusters[first:]).to_dict()


def _less(a: Floats | None, b: Floats | None) -> Floats | None:
    return None if a is None or b is None else a - b


def _estimates(condition: Condition, steps: int, reward: str) -> Row:
    kernel = condition.config.sampling.kernel  # the training SDE is the first among the samplers of its kernel
    ode, base_ode = (condition.scores(reward, "ode", steps, base=base) for base in (False, True))
    sde, base_sde = (condition.scores(reward, "sde", steps, kernel, base=base) for base in (False, True))
    gap, base_gap = _less(ode, sde), _less(base_ode, base_sde)
    quantities = {"base": base_ode, "ode": ode, "sde": sde, "improvement": _less(ode, base_ode)}
    quantities |= {"sde_improvement": _less(sde, base_sde), "gap": gap, "base_gap": base_gap}
    quantities["gap_change"] = _less(gap, base_gap)
    return {name: _pooled(condition, values) for name, values in quantities.items()}


def _best_weights(condition: Condition) -> Row | None:
    """The best weights against the last, in the reward that chose them, on images that did not."""
    reward, chosen_by = condition.config.checkpoint.best, condition.config.evaluation.num_images
    kept = [result.best for result in condition.results if result.best is not None]
    if reward is None or len(kept) < len(condition.results):
        return None
    last, best = condition.scores(reward, "ode", condition.steps), np.array([scores[reward] for scores in kept])
    values = {"last": last, "best": best, "gain": _less(best, last)}
    pooled = {name: _pooled(condition, each, chosen_by) for name, each in values.items()}
    return None if pooled["gain"] is None else {"reward": reward, **pooled}


def _condition(condition: Condition) -> Row:
    config, rewards = condition.config, condition.rewards
    return {
        "label": condition.text(),
        "values": dict(condition.values),
        "model": config.model,
        "kernel": config.sampling.kernel,
        "eta": condition.eta,
        "eta_text": config.sampling.eta_text,
        **{name: getattr(condition, name) for name in ("steps", "seeds", "trained", "rewards")},
        "seconds": float(np.mean([result.seconds for result in condition.results])),
        "estimates": {
            str(steps): {reward: _estimates(condition, steps, reward) for reward in rewards}
            for steps in condition.step_counts
        },
        "best_weights": _best_weights(condition),
        "spread": {reward: _spread(condition, reward) for reward in rewards},
        "curves": {reward: _curves(condition, reward) for reward in rewards},
    }


def _spread(condition: Condition, reward: str) -> float:
    """The unit of effect sizes: the standard deviation of the base model's ODE scores."""
    scores = condition.scores(reward, "ode", condition.steps, base=True)
    assert scores is not None  # the ODE is always measured
    return float(scores.ravel().std(ddof=1))


def _curves(condition: Condition, reward: str) -> Row:
    """The mean over seeds of each quantity in training, and 1.96 standard errors of one seed."""
    curves: Row = {}
    for quantity in ("ode", "sde", "gap", "improvement"):
        series = [
            {i: e[quantity][reward] for i, e in result.evaluations if reward in e.get(quantity, {})}
            for result in condition.results
        ]
        shared = sorted(set.intersection(*(set(each) for each in series)))
        # Errors are averaged, too: seeds share their prompts, so more seeds do not narrow the band.
        means, errors = (
            [float(np.mean([each[i][key] for each in series])) for i in shared] for key in ("mean", "standard_error")
        )
        low, high = ([m + z * e for m, e in zip(means, errors, strict=True)] for z in (-1.96, 1.96))
        curves[quantity] = {"iteration": shared, "mean": means, "low": low, "high": high}
    return curves


def _comparisons(study: Study, groups: list[Condition]) -> list[Row]:
    """Compare each condition with the one that agrees in all but the keys of the baseline."""
    baseline, rows = study.settings.baseline, []
    for label, family in families(groups, (*baseline, "sampling.eta_schedule")):
        reference = next((c for c in family if _has(c, baseline)), None)
        if reference is not None:
            others = [c for c in family if c is not reference]
            rows += [_compare(label, c, reference, reward) for c in others for reward in c.trained]
    return [row for row in rows if row]


def _has(condition: Condition, baseline: Row) -> bool:
    """Whether setting the baseline's values, with a section's defaults, changes nothing."""
    if condition.config.sampling.eta_schedule is not None:
        return False
    tree = condition.config.model_dump(mode="json")
    try:
        for key, value in baseline.items():
            set_key(tree, key, copy.deepcopy(value), "baseline")
        return parse_config(tree, "baseline") == condition.config
    except EtudeError:  # a value that no such run can have
        return False


def _compare(family: str, condition: Condition, reference: Condition, reward: str) -> Row:
    """The paired difference of two conditions in ODE reward; empty where they share no seed."""
    shared = set(condition.seeds) & set(reference.seeds)
    if not shared or condition.clusters != reference.clusters:
        return {}
    ours, theirs = (
        replace(c, results=tuple(r for r in c.results if r.cell.config.seed in shared)) for c in (condition, reference)
    )
    steps, spread = condition.steps, _spread(condition, reward)
    difference = _less(ours.scores(reward, "ode", steps), theirs.scores(reward, "ode", steps))
    if difference is None:
        return {}
    estimate = effect(list(difference), condition.clusters)
    pair = {"family": family, "label": condition.text(), "against": reference.text(), "reward": reward}
    size = estimate.mean / spread if spread else None
    return {**pair, "seeds": ours.seeds, "difference": estimate.to_dict(), "effect_size": size}


def _discretisation(groups: list[Condition], rows: list[Row]) -> list[Row]:
    """The gap of every condition before training, its change by training, and the theory's."""
    table = []
    for condition, row in zip(groups, rows, strict=True):
        for steps in condition.step_counts:
            if condition.results[0].find("sde", steps, row["kernel"]) is None:
                continue
            for reward in condition.trained:
                estimates = row["estimates"][str(steps)][reward]
                place = {"label": row["label"], "own_steps": row["steps"], "kernel": row["kernel"], "eta": row["eta"]}
                change = copy.copy(estimates["gap_change"])  # which gets a p-value of this table
                gaps = {"base_gap": estimates["base_gap"], "gap_change": change, "theory": _theory(condition, steps)}
                table.append({**place, "steps": steps, "reward": reward, **gaps})
    return table


def _theory(condition: Condition, steps: int) -> Row | None:
    """The split gap of r(x) = -x^2 for x ~ N(0, 1) at the model's levels, if there is one."""
    kernel, eta = condition.config.sampling.kernel, condition.eta
    if eta is None:
        return None
    levels = condition.results[0].levels[str(steps)]
    grid = explicit(levels["a"], levels["s"])
    try:
        parts = gap_split(Gaussian(0.0, 1.0), grid, QuadraticReward(1.0), eta, kernel=kernel)
    except EtudeError:  # the kernel does not allow this eta at these levels
        return None
    return {name: float(value) for name, value in parts.as_dict().items()}


def _matrix(groups: list[Condition]) -> list[Row]:
    """Conditions under samplers of deployment: a table for each family, reward and step count."""
    tables = []
    for label, family in families(groups, SAMPLER_KEYS):
        rich = [c for c in family if len(c.results[0].samplers) > 2 * len(c.step_counts)]
        for reward in rich[0].trained if rich else []:
            tables += [_matrix_table(label, rich, reward, steps) for steps in rich[0].step_counts]
    return tables


def _matrix_table(family: str, members: list[Condition], reward: str, steps: int) -> Row:
    """One table; its columns are the samplers with which all conditions were measured."""
    listed: dict[str, list[Row]] = {}
    for condition in members:
        for row in condition.results[0].samplers:
            if row["steps"] == steps:
                listed.setdefault(sampler_label(row), []).append(row)
    columns = {label: rows[0] for label, rows in listed.items() if len(rows) == len(members)}
    order = {"ode": 0, "solver": 1, "sde": 2}
    names = sorted(columns, key=lambda label: (order[columns[label]["kind"]], np.ravel(columns[label]["eta"])[0]))

    def cells(condition: Condition, base: bool) -> list[Row | None]:
        samplers = [(columns[name]["kind"], steps, columns[name]["sampler"], columns[name]["eta"]) for name in names]
        return [_pooled(condition, condition.scores(reward, *sampler, base=base)) for sampler in samplers]

    rows: list[Row] = [{"label": "base model", "eta": None, "cells": cells(members[0], True)}]
    for c in members:
        label = c.text(tuple(key for key, _ in c.values if key not in SAMPLER_KEYS))
        rows.append({"label": label, "eta": c.eta, "cells": cells(c, False)})
    return {"family": family, "reward": reward, "steps": steps, "columns": names, "rows": rows}


def _cell_rows(result: CellResult) -> list[Row]:
    """The rows of a cell in `results.csv`: evaluations during training, measurement after it."""
    config = result.cell.config
    head: Row = {"cell": result.cell.slug, "grid": result.cell.grid, "model": config.model}
    head |= {"kernel": config.sampling.kernel, "eta": config.sampling.eta_text, "seeds": 1, "seed": config.seed}
    rows = []
    base = result.evaluations[0][1]["ode"] if result.evaluations else {}
    for iteration, evaluation in result.evaluations:
        for reward in evaluation["ode"]:
            quantities = {name: evaluation.get(name, {}).get(reward) for name in ("ode", "sde", "improvement", "gap")}
            place = {"evaluation": "training", "iteration": iteration, "steps": evaluation["num_steps"]}
            rows.append({**head, **place, "reward": reward, "base": base.get(reward), **quantities, "seconds": None})
    alone = Condition([], (result,))
    for steps in alone.step_counts:
        for reward in alone.rewards:
            estimates = _estimates(alone, steps, reward)
            quantities = {name: estimates[name] for name in ("base", "ode", "sde", "improvement", "gap")}
            place = {"evaluation": "final", "iteration": config.iterations, "steps": steps}
            rows.append({**head, **place, "reward": reward, **quantities, "seconds": result.seconds})
    return rows

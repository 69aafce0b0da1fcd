"""Analysis of the scores of a study, from cells to the numbers of its tables and figures.

It estimates rewards and gaps over seeds and prompts, compares conditions with their baseline pair
by pair, sets the gap before training beside the theory's, and fills the sampler matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from etude.config import parse_config
from etude.config.tree import set_key
from etude.errors import EtudeError
from etude.study.collect import SAMPLER_KEYS, CellResult, Condition, conditions, families
from etude.study.inference import Effect, effect, holm
from etude.study.labels import sampler_label
from etude.study.study_file import Study
from etude.theory.exact_gap import gap_split
from etude.theory.levels import explicit
from etude.theory.reward_functions import QuadraticReward
from etude.theory.targets import Gaussian

Row = dict[str, Any]


def analyse(study: Study, results: list[CellResult]) -> Row:
    """Analyse a study: all that its tables, figures and files say, as plain values (JSON)."""
    groups = conditions(results)
    compared, discretised = _comparisons(study, groups), _discretisation(groups)
    _correct([row["difference"] for row in compared])
    _correct([row["gap_change"] for row in discretised])
    return {
        "name": study.settings.name,
        "cells": len(study.cells),
        "done": len(results),
        "seconds": sum(result.seconds for result in results),
        "conditions": [_condition(condition) for condition in groups],
        "comparisons": compared,
        "discretisation": discretised,
        "matrix": _matrix(groups),
        "rows": [row for result in results for row in _cell_rows(result)],
    }


def _correct(effects: list[Row | None]) -> None:
    """Add Holm's adjusted p-value, `p_holm`, to effects of one family of comparisons."""
    present = [each for each in effects if each is not None]
    for each, adjusted in zip(present, holm([each["p"] for each in present]), strict=True):
        each["p_holm"] = adjusted


def _pooled(condition: Condition, value: Callable[[CellResult], Any], first: int = 0) -> Effect | None:
    """The mean of a `value` `[n]` of each cell over seeds, prompts and images from the `first` on.

    None where a cell has no such value, or no image is left.
    """
    values = [value(result) for result in condition.results]
    if any(each is None for each in values) or first >= len(condition.clusters):
        return None
    return effect([each[first:] for each in values], condition.clusters[first:])


def _scores(row: Row | None, reward: str, base: bool = False) -> Any:
    """The scores `[n]` of one sampler; None where it was not measured."""
    return None if row is None else np.array(row["base" if base else "scores"][reward])


def _less(a: Any, b: Any) -> Any:
    return None if a is None or b is None else a - b


def _dict(mean: Effect | None) -> Row | None:
    return None if mean is None else mean.to_dict()


def _estimates(condition: Condition, steps: int, reward: str) -> Row:
    """The quantities of one reward at one number of steps, by name."""

    def ode(result: CellResult, base: bool = False) -> Any:
        return _scores(result.find("ode", steps), reward, base)

    def sde(result: CellResult, base: bool = False) -> Any:
        return _scores(_own_sde(result, steps), reward, base)

    quantities: dict[str, Callable[[CellResult], Any]] = {
        "base": lambda result: ode(result, True),
        "ode": ode,
        "sde": sde,
        "improvement": lambda result: _less(ode(result), ode(result, True)),
        "sde_improvement": lambda result: _less(sde(result), sde(result, True)),
        "gap": lambda result: _less(ode(result), sde(result)),
        "base_gap": lambda result: _less(ode(result, True), sde(result, True)),
        "gap_change": lambda result: _less(
            _less(ode(result), sde(result)), _less(ode(result, True), sde(result, True))
        ),
    }
    return {name: _dict(_pooled(condition, value)) for name, value in quantities.items()}


def _best_weights(condition: Condition) -> Row | None:
    """The best weights (`checkpoint.best`) against the last ones, in the reward that chose them.

    Only images that did not take part in the choice count.
    """
    reward, evaluation = condition.config.checkpoint.best, condition.config.evaluation
    if reward is None:
        return None

    def last(result: CellResult) -> Any:
        return _scores(result.find("ode", condition.steps), reward)

    def best(result: CellResult) -> Any:
        return None if result.best is None else np.array(result.best[reward])

    values = {"last": last, "best": best, "gain": lambda result: _less(best(result), last(result))}
    pooled = {name: _dict(_pooled(condition, value, evaluation.num_images)) for name, value in values.items()}
    return None if pooled["gain"] is None else {"reward": reward, **pooled}


def _own_sde(result: CellResult, steps: int) -> Row | None:
    """The row of the cell's training SDE, the first among the samplers of its kernel."""
    return result.find("sde", steps, result.cell.config.sampling.kernel)


def _condition(condition: Condition) -> Row:
    steps = list(dict.fromkeys(row["steps"] for row in condition.results[0].samplers))
    return {
        "label": condition.label,
        "values": dict(condition.values),
        "model": condition.config.model,
        "kernel": condition.config.sampling.kernel,
        "eta": condition.eta,
        "eta_text": condition.config.sampling.eta_text,
        "steps": condition.steps,
        "seeds": condition.seeds,
        "trained": condition.trained,
        "rewards": condition.rewards,
        "seconds": float(np.mean([result.seconds for result in condition.results])),
        "estimates": {
            str(count): {reward: _estimates(condition, count, reward) for reward in condition.rewards}
            for count in steps
        },
        "best_weights": _best_weights(condition),
        "spread": {reward: _spread(condition, reward) for reward in condition.rewards},
        "curves": {reward: _curves(condition, reward) for reward in condition.rewards},
    }


def _spread(condition: Condition, reward: str) -> float:
    """The unit of effect sizes: the standard deviation of the base model's ODE scores."""
    scores = [_scores(result.find("ode", condition.steps), reward, True) for result in condition.results]
    return float(np.concatenate(scores).std(ddof=1))


def _curves(condition: Condition, reward: str) -> Row:
    """The mean over seeds of each quantity during training.

    The band is 1.96 standard errors of one seed, averaged over seeds. Seeds share their prompts, so
    more seeds do not narrow it.
    """
    curves: Row = {}
    for quantity in ("ode", "sde", "gap", "improvement"):
        series = [
            {i: e[quantity][reward] for i, e in result.evaluations if reward in e.get(quantity, {})}
            for result in condition.results
        ]
        shared = sorted(set.intersection(*(set(each) for each in series)))
        means = [float(np.mean([each[i]["mean"] for each in series])) for i in shared]
        errors = [float(np.mean([each[i]["standard_error"] for each in series])) for i in shared]
        curves[quantity] = {
            "iteration": shared,
            "mean": means,
            "low": [m - 1.96 * e for m, e in zip(means, errors, strict=True)],
            "high": [m + 1.96 * e for m, e in zip(means, errors, strict=True)],
        }
    return curves


def _comparisons(study: Study, members: list[Condition]) -> list[Row]:
    """Compare each condition with its baseline, seed by seed and image by image.

    The baseline of a condition agrees with it in all but the baseline's keys.
    """
    baseline, rows = study.settings.baseline, []
    for label, family in families(members, (*baseline, "sampling.eta_schedule")):
        reference = next((c for c in family if _has(c, baseline)), None)
        for condition in family if reference is not None else []:
            if condition is not reference:
                assert reference is not None
                rows += [_compare(label, condition, reference, reward) for reward in condition.trained]
    return [row for row in rows if row]


def _has(condition: Condition, baseline: Row) -> bool:
    """Whether a condition has the values of the baseline: setting them changes nothing.

    Keys that a section of the baseline leaves out have their defaults.
    """
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
    pairs = [(a, b) for a in condition.results for b in reference.results if a.cell.config.seed == b.cell.config.seed]
    if not pairs or condition.clusters != reference.clusters:
        return {}
    steps = condition.steps

    def scores(result: CellResult) -> Any:
        return _scores(result.find("ode", steps), reward)

    ours = [(scores(a), scores(b)) for a, b in pairs]
    if any(a is None or b is None for a, b in ours):
        return {}
    difference = effect([a - b for a, b in ours], condition.clusters)
    return {
        "family": family,
        "label": condition.label,
        "against": reference.label,
        "reward": reward,
        "seeds": [a.cell.config.seed for a, _ in pairs],
        "difference": difference.to_dict(),
        "effect_size": difference.mean / _spread(condition, reward) if _spread(condition, reward) else None,
    }


def _discretisation(members: list[Condition]) -> list[Row]:
    """The gap of every condition before training and its change by training.

    Beside them stands the theory's gap for a standard normal target at the same levels.
    """
    rows = []
    for condition in members:
        for steps in dict.fromkeys(row["steps"] for row in condition.results[0].samplers):
            if _own_sde(condition.results[0], steps) is not None:
                rows += [_before_training(condition, steps, reward) for reward in condition.trained]
    return rows


def _before_training(condition: Condition, steps: int, reward: str) -> Row:
    estimates = _estimates(condition, steps, reward)
    return {
        "label": condition.label,
        "own_steps": condition.steps,
        "kernel": condition.config.sampling.kernel,
        "eta": condition.eta,
        "steps": steps,
        "reward": reward,
        "base_gap": estimates["base_gap"],
        "gap_change": estimates["gap_change"],
        "theory": _theory(condition, steps),
    }


def _theory(condition: Condition, steps: int) -> Row | None:
    """Split the gap of r(x) = -x^2 for x ~ N(0, 1) at the model's levels, with the ODE's step out of pure noise.

    None for an eta schedule, and where the theory has no split.
    """
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


def _matrix(members: list[Condition]) -> list[Row]:
    """The tables of conditions (rows) under samplers of deployment (columns).

    There is one for every family, reward and number of steps.
    """
    tables = []
    for label, family in families(members, SAMPLER_KEYS):
        rich = [c for c in family if len(c.results[0].samplers) > 2 * len({r["steps"] for r in c.results[0].samplers})]
        for reward in rich[0].trained if rich else []:
            for count in dict.fromkeys(row["steps"] for row in rich[0].results[0].samplers):
                tables.append(_matrix_table(label, rich, reward, count))
    return tables


def _matrix_table(family: str, members: Sequence[Condition], reward: str, steps: int) -> Row:
    """One table; its columns are the samplers with which all conditions were measured."""
    listed: dict[str, list[Row]] = {}
    for condition in members:
        for row in condition.results[0].samplers:
            if row["steps"] == steps:
                listed.setdefault(sampler_label(row), []).append(row)
    columns = {label: rows[0] for label, rows in listed.items() if len(rows) == len(members)}
    order = {"ode": 0, "solver": 1, "sde": 2}
    names = sorted(columns, key=lambda label: (order[columns[label]["kind"]], _first(columns[label]["eta"])))

    def cells(condition: Condition, base: bool) -> list[Row | None]:
        def value(name: str) -> Callable[[CellResult], Any]:
            like = columns[name]
            return lambda r: _scores(r.find(like["kind"], steps, like["sampler"], like["eta"]), reward, base)

        return [_dict(_pooled(condition, value(name))) for name in names]

    rows: list[Row] = [{"label": "base model", "eta": None, "cells": cells(members[0], True)}]
    rows += [
        {
            "label": c.text(tuple(k for k, _ in c.values if k not in SAMPLER_KEYS)),
            "eta": c.eta,
            "cells": cells(c, False),
        }
        for c in members
    ]
    return {"family": family, "reward": reward, "steps": steps, "columns": names, "rows": rows}


def _first(eta: Any) -> float:
    return float(eta[0] if isinstance(eta, list) else eta)


def _cell_rows(result: CellResult) -> list[Row]:
    """The rows of a cell in `results.csv`: evaluations during training, measurement after it."""
    config = result.cell.config
    head = {
        "cell": result.cell.slug,
        "grid": result.cell.grid,
        "model": config.model,
        "kernel": config.sampling.kernel,
        "eta": config.sampling.eta_text,
        "seeds": 1,
        "seed": config.seed,
    }
    rows = []
    base = result.evaluations[0][1]["ode"] if result.evaluations else {}
    for iteration, evaluation in result.evaluations:
        for reward in evaluation["ode"]:
            quantities = {name: evaluation.get(name, {}).get(reward) for name in ("ode", "sde", "improvement", "gap")}
            place = {"evaluation": "training", "iteration": iteration, "steps": evaluation["num_steps"]}
            rows.append({**head, **place, "reward": reward, "base": base.get(reward), **quantities, "seconds": None})
    alone = Condition([], (result,))
    for count in dict.fromkeys(row["steps"] for row in result.samplers):
        for reward in alone.rewards:
            estimates = _estimates(alone, count, reward)
            quantities = {name: estimates[name] for name in ("base", "ode", "sde", "improvement", "gap")}
            place = {"evaluation": "final", "iteration": config.iterations, "steps": count}
            rows.append({**head, **place, "reward": reward, **quantities, "seconds": result.seconds})
    return rows

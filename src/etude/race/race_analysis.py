"""Analysis of a race: curves over the budget, the budget at which a reward is reached, the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.errors import EtudeError, brief
from etude.race.entries import Entries, Entry, PilotResult, choose, judged
from etude.race.race_file import HeatConfig
from etude.runs.reader import parse_metrics
from etude.study.collect import Condition, read_result
from etude.study.directory import StudyDirectory
from etude.study.inference import Floats, effect
from etude.study.study_file import Cell
from etude.study.trends import corrected

Row = dict[str, Any]


@dataclass(frozen=True)
class Curves:
    """The evaluations of a method's runs, image by image.

    Attributes:
        spent: network evaluations of training up to each point `[T]`, 0 for the base model.
        rate: seconds of training for one network evaluation, median over iterations and seeds.
        scores: by side ("ode", "sde", "base") and reward, `[S, T, n]`.
        clusters: prompt of each image, `[n]`.
    """

    spent: list[int]
    rate: float
    scores: dict[str, dict[str, Floats]]
    clusters: list[int]

    def difference(self, reward: str, quantity: str) -> Floats:
        """`improvement`, the ODE minus the base model's ODE, or `gap`, the ODE minus the SDE, `[S, T, n]`."""
        other = {"improvement": "base", "gap": "sde"}[quantity]
        return np.asarray(self.scores["ode"][reward] - self.scores[other][reward])

    def estimates(self, reward: str, quantity: str) -> list[Row]:
        """The estimate over seeds and prompts at each point."""
        values = self.difference(reward, quantity)
        return [effect(list(values[:, k]), self.clusters).to_dict() for k in range(values.shape[1])]

    def at(self, reward: str, budget: float) -> Row:
        """The improvement at a budget: image by image, on the line between the two evaluations around it."""
        values = self.difference(reward, "improvement")
        place = float(np.interp(budget, self.spent, np.arange(len(self.spent))))
        low = int(place)
        high, share = min(low + 1, len(self.spent) - 1), place - low
        return effect(list((1 - share) * values[:, low] + share * values[:, high]), self.clusters).to_dict()


def reached(x: Sequence[float], points: Sequence[Row], target: float) -> Row:
    """The place x at which a curve first reaches a target, with the interval of all places that may be it.

    A place may be it while the 95 % interval of the curve there holds the target. So the interval begins
    where the upper ends of the curve's intervals reach the target and ends where the lower ends do. Between
    evaluations all three run on lines. None: not within the budget.
    """
    ends = {"at": "mean", "low": "high", "high": "low"}
    return {name: _crossing(x, [point[key] for point in points], target) for name, key in ends.items()}


def _crossing(x: Sequence[float], y: Sequence[float], target: float) -> float | None:
    if y[0] >= target:
        return float(x[0])
    for k in range(1, len(x)):
        if y[k] >= target:
            return float(x[k - 1] + (target - y[k - 1]) / (y[k] - y[k - 1]) * (x[k] - x[k - 1]))
    return None


def analyse_race(entries: Entries, directory: StudyDirectory) -> Row:
    """Analyse a race: all that its tables and figures say, as plain values (JSON)."""
    settings, unusable = entries.settings, dict[str, str]()
    heats = [_heat(entries, heat, directory, unusable) for heat in settings.heats]
    return {
        "name": settings.name,
        "budget": settings.budget,
        "pilot_budget": settings.pilots.budget,
        "reference_eta": settings.reference_eta,
        "largest_fall": settings.pilots.largest_fall,
        "seeds": settings.seeds,
        "heats": heats,
        "unusable": unusable,
    }


def _heat(entries: Entries, heat: HeatConfig, directory: StudyDirectory, unusable: dict[str, str]) -> Row:
    methods, finals, curves = [], dict[str, Condition](), dict[str, Curves]()
    for entry in entries.all:
        if entry.heat is not heat:
            continue
        row, condition, curve = _method(entries, entry, directory, unusable)
        methods.append(row)
        if condition is not None and curve is not None:
            finals[entry.method], curves[entry.method] = condition, curve
    reward = judged(entries.all[0].cells[0].config.model_copy(update={"rewards": heat.weights}))
    for row in methods:
        if row["name"] in curves:
            row |= _raced(curves, row["name"], reward, heat.targets)
    return {
        "name": heat.name,
        "reward": reward,
        "targets": heat.targets,
        "methods": methods,
        "comparisons": _comparisons(finals, entries.settings.baseline, reward),
    }


def _method(
    entries: Entries, entry: Entry, directory: StudyDirectory, unusable: dict[str, str]
) -> tuple[Row, Condition | None, Curves | None]:
    """A method's results in a heat, with its runs where some are done."""
    pilots = entries.results(entry, directory)
    chosen = choose(pilots)
    row: Row = {
        "name": entry.method,
        "group": entries.settings.methods[entry.method].group or entry.method,
        "pilots": [_pilot(each, values) for each, values in zip(pilots, entry.choices, strict=True)],
        "chosen": chosen,
        "seeds": [],
    }
    done = []
    for planned in entry.cells:
        cell = None if chosen is None else entries.settle(planned, directory)
        if cell is None:
            continue
        progress = directory.progress(cell, look_for_others=False)
        if progress.state == "failed":
            unusable[cell.slug] = progress.failure
        elif progress.state == "done":
            try:
                done.append((read_result(cell, directory, progress.seconds), _rows(cell, directory)))
            except (EtudeError, KeyError) as error:
                unusable[cell.slug] = f"'{directory.cell(cell)}' cannot be read: {brief(error)}"
    if not done:
        return row, None, None
    condition = Condition([], tuple(result for result, _ in done))
    spent = entries.counter.spent(condition.config)
    curve = _curves([rows for _, rows in done], spent)
    parts, sampling = next(entries.counter.parts(condition.config)), condition.config.sampling
    row["eta"] = condition.eta if sampling.kernel == "gddim" and sampling.solver is None else None
    row |= {"seeds": condition.seeds, "iterations": condition.config.iterations, "parts": parts, "spent": spent[-1]}
    row |= {"seconds": curve.rate * spent[-1], "rate": curve.rate, "final": _final(entries, condition)}
    return row, condition, curve


def _pilot(result: PilotResult | None, values: Row) -> Row:
    known = {} if result is None else vars(result)
    return {"done": result is not None, **known, "values": values}


def _rows(cell: Cell, directory: StudyDirectory) -> list[Row]:
    stored = directory.file(cell, "metrics.jsonl")
    assert stored is not None  # the cell is done
    return parse_metrics(stored.text(), stored.place)[0]


def _curves(runs: list[list[Row]], spent: list[int]) -> Curves:
    """The curves of one method's runs, from the rows of their metrics."""
    each = [{row["iteration"]: row["scores"] for row in rows if "scores" in row} for rows in runs]
    points = sorted(each[0])
    rates = [
        (row["seconds"]["total"] - row["seconds"].get("evaluation", 0.0)) / (spent[i] - spent[i - 1])
        for rows in runs
        for row in rows
        if 0 < (i := row["iteration"]) < len(spent)
    ]
    scores = {
        side: {
            reward: np.array([[run[i][side][reward] for i in points] for run in each])
            for reward in each[0][points[0]][side]
        }
        for side in ("ode", "sde", "base")
    }
    return Curves([spent[i] for i in points], float(np.median(rates)), scores, each[0][points[0]]["clusters"])


def _raced(curves: dict[str, Curves], name: str, reward: str, targets: list[float]) -> Row:
    """The curves of a method, the budgets at which it reaches the targets, and its place at equal budgets."""
    curve = curves[name]
    seconds = [curve.rate * spent for spent in curve.spent]
    improvement = curve.estimates(reward, "improvement")
    equal = min(each.spent[-1] for each in curves.values())
    equal_seconds = min(each.rate * each.spent[-1] for each in curves.values())
    estimates = {
        quantity: {other: curve.estimates(other, quantity) for other in curve.scores["ode"]}
        for quantity in ("improvement", "gap")
    }
    return {
        "curves": {"spent": curve.spent, "seconds": seconds, **estimates},
        "reached": [
            {
                "target": target,
                "spent": reached(curve.spent, improvement, target),
                "seconds": reached(seconds, improvement, target),
            }
            for target in targets
        ],
        "at_equal_spent": {"budget": equal, **curve.at(reward, equal)},
        "at_equal_seconds": {"budget": equal_seconds, **curve.at(reward, equal_seconds / curve.rate)},
    }


def _final(entries: Entries, condition: Condition) -> Row:
    """The measurement after training by reward: improvement, gap, and the gap under the SDE that all share."""
    kernel, steps, eta = condition.config.sampling.kernel, condition.steps, entries.settings.reference_eta
    table: Row = {}
    for reward in condition.rewards:
        after, before = (
            {
                "ode": condition.scores(reward, "ode", steps, base=base),
                "own": condition.scores(reward, "sde", steps, kernel, base=base),
                "shared": condition.scores(reward, "sde", steps, "gddim", eta, base=base),
            }
            for base in (False, True)
        )
        quantities = {"improvement": (after["ode"], before["ode"])}
        quantities |= {f"{name} gap": (after["ode"], after[name]) for name in ("own", "shared")}
        quantities |= {f"{name} gap, base": (before["ode"], before[name]) for name in ("own", "shared")}
        differences = {name: a - b for name, (a, b) in quantities.items() if a is not None and b is not None}
        differences["shared gap, change"] = differences["shared gap"] - differences["shared gap, base"]
        table[reward] = {name: effect(list(v), condition.clusters).to_dict() for name, v in differences.items()}
    return table


def _comparisons(finals: dict[str, Condition], baseline: str, reward: str) -> list[Row]:
    """The ODE reward of each method after training minus that of the baseline, paired by seed, prompt and noise."""
    if baseline not in finals:
        return []
    rows: list[Row] = []
    for name, condition in finals.items():
        shared = set(condition.seeds) & set(finals[baseline].seeds)
        if name == baseline or not shared:
            continue
        ours, theirs = (
            Condition([], tuple(r for r in c.results if r.cell.config.seed in shared))
            for c in (condition, finals[baseline])
        )
        mine, other = ours.scores(reward, "ode", ours.steps), theirs.scores(reward, "ode", theirs.steps)
        if mine is None or other is None or ours.clusters != theirs.clusters:
            continue
        rows.append(
            {"name": name, "against": baseline, "difference": effect(list(mine - other), ours.clusters).to_dict()}
        )
    corrected(row["difference"] for row in rows)
    return rows

"""Tables of long training, from the values of `etude.study.trends`."""

from __future__ import annotations

from typing import Any

from etude.report.page import interval
from etude.report.result_table import Table, p_value

Row = dict[str, Any]


def trend_tables(trends: Row | None) -> list[Table]:
    """The tables of a study that asks for trends; none of another."""
    if trends is None:
        return []
    return [
        *(_slopes(family) for family in trends["families"]),
        _reference(trends),
        *(_final(family) for family in trends["families"]),
        *(_budget(each) for each in trends["budgets"]),
    ]


def verdict(slope: Row, start: float) -> str:
    """What a slope says of the size of a gap that began at `start`."""
    if slope["p_holm"] is None or slope["p_holm"] >= 0.05 or not start:
        return "not sure"
    return "narrows" if slope["mean"] * start < 0 else "widens"


def _slopes(family: Row) -> Table:
    rows = []
    for row in family["rows"]:
        for slope in row["slopes"]:
            period = "{} to {}".format(*slope["period"])
            cells = [period, f"{row['start']:+.2g}".replace("-", "−"), interval(row["gap"]), interval(slope)]
            cells += [p_value(slope["p_holm"]), verdict(slope, row["start"]), interval(row["relative"])]
            rows.append([row["label"], *cells])
    note = (
        "Slope of the gap over the iterations, in 100 iterations: least squares for each run, then t over the runs, with one "
        "spread for all η. p adjusted by Holm's method for all slopes of the study. Narrows, widens: surely, against the sign of "
        "the gap at the start. Brackets are 95 % intervals over seeds for the prompts of the evaluations; of gap / rise, Fieller's."
    )
    columns = [
        "condition",
        "iterations",
        "gap at the start",
        "gap at the end",
        "slope",
        "p, Holm",
        "verdict",
        "gap / rise",
    ]
    return Table(f"Trend of the gap: {family['reward']}, {family['label']}", note, columns, rows)


def _reference(trends: Row) -> Table:
    rows = []
    for family in trends["families"]:
        for row in family["rows"]:
            if found := row["reference"]:
                cells = [interval(found[name]) for name in ("before", "after", "change")]
                rows.append([row["label"], family["reward"], *cells, p_value(found["change"]["p_holm"])])
    note = (
        f"ODE minus SDE at η = {trends['reference_eta']:g} for every condition, after training. The sampler is the same for all, so "
        "a change is the model's. p adjusted by Holm's method for these rows."
    )
    return Table(
        "Gap under one SDE", note, ["condition", "reward", "before training", "after", "change", "p, Holm"], rows
    )


def _final(family: Row) -> Table:
    rows = []
    for row in family["rows"]:
        best = row["best"]
        at = "–" if best is None else " / ".join(map(str, best["iterations"]))
        rows.append([row["label"], interval(row["final"], False), interval(best, False), at, str(len(row["seeds"]))])
    note = (
        "ODE reward of the evaluations at equal iterations. The best iteration of each seed is chosen by the other seeds, so that no "
        "luck of the choice is in it. Brackets are 95 % intervals over seeds for the prompts of the evaluations."
    )
    columns = ["condition", "final", "best", "best iterations", "seeds"]
    return Table(f"Final and best: {family['reward']}, {family['label']}", note, columns, rows)


def _budget(each: Row) -> Table:
    rows = [[row["label"], f"{row['iteration']:.0f}", interval(row, False), str(row["seeds"])] for row in each["rows"]]
    note = (
        "ODE reward of the evaluations where each condition has spent as many network evaluations on training as the cheapest "
        "has in all; one with its backward pass counts 3."
    )
    return Table(
        f"At equal compute: {each['reward']}, {each['model']}", note, ["condition", "iteration", "ODE", "seeds"], rows
    )

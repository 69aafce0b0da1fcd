"""Tables and sentences of a race, from the values of `etude.race.race_analysis`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from etude.report.page import interval
from etude.report.result_table import Table, p_value
from etude.study.study_file import number_text

Row = dict[str, Any]


def heat_tables(race: Row, heat: Row) -> list[Table]:
    """The tables of one heat that have rows."""
    done = [method for method in heat["methods"] if method["seeds"]]
    candidates = [_reached(heat, done), _equal(done), _final(race, heat, done)]
    candidates += [_comparisons(heat), _costs(done), _pilots(race, heat)]
    return [table for table in candidates if table.rows]


def sentences(heat: Row) -> Iterator[str]:
    """The result of a heat in sentences."""
    done = [method for method in heat["methods"] if method["seeds"]]
    for k, target in enumerate(heat["targets"]):
        arrived = [m for m in done if m["reached"][k]["spent"]["at"] is not None]
        if not arrived:
            yield f"No method reached {target:+g} in {heat['reward']}."
            continue
        first = min(arrived, key=lambda m: m["reached"][k]["spent"]["at"])
        yield (
            f"{target:+g} in {heat['reward']}: {len(arrived)} of {len(done)} methods reached it; first {first['name']}, after "
            f"{place(first['reached'][k]['spent'])} network evaluations."
        )
    if done:
        best = max(done, key=lambda m: m["final"][heat["reward"]]["improvement"]["mean"])
        gain = interval(best["final"][heat["reward"]]["improvement"])
        yield f"The largest mean improvement at the end is {gain}, of {best['name']}."


def values_text(values: Row) -> str:
    """Values by dotted key in words: `learning_rate 0.001, kl_coef 0`."""
    return ", ".join(f"{key.rpartition('.')[2]} {number_text(value)}" for key, value in values.items())


def place(reached: Row) -> str:
    """A budget with its interval, as `4,200 [3,100, 6,000]`; an end that is beyond the budget is a dash."""
    at, low, high = (_number(reached[key]) for key in ("at", "low", "high"))
    return f"{at} [{low}, {high}]"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    digits = max(0, 2 - len(str(int(value))))
    return f"{value:,.{digits}f}" if value < 1000 else f"{round(value, 2 - len(str(int(value)))):,.0f}"


def _reached(heat: Row, done: list[Row]) -> Table:
    columns = ["method"]
    for target in heat["targets"]:
        columns += [f"{target:+g}, evaluations", f"{target:+g}, seconds"]
    rows = [[m["name"], *(place(each[axis]) for each in m["reached"] for axis in ("spent", "seconds"))] for m in done]
    note = (
        f"Network evaluations and seconds of training at which the improvement of the ODE reward in {heat['reward']} first reaches "
        "a target. The interval holds every budget at which the 95 % interval of the improvement, over seeds and prompts, holds the "
        "target. A dash: not within the budget."
    )
    return Table(f"{heat['name']}: budget to reach a reward", note, columns, rows)


def _equal(done: list[Row]) -> Table:
    rows = [
        [m["name"], interval(m["at_equal_spent"]), interval(m["at_equal_seconds"]), str(len(m["seeds"]))] for m in done
    ]
    if not done:
        return Table("", "", [], [])
    spent, seconds = done[0]["at_equal_spent"]["budget"], done[0]["at_equal_seconds"]["budget"]
    note = (
        "Improvement of the ODE reward at equal budgets, in the evaluations along the way: image by image on the line between the "
        "two evaluations around the budget. Each budget is the largest that every method has spent."
    )
    columns = ["method", f"at {spent:,.0f} evaluations", f"at {_number(seconds)} s", "seeds"]
    return Table("At equal budgets", note, columns, rows)


def _final(race: Row, heat: Row, done: list[Row]) -> Table:
    rewards = list(done[0]["final"]) if done else []
    held_out = [reward for reward in rewards if reward != heat["reward"]]
    rows = []
    for m in done:
        own = m["final"][heat["reward"]]
        cells = [interval(own["improvement"]), *(interval(m["final"][r]["improvement"]) for r in held_out)]
        cells += [interval(own.get("own gap")), interval(own["shared gap"]), interval(own["shared gap, change"])]
        rows.append([m["name"], *cells])
    eta = number_text(race["reference_eta"])
    note = (
        "Measured after training. Improvement of the ODE over the base model in the trained and the held-out rewards; gap, ODE minus "
        f"SDE in the trained reward, under the SDE of training (NFT and its like: the recipe's) and under gDDIM at η = {eta} for all, "
        "with its change by training."
    )
    columns = ["method", heat["reward"], *(f"{reward}, held out" for reward in held_out)]
    columns += ["gap, own SDE", f"gap, η = {eta}", "change of it"]
    return Table(f"{heat['name']}: at the end", note, columns, rows)


def _comparisons(heat: Row) -> Table:
    rows = [
        [row["name"], row["against"], interval(row["difference"]), p_value(row["difference"]["p_holm"])]
        for row in heat["comparisons"]
    ]
    note = "Difference of the ODE rewards after training, paired by seed, prompt and noise. p adjusted by Holm's method for these rows."
    return Table(f"{heat['name']}: against the baseline", note, ["method", "against", "difference", "p, Holm"], rows)


def _costs(done: list[Row]) -> Table:
    names = list(dict.fromkeys(name for m in done for name, count in m["parts"].items() if count))
    rows = []
    for m in done:
        parts = [f"{m['parts'].get(name, 0):,}" for name in names]
        rows.append([m["name"], *parts, str(m["iterations"]), f"{m['spent']:,}", f"{1000 * m['rate']:.2g}"])
    note = (
        "Network evaluations of the first iteration by part, a backward as two forwards; iterations and evaluations of a run; "
        "milliseconds of training for one evaluation, median over iterations and seeds, with decoding and rewards."
    )
    return Table("Costs", note, ["method", *names, "iterations", "in all", "ms each"], rows)


def _pilots(race: Row, heat: Row) -> Table:
    rows = []
    for m in heat["methods"]:
        for index, pilot in enumerate(m["pilots"]):
            values = values_text(pilot["values"])
            if not pilot["done"] or pilot["failure"]:
                rows.append([m["name"], values, pilot.get("failure") or "not done", "–", "–", ""])
                continue
            held_out = ", ".join(f"{name} {mean:+.3g}" for name, mean in pilot["held_out"].items()).replace("-", "−")
            cells = [f"{pilot['improvement']:+.3g}".replace("-", "−"), held_out, f"{pilot['excess']:.3g}"]
            rows.append([m["name"], values, *cells, "chosen" if index == m["chosen"] else ""])
    limits = ", ".join(f"{name} {limit:g}" for name, limit in race["largest_fall"].items())
    note = (
        f"Every method has the same number of pilots, each of {race['pilot_budget']:,} network evaluations, on a seed and on prompts of "
        "their own. The one with the largest improvement races, unless a held-out reward fell further than allowed"
        f"{f' ({limits})' if limits else ''}; where all did, the one with the smallest excess."
    )
    columns = ["method", "values", heat["reward"], "held out", "excess", ""]
    return Table(f"{heat['name']}: pilots", note, columns, rows)

"""Tables of a study, as Markdown and as cells of the page.

No digit is finer than the interval beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from etude.measuring.statistics import format_interval
from etude.study.study_file import file_name

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: heading.
        note: meaning of the columns.
        columns: heads. The first column holds words, all others numbers.
        rows: cells as text.
        best: index of the cell to emphasise in each row, or None.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    best: list[int | None] | None = None

    def markdown(self) -> str:
        """The note and the cells in GitHub's dialect of Markdown."""
        align = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = [self.columns, align, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{self.note}\n\n{body}\n"


def tables(analysis: Row) -> list[Table]:
    """All tables that have rows, from the values of `etude.study.analysis.analyse`."""
    candidates: list[Table | None] = [_results(analysis, reward) for reward in trained_rewards(analysis)]
    candidates += [_comparisons(analysis), _best_weights(analysis), _discretisation(analysis), _held_out(analysis)]
    candidates += [_matrix(each) for each in analysis["matrix"]]
    return [table for table in candidates if table is not None and table.rows]


def markdown(analysis: Row) -> str:
    """The text of `tables.md`.

    The basis and each table without its heading are sections that another page can include by name
    (PyMdown's snippets).
    """
    parts = [f"# {analysis['name']}: tables\n", section("basis", basis(analysis))]
    for table in tables(analysis):
        parts += [f"## {table.title}\n", section(anchor(table.title), table.markdown())]
    return "\n".join(parts)


def section(name: str, text: str) -> str:
    """A text between marks that Markdown does not show."""
    return f"<!-- --8<-- [start:{name}] -->\n{text.strip()}\n<!-- --8<-- [end:{name}] -->\n"


def anchor(title: str) -> str:
    """The name of a section or a figure: `colorfulness-eta-1` of `Colorfulness, η = 1`."""
    return file_name(title.replace("η", "eta").lower())


def basis(analysis: Row) -> str:
    """The cells, seeds, images and prompts behind the numbers, in one or two sentences."""
    done = (
        f"{analysis['done']} of {analysis['cells']} cells"
        if analysis["done"] < analysis["cells"]
        else f"{analysis['cells']} cells"
    )
    if not analysis["conditions"]:
        return f"{done} are done."
    counts = [len(c["seeds"]) for c in analysis["conditions"]]
    fewest, most = min(counts), max(counts)
    seeds = (
        f"{most} seed{'s' if most > 1 else ''} of each condition"
        if fewest == most
        else f"{fewest} to {most} seeds of a condition"
    )
    images = max(_own(c)["n"] // len(c["seeds"]) for c in analysis["conditions"])
    prompts = " or ".join(str(n) for n in sorted({_own(c)["clusters"] for c in analysis["conditions"]}))
    luck = (
        " Where there is one seed they are over prompts alone, and leave out training's own luck."
        if fewest == 1
        else ""
    )
    return (
        f"{done}, {seeds}; every model is measured after training on {images} images of "
        f"{prompts} prompts, the same prompts and noise for all conditions of a seed that share them. Square brackets are 95 % intervals over "
        f"seeds and prompts.{luck}"
    )


def estimate(value: Row | None, signed: bool = False) -> str:
    """An estimate as `+1.27 [+1.02, +1.51]`, with true minus signs; a dash for None."""
    if value is None:
        return "–"
    return format_interval(value["mean"], value["low"], value["high"], signed).replace("-", "−")


def final(condition: Row, reward: str) -> Row:
    """The estimates of a condition for one reward, at its own number of steps."""
    estimates: Row = condition["estimates"][str(condition["steps"])][reward]
    return estimates


def trained_rewards(analysis: Row) -> list[str]:
    """The rewards by which conditions are judged, each once, in order."""
    return list(dict.fromkeys(reward for c in analysis["conditions"] for reward in c["trained"]))


def _own(condition: Row) -> Row:
    """The ODE estimate of the reward by which a condition is judged."""
    ode: Row = final(condition, condition["rewards"][0])["ode"]
    return ode


def _at(label: str, own: int, steps: int) -> str:
    """The label of a condition, with the number of steps where that is not its own."""
    return label if steps == own else f"{label}, at {steps} steps"


def _results(analysis: Row, reward: str) -> Table:
    rows = []
    for condition in analysis["conditions"]:
        if reward not in condition["trained"]:
            continue
        for steps, by_reward in condition["estimates"].items():
            e = by_reward[reward]
            cells = [estimate(e["base"]), estimate(e["ode"]), estimate(e["sde"])]
            cells += [estimate(e["improvement"], True), estimate(e["gap"], True), str(len(condition["seeds"]))]
            rows.append([_at(condition["label"], condition["steps"], int(steps)), *cells])
    note = "improvement: ODE of the tuned minus ODE of the base model. gap: ODE minus SDE, both of the tuned model."
    if any(reward in c["trained"] and c["eta"] is None for c in analysis["conditions"]):
        note += " Where η moves, the SDE is the one of the last iteration."
    columns = ["condition", "ODE, base", "ODE", "SDE", "improvement", "gap", "seeds"]
    return Table(f"Trained on {reward}", note, columns, rows)


def _comparisons(analysis: Row) -> Table | None:
    if not analysis["comparisons"]:
        return None
    rows = [
        [
            row["label"],
            row["against"],
            estimate(row["difference"], True),
            "–" if row["effect_size"] is None else f"{row['effect_size']:+.2f}".replace("-", "−"),
            p_value(row["difference"]["p"]),
            p_value(row["difference"]["p_holm"]),
        ]
        for row in analysis["comparisons"]
    ]
    note = (
        "Difference of the ODE rewards, paired by seed, prompt and noise. Effect size: in standard deviations of the base model's "
        f"images. p adjusted by Holm's method for {'these ' if len(rows) > 1 else ''}{count_of(len(rows), 'comparison')}."
    )
    return Table(
        "Against the baseline", note, ["condition", "against", "difference", "effect size", "p", "p, Holm"], rows
    )


def _best_weights(analysis: Row) -> Table:
    """The gain of the checkpoint with the best ODE reward over the last one (`checkpoint.best`)."""
    rows = []
    for c in analysis["conditions"]:
        kept = c["best_weights"]
        if kept is not None:
            cells = [estimate(kept["last"]), estimate(kept["best"]), estimate(kept["gain"], True)]
            rows.append([c["label"], kept["reward"], *cells, str(len(c["seeds"]))])
    note = (
        "ODE reward of the last weights, and of those that had the best ODE reward when training was evaluated; on the measured "
        "images after the first ones, which are those of that evaluation."
    )
    return Table("Best checkpoint", note, ["condition", "chosen by", "last", "best", "best minus last", "seeds"], rows)


def _discretisation(analysis: Row) -> Table | None:
    rows = []
    for row in analysis["discretisation"]:
        theory = row["theory"]
        share = None if theory is None else theory["discretisation"] / (theory["total"] or math.nan)
        rows.append(
            [
                _at(row["label"], row["own_steps"], row["steps"]),
                row["reward"],
                estimate(row["base_gap"], True),
                estimate(row["gap_change"], True),
                p_value(row["gap_change"] and row["gap_change"]["p_holm"]),
                "–" if theory is None else f"{theory['total']:+.3f}".replace("-", "−"),
                "–" if share is None or math.isnan(share) else f"{100 * share:.0f} %",
            ]
        )
    note = (
        "The base model's gap is there before any training: the steps, the start, the errors of the network and guidance make it. What "
        "training adds is the change, with p adjusted by Holm's method for all rows. Theory: the gap of r(x) = −x² for a standard normal "
        "target with an exact score at the same levels, and the share of it that the steps make (the rest is the wrong law at the "
        "start). Its size is in its own unit; only how it moves with η and the steps is to be compared."
    )
    columns = [
        "condition",
        "reward",
        "gap before training",
        "change by training",
        "p, Holm",
        "theory",
        "made by the steps",
    ]
    return Table("The gap before training", note, columns, rows) if rows else None


def _held_out(analysis: Row) -> Table | None:
    """The improvement of every measured reward, trained or not."""
    names = list(dict.fromkeys(r for c in analysis["conditions"] for r in c["rewards"]))
    rows = []
    for c in analysis["conditions"]:
        by_reward = c["estimates"][str(c["steps"])]
        cells = [
            estimate(by_reward[r]["improvement"], True) + (" (trained)" if r in c["trained"] else "")
            if r in by_reward
            else "–"
            for r in names
        ]
        rows.append([c["label"], *cells])
    note = "Improvement in every reward that was measured, the ODE of the tuned minus that of the base model."
    return Table("All rewards", note, ["condition", *names], rows) if len(names) > 1 else None


def _matrix(each: Row) -> Table:
    rows = [[row["label"], *(estimate(cell) for cell in row["cells"])] for row in each["rows"]]
    title = f"Sampler matrix: {each['family']}" + (f", {each['steps']} steps" if "steps" not in each["family"] else "")
    note = f"Reward ({each['reward']}) of each training condition (rows) under each sampler of deployment (columns)."
    return Table(title, note, ["trained with", *each["columns"]], rows, [best(row["cells"]) for row in each["rows"]])


def best(cells: list[Row | None]) -> int | None:
    """The index of the cell with the highest mean; None where no cell has one."""
    means = [-math.inf if cell is None else cell["mean"] for cell in cells]
    return means.index(max(means)) if means and max(means) > -math.inf else None


def count_of(number: int, what: str) -> str:
    """A number and its noun: `1 comparison`, `2 comparisons`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def p_value(p: float | None) -> str:
    """A p-value in two digits, never 0; a dash for None."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"

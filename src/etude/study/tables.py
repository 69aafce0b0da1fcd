"""The tables of a study, as Markdown and as cells of the page; no digit finer than the interval beside it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from etude.measuring.statistics import format_interval

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: heading.
        note: what the columns mean.
        columns: heads; the first column holds words, the others numbers.
        rows: cells as text.
        best: of each row the cell to emphasise, or None.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    best: list[int | None] | None = None

    def markdown(self) -> str:
        """Note and cells in GitHub's dialect."""
        align = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = [self.columns, align, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{self.note}\n\n{body}\n"


def tables(found: Row) -> list[Table]:
    """All that have something to say."""
    made: list[Table | None] = [_results(found, reward) for reward in _trained(found)]
    made += [_comparisons(found), _best_weights(found), _discretisation(found), _held_out(found)]
    made += [_matrix(each) for each in found["matrix"]]
    return [table for table in made if table is not None and table.rows]


def markdown(found: Row) -> str:
    """`tables.md`; what it rests on and the tables without their headings are sections that a page can include (PyMdown's snippets)."""
    parts = [f"# {found['name']}: tables\n", section("basis", basis(found))]
    for table in tables(found):
        parts += [f"## {table.title}\n", section(file_name(table.title), table.markdown())]
    return "\n".join(parts)


def section(name: str, text: str) -> str:
    """The text between marks that are invisible in Markdown."""
    return f"<!-- --8<-- [start:{name}] -->\n{text.strip()}\n<!-- --8<-- [end:{name}] -->\n"


def file_name(text: str) -> str:
    """`colorfulness-reward-gap-over-training`: lower case, without what file systems mind."""
    return re.sub(r"[^a-z0-9.]+", "-", text.replace("η", "eta").lower()).strip("-.")


def basis(found: Row) -> str:
    """What the numbers rest on, in one or two sentences."""
    done = f"{found['done']} of {found['cells']} cells" if found["done"] < found["cells"] else f"{found['cells']} cells"
    if not found["conditions"]:
        return f"{done} are done."
    counts = [len(c["seeds"]) for c in found["conditions"]]
    fewest, most = min(counts), max(counts)
    seeds = (
        f"{most} seed{'s' if most > 1 else ''} of each condition"
        if fewest == most
        else f"{fewest} to {most} seeds of a condition"
    )
    images = max(_any(c)["n"] // len(c["seeds"]) for c in found["conditions"])
    prompts = " or ".join(str(n) for n in sorted({_any(c)["clusters"] for c in found["conditions"]}))
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
    """`+1.27 [+1.02, +1.51]` with real minus signs, or a dash."""
    if value is None:
        return "–"
    return format_interval(value["mean"], value["low"], value["high"], signed).replace("-", "−")


def _any(condition: Row) -> Row:
    found: Row = condition["estimates"][str(condition["steps"])][condition["rewards"][0]]["ode"]
    return found


def _trained(found: Row) -> list[str]:
    return list(dict.fromkeys(reward for c in found["conditions"] for reward in c["trained"]))


def _at(label: str, own: int, steps: int) -> str:
    """The condition's label, with the number of steps it is drawn in where that is not its own."""
    return label if steps == own else f"{label}, at {steps} steps"


def _results(found: Row, reward: str) -> Table:
    rows = []
    for condition in found["conditions"]:
        if reward not in condition["trained"]:
            continue
        for steps, by_reward in condition["estimates"].items():
            e = by_reward[reward]
            cells = [estimate(e["base"]), estimate(e["ode"]), estimate(e["sde"])]
            cells += [estimate(e["improvement"], True), estimate(e["gap"], True), str(len(condition["seeds"]))]
            rows.append([_at(condition["label"], condition["steps"], int(steps)), *cells])
    note = "improvement: ODE of the tuned minus ODE of the base model. gap: ODE minus SDE, both of the tuned model."
    if any(reward in c["trained"] and c["eta"] is None for c in found["conditions"]):
        note += " Where η moves, the SDE is the one of the last iteration."
    columns = ["condition", "ODE, base", "ODE", "SDE", "improvement", "gap", "seeds"]
    return Table(f"Trained on {reward}", note, columns, rows)


def _comparisons(found: Row) -> Table | None:
    if not found["comparisons"]:
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
        for row in found["comparisons"]
    ]
    note = (
        "Difference of the ODE rewards, paired by seed, prompt and noise. Effect size: in standard deviations of the base model's "
        f"images. p adjusted by Holm's method for {'these ' if len(rows) > 1 else ''}{count_of(len(rows), 'comparison')}."
    )
    return Table(
        "Against the baseline", note, ["condition", "against", "difference", "effect size", "p", "p, Holm"], rows
    )


def _best_weights(found: Row) -> Table:
    """What keeping the checkpoint with the best held-out ODE reward brings over keeping the last (`checkpoint.best`)."""
    rows = []
    for c in found["conditions"]:
        kept = c["best_weights"]
        if kept is not None:
            cells = [estimate(kept["last"]), estimate(kept["best"]), estimate(kept["gain"], True)]
            rows.append([c["label"], kept["reward"], *cells, str(len(c["seeds"]))])
    note = (
        "ODE reward of the last weights, and of those that had the best ODE reward when training was evaluated; on the measured "
        "images after the first ones, which are those of that evaluation."
    )
    return Table("Best checkpoint", note, ["condition", "chosen by", "last", "best", "best minus last", "seeds"], rows)


def _discretisation(found: Row) -> Table | None:
    rows = []
    for row in found["discretisation"]:
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


def _held_out(found: Row) -> Table | None:
    """What became of the rewards that were not trained on."""
    names = list(dict.fromkeys(r for c in found["conditions"] for r in c["rewards"]))
    rows = []
    for c in found["conditions"]:
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
    """Of the highest mean."""
    means = [-math.inf if cell is None else cell["mean"] for cell in cells]
    return means.index(max(means)) if means and max(means) > -math.inf else None


def count_of(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def p_value(p: float | None) -> str:
    """Two digits, and never a zero."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"

"""Tables of a study, as Markdown and as cells of the page. No digit is finer than its interval."""

from __future__ import annotations

import math
from typing import Any

from etude.report.page import interval
from etude.report.result_table import Table, p_value
from etude.study.study_file import file_name
from etude.study.trend_tables import trend_tables

Row = dict[str, Any]


def tables(analysis: Row) -> list[Table]:
    """All tables that have rows, from the values of `etude.study.analysis.analyse`."""
    candidates = [_results(analysis, reward) for reward in trained_rewards(analysis)]
    candidates += [_comparisons(analysis), _best_weights(analysis), _discretisation(analysis), _all_rewards(analysis)]
    candidates += trend_tables(analysis.get("trends"))
    candidates += [_matrix(each) for each in analysis["matrix"]]
    return [table for table in candidates if table.rows]


def markdown(analysis: Row) -> str:
    """The text of `tables.md`; other pages can include its tables by name (PyMdown's snippets)."""

    def section(name: str, text: str) -> str:
        return f"<!-- --8<-- [start:{name}] -->\n{text.strip()}\n<!-- --8<-- [end:{name}] -->\n"

    parts = [f"# {analysis['name']}: tables\n", section("basis", basis(analysis))]
    for table in tables(analysis):
        parts += [f"## {table.title}\n", section(anchor(table.title), table.markdown())]
    return "\n".join(parts)


def anchor(title: str) -> str:
    """The name of a section or a figure: `colorfulness-eta-1` of `Colorfulness, η = 1`."""
    return file_name(title.replace("η", "eta").lower())


def basis(analysis: Row) -> str:
    """The cells, seeds, images and prompts behind the numbers, in one or two sentences."""
    part = f"{analysis['done']} of " if analysis["done"] < analysis["cells"] else ""
    done, conditions = f"{part}{analysis['cells']} cells", analysis["conditions"]
    if not conditions:
        return f"{done} are done."
    counts = [len(c["seeds"]) for c in conditions]
    fewest, most = min(counts), max(counts)
    seeds = f"{fewest} to {most} seeds of a condition"
    if fewest == most:
        seeds = f"{most} seed{'s' if most > 1 else ''} of each condition"
    own = [final(c, c["rewards"][0])["ode"] for c in conditions]
    images = max(ode["n"] // count for ode, count in zip(own, counts, strict=True))
    prompts = " or ".join(str(n) for n in sorted({ode["clusters"] for ode in own}))
    luck = " Where there is one seed they are over prompts alone, and leave out training's own luck."
    return (
        f"{done}, {seeds}; every model is measured after training on {images} images of "
        f"{prompts} prompts, the same prompts and noise for all conditions of a seed that share them. Square brackets are 95 % intervals over "
        f"seeds and prompts.{luck if fewest == 1 else ''}"
    )


def final(condition: Row, reward: str) -> Row:
    """The estimates of a condition for one reward, at its own number of steps."""
    return condition["estimates"][str(condition["steps"])][reward]


def trained_rewards(analysis: Row) -> list[str]:
    """The rewards by which conditions are judged, each once, in order."""
    return list(dict.fromkeys(reward for c in analysis["conditions"] for reward in c["trained"]))


def _at(label: str, own: int, steps: int) -> str:
    """The label of a condition, with the number of steps where that is not its own."""
    return label if steps == own else f"{label}, at {steps} steps"


def _results(analysis: Row, reward: str) -> Table:
    rows, moving = [], ""
    for condition in analysis["conditions"]:
        if reward not in condition["trained"]:
            continue
        if condition["eta"] is None:
            moving = " Where η moves, the SDE is the one of the last iteration."
        for steps, by_reward in condition["estimates"].items():
            cells = [interval(by_reward[reward][name], signed=False) for name in ("base", "ode", "sde")]
            cells += [interval(by_reward[reward][name]) for name in ("improvement", "gap")]
            label = _at(condition["label"], condition["steps"], int(steps))
            rows.append([label, *cells, str(len(condition["seeds"]))])
    note = f"improvement: ODE of the tuned minus ODE of the base model. gap: ODE minus SDE, both of the tuned model.{moving}"
    columns = ["condition", "ODE, base", "ODE", "SDE", "improvement", "gap", "seeds"]
    return Table(f"Trained on {reward}", note, columns, rows)


def _comparisons(analysis: Row) -> Table:
    rows = []
    for row in analysis["comparisons"]:
        difference, size = row["difference"], row["effect_size"]
        size = "–" if size is None else f"{size:+.2f}".replace("-", "−")
        p_values = [p_value(difference["p"]), p_value(difference["p_holm"])]
        rows.append([row["label"], row["against"], interval(difference), size, *p_values])
    note = (
        "Difference of the ODE rewards, paired by seed, prompt and noise. Effect size: in standard deviations of the base model's "
        f"images. p adjusted by Holm's method for {'these ' if len(rows) > 1 else ''}{count_of(len(rows), 'comparison')}."
    )
    columns = ["condition", "against", "difference", "effect size", "p", "p, Holm"]
    return Table("Against the baseline", note, columns, rows)


def _best_weights(analysis: Row) -> Table:
    """The gain of the checkpoint with the best ODE reward over the last one (`checkpoint.best`)."""
    rows = []
    for c in analysis["conditions"]:
        if kept := c["best_weights"]:
            cells = [interval(kept[name], signed=name == "gain") for name in ("last", "best", "gain")]
            rows.append([c["label"], kept["reward"], *cells, str(len(c["seeds"]))])
    note = (
        "ODE reward of the last weights, and of those that had the best ODE reward when training was evaluated; on the measured "
        "images after the first ones, which are those of that evaluation."
    )
    return Table("Best checkpoint", note, ["condition", "chosen by", "last", "best", "best minus last", "seeds"], rows)


def _discretisation(analysis: Row) -> Table:
    rows = []
    for row in analysis["discretisation"]:
        change, theory, total, share = row["gap_change"], row["theory"], "–", "–"
        if theory is not None:
            total = f"{theory['total']:+.3f}".replace("-", "−")
            ratio = theory["discretisation"] / (theory["total"] or math.nan)
            share = share if math.isnan(ratio) else f"{100 * ratio:.0f} %"
        cells = [interval(row["base_gap"]), interval(change), p_value(change and change["p_holm"]), total, share]
        rows.append([_at(row["label"], row["own_steps"], row["steps"]), row["reward"], *cells])
    note = (
        "The base model's gap is there before any training: the steps, the start, the errors of the network and guidance make it. What "
        "training adds is the change, with p adjusted by Holm's method for all rows. Theory: the gap of r(x) = −x² for a standard normal "
        "target with an exact score at the same levels, and the share of it that the steps make (the rest is the wrong law at the "
        "start). Its size is in its own unit; only how it moves with η and the steps is to be compared."
    )
    heads = ["gap before training", "change by training", "p, Holm", "theory", "made by the steps"]
    return Table("The gap before training", note, ["condition", "reward", *heads], rows)


def _all_rewards(analysis: Row) -> Table:
    """The improvement of every measured reward, trained or not; no row for one reward."""
    names = list(dict.fromkeys(reward for c in analysis["conditions"] for reward in c["rewards"]))
    rows = []
    for c in analysis["conditions"] if len(names) > 1 else []:
        cells = dict.fromkeys(names, "–")
        for reward, estimates in c["estimates"][str(c["steps"])].items():
            trained = " (trained)" if reward in c["trained"] else ""
            cells[reward] = f"{interval(estimates['improvement'])}{trained}"
        rows.append([c["label"], *cells.values()])
    note = "Improvement in every reward that was measured, the ODE of the tuned minus that of the base model."
    return Table("All rewards", note, ["condition", *names], rows)


def _matrix(each: Row) -> Table:
    rows = [[row["label"], *(interval(cell, signed=False) for cell in row["cells"])] for row in each["rows"]]
    title = f"Sampler matrix: {each['family']}" + (f", {each['steps']} steps" if "steps" not in each["family"] else "")
    note = f"Reward ({each['reward']}) of each training condition (rows) under each sampler of deployment (columns)."
    best = []
    for row in each["rows"]:
        means = [(cell["mean"], -index) for index, cell in enumerate(row["cells"]) if cell is not None]
        best.append(-max(means)[1] if means else None)
    return Table(title, note, ["trained with", *each["columns"]], rows, best)


def count_of(number: int, what: str) -> str:
    """A number and its noun: `1 comparison`, `2 comparisons`."""
    return f"{number} {what}{'' if number == 1 else 's'}"

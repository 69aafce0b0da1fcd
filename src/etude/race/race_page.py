"""Results of a race: race.md, results.json and figures/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etude.errors import EtudeError
from etude.files import atomic_write_text
from etude.race.entries import Entries
from etude.race.race_analysis import analyse_race
from etude.race.race_tables import heat_tables, sentences
from etude.report.figures import LEVELS, Line, line_figure, standalone
from etude.study.directory import StudyDirectory
from etude.study.tables import anchor

Row = dict[str, Any]
SIZE = (4.6, 3.0)


def write_race(entries: Entries, directory: StudyDirectory) -> Path:
    """Write all results from the runs that are done, and return the path of race.md.

    A run whose files are damaged is left out and named there.

    Raises:
        EtudeError: there is no such directory, or its archive is damaged.
    """
    root = directory.root
    if not root.is_dir():
        raise EtudeError(f"'{root}' is not a directory: run the race first.")
    race = analyse_race(entries, directory)
    atomic_write_text(root / "results.json", json.dumps(race, ensure_ascii=False) + "\n")
    files = {f"{anchor(name)}.svg": (name, svg) for heat in race["heats"] for name, svg in figures(heat).items()}
    (root / "figures").mkdir(exist_ok=True)
    for name, (_, svg) in files.items():
        atomic_write_text(root / "figures" / name, standalone(svg))
    for old in (root / "figures").glob("*.svg"):
        if old.name not in files:
            old.unlink()
    atomic_write_text(root / "race.md", markdown(race))
    return root / "race.md"


def markdown(race: Row) -> str:
    """The text of `race.md`; other pages can include its tables by name (PyMdown's snippets)."""
    parts = [f"# {race['name']}\n", f"<!-- --8<-- [start:basis] -->\n{basis(race)}\n<!-- --8<-- [end:basis] -->\n"]
    parts += [f"Left out: {name}, {reason}\n" for name, reason in race["unusable"].items()]
    for heat in race["heats"]:
        parts += [f"## {heat['name']}\n", "\n".join(f"* {text}" for text in sentences(heat)) + "\n"]
        for table in heat_tables(race, heat):
            name = anchor(table.title if heat["name"] in table.title else f"{heat['name']} {table.title}")
            text = table.markdown().strip()
            parts += [f"### {table.title}\n", f"<!-- --8<-- [start:{name}] -->\n{text}\n<!-- --8<-- [end:{name}] -->\n"]
        parts += [f"![{name}](figures/{anchor(name)}.svg)" for name in figures(heat)]
    return "\n".join(parts).rstrip() + "\n"


def basis(race: Row) -> str:
    """The runs, seeds, images and prompts behind the numbers."""
    done = sum(len(m["seeds"]) for heat in race["heats"] for m in heat["methods"])
    planned = sum(len(race["seeds"]) for heat in race["heats"] for _ in heat["methods"])
    pilots = [pilot for heat in race["heats"] for m in heat["methods"] for pilot in m["pilots"]]
    return (
        f"{done} of {planned} runs and {sum(p['done'] for p in pilots)} of {len(pilots)} pilots are done. A run has a budget of "
        f"{race['budget']:,} network evaluations of training: a forward counts 1, a forward with its backward 3, and "
        "classifier-free guidance twice. Square brackets are 95 % intervals over seeds and prompts."
    )


def figures(heat: Row) -> dict[str, str]:
    """The figures of a heat by name, one of each kind for each group of methods."""
    done = [m for m in heat["methods"] if m["seeds"]]
    groups: dict[str, list[Row]] = {}
    for method in done:
        groups.setdefault(method["group"], []).append(method)
    rewards = list(done[0]["final"]) if done else []
    kinds = [(f"improvement against {axis}", "improvement", heat["reward"], axis) for axis in ("spent", "seconds")]
    kinds += [(f"held-out {r}", "improvement", r, "spent") for r in rewards if r != heat["reward"]]
    kinds += [(f"gap against {axis}", "gap", heat["reward"], axis) for axis in ("spent", "seconds")]
    drawn = {}
    for kind, quantity, reward, axis in kinds:
        ends = [p[key] for m in done for p in m["curves"][quantity][reward] for key in ("low", "high")]
        for group, members in groups.items():
            lines = [_line(m, k, len(members), quantity, reward, axis) for k, m in enumerate(members)]
            said = "; ".join(f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines)
            name = f"{heat['name']}, {kind.replace('spent', 'network evaluations')}, {group}"
            limits = min(ends), max(ends)
            label = "network evaluations of training" if axis == "spent" else "seconds of training"
            drawn[name] = line_figure(lines, f"{name}: {said}.", zero=True, limits=limits, size=SIZE, xlabel=label)
    drawn |= _against_eta(heat, groups)
    for group, members in groups.items() if len(rewards) > 1 else []:
        other = next(reward for reward in rewards if reward != heat["reward"])
        lines = [_frontier(m, k, len(members), heat["reward"], other) for k, m in enumerate(members)]
        name = f"{heat['name']}, frontier, {group}"
        label = f"change of the held-out {other}"
        drawn[name] = line_figure(lines, f"{name}.", zero=True, size=SIZE, xlabel=label, integers=False)
    return drawn


def _against_eta(heat: Row, groups: dict[str, list[Row]]) -> dict[str, str]:
    """The improvement at the end against the eta of training, a curve for each group that varies gDDIM's eta."""
    curves: dict[str, list[tuple[float, Row]]] = {}
    for group, members in groups.items():
        found = [(m["eta"], m["final"][heat["reward"]]["improvement"]) for m in members if m["eta"] is not None]
        if len({eta for eta, _ in found}) > 1:
            curves[group] = sorted(found, key=lambda point: point[0])
    if not curves:
        return {}
    lines = [Line.of(points, _colour(k, len(curves)), group) for k, (group, points) in enumerate(curves.items())]
    name = f"{heat['name']}, improvement against training eta"
    said = "; ".join(f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines)
    return {name: line_figure(lines, f"{name}: {said}.", zero=True, size=SIZE, xlabel="training η", integers=False)}


def _colour(index: int, count: int) -> str:
    return LEVELS[round(index * (len(LEVELS) - 1) / max(count - 1, 1))]


def _line(method: Row, index: int, count: int, quantity: str, reward: str, axis: str) -> Line:
    points = list(zip(method["curves"][axis], method["curves"][quantity][reward], strict=True))
    return Line.of(points, _colour(index, count), method["name"])


def _frontier(method: Row, index: int, count: int, reward: str, other: str) -> Line:
    """The course of training in the plane of the held-out reward's change and the improvement."""
    both = [[point["mean"] for point in method["curves"]["improvement"][r]] for r in (other, reward)]
    return Line(both[0], both[1], _colour(index, count), method["name"])

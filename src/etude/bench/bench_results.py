"""Results of a benchmark: estimates of every cell, and paired differences between cells.

    between models      r(model b) - r(model a), under the protocol's sampler
    between samplers    r(sampler) - r(the protocol's sampler), of each model: the gap of deployment
    sensitivity         the same for the samplers around the protocol's, with each model's improvement there

All cells share prompts, noise and rewards. A difference is taken image by image, and its interval is
clustered by prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from etude.bench.cells import Cell
from etude.bench.protocol import Pinned
from etude.config import SamplerSettings
from etude.errors import EtudeError, brief
from etude.measuring.pairs import Scores
from etude.measuring.statistics import estimate_mean
from etude.prompts import clusters

Row = dict[str, Any]


def analyse(
    pinned: Pinned, model: str, cells: Sequence[Cell], variations: Sequence[SamplerSettings], earlier: dict[str, Row]
) -> Row:
    """The content of `results.json`: settings, estimates, differences, and every score.

    Args:
        pinned: the protocol.
        model: name of the base model.
        cells: every model under every sampler, the base model and the protocol's sampler first.
        variations: samplers of the sensitivity table.
        earlier: content of other results to compare with, by their file.
    """
    group = clusters([*pinned.prompts.texts] * pinned.settings.images_per_prompt)
    names = list(dict.fromkeys(cell.entry for cell in cells))
    by_cell = {(cell.entry, cell.sampler): cell for cell in cells}
    point, samplers = pinned.sampler, list(dict.fromkeys(cell.sampler for cell in cells))

    def scores(entry: str, sampler: SamplerSettings = point) -> Scores:
        return by_cell[entry, sampler].scores

    environments = [*{json.dumps(each): each for cell in cells for each in cell.environments}.values()]
    between = [
        {"model": b, "against": a, **_difference(scores(b), scores(a), group)} for a, b in combinations(names, 2)
    ]
    around = []
    for sampler in samplers:
        if sampler == point:
            continue
        kind = "sensitivity" if sampler in variations else "sampler"
        for entry in names:
            row = {"kind": kind, "model": entry, "sampler": sampler.label}
            row |= _difference(scores(entry, sampler), scores(entry), group)
            if entry != names[0]:
                gain = _difference(scores(entry, sampler), scores(names[0], sampler), group)["difference"]
                row["improvement"] = gain
            around.append(row)
    return {
        "name": pinned.settings.name,
        "hash": pinned.hash,
        "protocol": pinned.canonical,
        "model": model,
        "sampler": point.label,
        "prompts": pinned.prompts.texts,
        "environments": environments,
        "models": {name: next(c.identity for c in cells if c.entry == name) for name in names},
        "estimates": [
            {"model": c.entry, "sampler": c.sampler.label, "estimates": _estimates(c.scores, group)} for c in cells
        ],
        "between_models": between,
        "around_the_sampler": around,
        "earlier": [
            _against(file, other, pinned, {n: scores(n) for n in names}, group) for file, other in earlier.items()
        ],
        "scores": [
            {
                "model": c.entry,
                "sampler": c.sampler.model_dump(mode="json"),
                "environments": [environments.index(each) for each in c.environments],
                "scores": {name: values.tolist() for name, values in c.scores.items()},
            }
            for c in cells
        ],
    }


def read_results(path: Path) -> Row:
    """The content of another benchmark's `results.json`.

    Raises:
        EtudeError: it cannot be read, or is none.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        tree = json.loads(file.read_bytes())
        missing = {"hash", "protocol", "scores", "model", "sampler"} - set(tree)
        found = all({"model", "sampler", "scores"} <= set(row) for row in tree["scores"]) if not missing else False
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise EtudeError(f"results '{file}' cannot be read: {brief(error, 120)}.") from None
    if not found or not isinstance(tree["protocol"], dict):
        raise EtudeError(f"'{file}' is no results.json of `etude bench`: give its directory, or that file.")
    return dict(tree)


def other_protocol(theirs: Row, ours: Row) -> str:
    """The settings in which two canonical protocols differ, as a clause."""
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if theirs.get(key) != ours.get(key)]
    shown = {"prompts": "the prompts", "rewards": "the rewards or their weights"}

    def clause(key: str) -> str:
        if key in shown:
            return shown[key]
        if key == "sampler":
            pairs = [(k, (theirs.get(key) or {}).get(k), v) for k, v in ours[key].items()]
            return ", ".join(f"{k} {a} there and {b} here" for k, a, b in pairs if a != b)
        return f"{key} {theirs.get(key)} there and {ours.get(key)} here"

    return "; ".join(clause(key) for key in keys) or "nothing that is stored"


def _against(file: str, other: Row, pinned: Pinned, scores: dict[str, Scores], group: list[int]) -> Row:
    """The comparison with earlier results: paired differences under one hash, and a refusal under another."""
    known = {"file": file, "hash": other["hash"], "environments": other.get("environments", [])}
    if other["hash"] != pinned.hash:
        why = other_protocol(other["protocol"], pinned.canonical)
        return {**known, "comparable": False, "differs": why, "differences": []}
    own = pinned.sampler.model_dump(mode="json")
    theirs: dict[str, Scores] = {}
    for row in other["scores"]:
        if row["sampler"] == own:
            theirs[str(row["model"])] = _scores(file, row["scores"], next(iter(scores.values())))
    rows = [
        {"model": name, "against": f"{there} of {file}", **_difference(mine, earlier, group)}
        for name, mine in scores.items()
        for there, earlier in theirs.items()
    ]
    return {**known, "comparable": True, "differs": "", "differences": rows}


def _scores(file: str, values: Any, like: Scores) -> Scores:
    """The scores of earlier results, of the same rewards and images as `like`."""
    try:
        scores = {name: np.array(values[name], float) for name in like}
        whole = all(scores[name].shape == like[name].shape and np.isfinite(scores[name]).all() for name in like)
    except (ValueError, TypeError, KeyError, IndexError):
        whole = False
    if not whole:
        raise EtudeError(f"results '{file}' are damaged: they lack scores of the protocol that they name.")
    return scores


def _estimates(scores: Scores, group: list[int]) -> dict[str, Row]:
    return {name: estimate_mean(values, group).to_dict() for name, values in scores.items()}


def _difference(scores: Scores, against: Scores, group: list[int]) -> Row:
    """Estimates of the paired difference, by reward."""
    return {"difference": _estimates({name: values - against[name] for name, values in scores.items()}, group)}

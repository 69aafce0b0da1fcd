"""What the cells of a study left behind, read, and grouped into conditions: cells that differ in nothing but the seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etude.config import TrainConfig, leaves
from etude.config.sections import PromptsConfig
from etude.errors import EtudeError, brief
from etude.rewards.reward import WEIGHTED_SUM
from etude.runs.reader import parse_metrics
from etude.sampling.etas import eta_text
from etude.study.directory import StudyDirectory
from etude.study.study_file import Cell, Study

_WATCHING = ("evaluation.every", "evaluation.num_images", "evaluation.held_out_rewards", "evaluation.grid_images")
_NOT_A_CONDITION = (*_WATCHING, "checkpoint.", "memory.", "trackers")
"""What does not change the weights that a run ends with: it sets cells apart only where a study names it among its keys."""
_NAMES = {"sampling.eta": "η", "sampling.num_steps": "steps", "rewards": "reward", "optimizer.learning_rate": "rate"}
SAMPLER_KEYS = ("sampling.kernel", "sampling.eta", "sampling.eta_schedule")
"""What conditions of one family, drawn in one figure, may differ in."""
Values = list[tuple[str, Any]]


@dataclass(frozen=True)
class CellResult:
    """One cell that was trained and measured.

    Attributes:
        evaluations: (iteration, evaluation) while it was trained.
        samplers: rows of `scores.json`.
        best: ODE scores of the best weights by reward, where the run kept them.
        clusters: which prompt each image shows.
        levels: "a" and "s" by number of steps.
        seconds: training and measurement.
    """

    cell: Cell
    evaluations: list[tuple[int, dict[str, Any]]]
    samplers: list[dict[str, Any]]
    best: dict[str, list[float]] | None
    clusters: list[int]
    prompts: list[str]
    levels: dict[str, dict[str, list[float]]]
    base_image: str | None
    seconds: float

    def find(self, kind: str, steps: int, name: str | None = None, eta: Any = None) -> dict[str, Any] | None:
        """The row of a sampler."""
        for row in self.samplers:
            same = row["kind"] == kind and row["steps"] == steps
            if same and name in (None, row["sampler"]) and eta in (None, row["eta"]):
                return row
        return None


@dataclass(frozen=True)
class Condition:
    """Cells that differ in the seed alone.

    Attributes:
        values: what sets it apart from other conditions of the study, by dotted key.
        results: of its seeds, in their order.
        untold: keys among them that its label leaves out.
    """

    values: Values
    results: tuple[CellResult, ...]
    untold: frozenset[str] = frozenset()

    @property
    def config(self) -> TrainConfig:
        """Of the first seed."""
        return self.results[0].cell.config

    @property
    def steps(self) -> int:
        """Of the evaluation."""
        return self.config.evaluation.num_steps or self.config.sampling.num_steps

    @property
    def seeds(self) -> list[int]:
        """In their order."""
        return [result.cell.config.seed for result in self.results]

    @property
    def trained(self) -> list[str]:
        """Names of the rewards it is judged by: the trained one, or the weighted sum of several."""
        names = list(self.config.rewards)
        return names if len(names) == 1 else [WEIGHTED_SUM]

    @property
    def rewards(self) -> list[str]:
        """Names of all that were measured, the trained ones first."""
        measured = list(self.results[0].samplers[0]["scores"])
        return list(dict.fromkeys([*self.trained, *measured]))

    @property
    def eta(self) -> float | None:
        """Of training; None where it moves or differs between steps."""
        sampling = self.config.sampling
        return sampling.eta if isinstance(sampling.eta, float) and sampling.eta_schedule is None else None

    @property
    def label(self) -> str:
        """`η = 1.2, alignment`."""
        return self.text()

    def text(self, without: tuple[str, ...] = ()) -> str:
        """The values in words, those of some keys left out."""
        parts = [_words(key, value, self.config) for key, value in self.values if key not in self.untold.union(without)]
        return ", ".join(part for part in parts if part) or self.config.model

    @cached_property
    def clusters(self) -> list[int]:
        """Which prompt each image shows; the same in every seed.

        Raises:
            EtudeError: it is not the same.
        """
        first = self.results[0]
        for other in self.results[1:]:
            if (other.clusters, other.prompts) != (first.clusters, first.prompts):
                raise EtudeError(
                    f"cells '{first.cell.slug}' and '{other.cell.slug}' were measured on other prompts: delete their scores.json, "
                    "and run the study again."
                )
        return first.clusters


def collect(study: Study, directory: StudyDirectory) -> tuple[list[CellResult], dict[str, str]]:
    """The results of the cells that are done, in the order of the study; and why others cannot be used, by cell."""
    found, unusable = [], {}
    for cell in study.cells:
        progress = directory.progress(cell, look_for_others=False)
        try:
            if progress.state == "done":
                found.append(_result(cell, directory, progress.seconds))
        except (EtudeError, KeyError) as error:
            unusable[cell.slug] = f"'{directory.cell(cell)}' cannot be read: {brief(error)}"
        if progress.state == "failed":
            unusable[cell.slug] = progress.failure
    return found, unusable


def _result(cell: Cell, directory: StudyDirectory, seconds: float) -> CellResult:
    metrics, stored = directory.file(cell, "metrics.jsonl"), directory.file(cell, "scores.json")
    rows = [] if metrics is None else parse_metrics(metrics.text(), metrics.place)[0]
    evaluations = [(row["iteration"], row["evaluation"]) for row in rows if row.get("evaluation")]
    scores = {} if stored is None else stored.mapping()
    measured = {name: scores[name] for name in ("samplers", "best", "clusters", "prompts", "levels", "base_image")}
    return CellResult(cell, evaluations, seconds=seconds, **measured)


def conditions(results: list[CellResult]) -> list[Condition]:
    """The cells grouped by everything but the seed, in the order of the study; in none is a seed twice."""
    found = _grouped(results, _NOT_A_CONDITION)
    if any(len(set(condition.seeds)) < len(condition.seeds) for condition in found):
        found = _grouped(results, ())
    return found


def _grouped(results: list[CellResult], apart: tuple[str, ...]) -> list[Condition]:
    """Grouped by the seed and keys that begin as one of `apart`, unless the study names them, left out."""
    names = {key for result in results for key in result.cell.values}
    trees = [dict(_settings(result.cell.config, apart, names)) for result in results]
    varying = [key for key in (trees[0] if trees else {}) if len({_frozen(tree[key]) for tree in trees}) > 1]
    groups: dict[str, tuple[Values, list[CellResult]]] = {}
    for result, tree in zip(results, trees, strict=True):
        values = [(key, tree[key]) for key in varying]
        groups.setdefault(_frozen(values), (values, []))[1].append(result)
    untold = frozenset(_implied(varying, names, trees))
    return [
        Condition(values, tuple(sorted(members, key=lambda r: r.cell.config.seed)), untold)
        for values, members in groups.values()
    ]


def _implied(varying: list[str], named: set[str], trees: list[dict[str, Any]]) -> Iterator[str]:
    """Keys that the study sets by the way: the values of those that it names say what theirs are."""
    told = [key for key in varying if any(f"{name}.".startswith(f"{key}.") for name in named)]
    for key in varying:
        pairs = {(_frozen([tree[name] for name in told]), _frozen(tree[key])) for tree in trees}
        if key not in told and len(pairs) == len({names for names, _ in pairs}):
            yield key


def families(found: list[Condition], without: tuple[str, ...]) -> list[tuple[str, list[Condition]]]:
    """Conditions that agree in everything but the keys `without`: (label, members), in order."""
    groups: dict[str, list[Condition]] = {}
    for condition in found:
        rest = [(key, value) for key, value in condition.values if key not in without]
        groups.setdefault(_frozen(rest), []).append(condition)
    return [(members[0].text(without), members) for members in groups.values()]


def _settings(config: TrainConfig, apart: tuple[str, ...], names: set[str]) -> Iterator[tuple[str, Any]]:
    for key, value in leaves(config.model_dump(mode="json")):
        if key != "seed" and (key in names or not key.startswith(apart)):
            yield key, value


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _words(key: str, value: Any, config: TrainConfig) -> str:
    if key == "rewards":
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in value.items())
    if key == "sampling.eta":
        return f"η = {config.sampling.eta_text}"
    if key.startswith("sampling.eta_schedule"):
        return ""  # said beside eta
    if key == "sampling.kernel":
        return "" if value == "gddim" else str(value)
    if key == "sampling.window":
        return "every step" if value is None else _window_label(value)
    if key == "objective.timestep_fraction":
        return "" if value == 1 else f"{100 * value:.0f} % of them trained"
    if key == "checkpoint.best":
        return "" if value is None else "best checkpoint kept"
    if key == "prompts.train":
        return "" if value == PromptsConfig().train else f"prompts {value}"
    if key == "sampling.num_steps":
        return f"{value} steps"
    name = _NAMES.get(key, key.rpartition(".")[2])
    return f"{name} {value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else f"{name} {value}"


def _window_label(window: dict[str, Any]) -> str:
    tail = "" if window["compression"] is None else f", Flash {window['compression']:g}"
    return f"{window['strategy']} window of {window['size']}{tail}"


def sampler_label(row: dict[str, Any]) -> str:
    """A sampler of `scores.json` in words."""
    if row["kind"] == "ode":
        return "ODE"
    if row["kind"] == "solver":
        return {"dpmsolver++": "DPM-Solver++ 2M", "unipc": "UniPC", "heun": "Heun", "ddim": "DDIM", "euler": "Euler"}[
            row["sampler"]
        ]
    kernel = "SDE" if row["sampler"] == "gddim" else row["sampler"]
    return f"{kernel} η = {eta_text(row['eta'])}"

"""Results of the cells of a study, grouped into conditions.

A condition is a set of cells that differ in the seed alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etude.config import TrainConfig, leaves
from etude.errors import EtudeError, brief
from etude.rewards.reward import WEIGHTED_SUM
from etude.runs.reader import parse_metrics
from etude.study.directory import StudyDirectory
from etude.study.labels import setting_label
from etude.study.study_file import Cell, Study

_WATCHING = ("evaluation.every", "evaluation.num_images", "evaluation.held_out_rewards", "evaluation.grid_images")
_NOT_A_CONDITION = (*_WATCHING, "checkpoint.", "memory.", "trackers")
"""Beginnings of keys that do not change the final weights.

Cells that differ in such a key are different conditions only if the study varies the key.
"""
SAMPLER_KEYS = ("sampling.kernel", "sampling.eta", "sampling.eta_schedule")
"""Keys in which the conditions of one family may differ. A figure shows one family."""
Values = list[tuple[str, Any]]


@dataclass(frozen=True)
class CellResult:
    """One cell that was trained and measured.

    Attributes:
        evaluations: (iteration, evaluation) of the evaluations during training.
        samplers: rows of `scores.json`, one a sampler.
        best: ODE scores of the best weights, by reward. None: the run kept no best weights.
        clusters: index of the prompt of each image.
        prompts: texts of the prompts.
        levels: signal "a" and noise "s" at every level, by number of steps.
        base_image: file with the images of the base model. None: no images were kept.
        seconds: time of training and measurement.
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
        """The row of a sampler, or None; a name or an eta of None matches every one."""
        for row in self.samplers:
            same = row["kind"] == kind and row["steps"] == steps
            if same and name in (None, row["sampler"]) and eta in (None, row["eta"]):
                return row
        return None


@dataclass(frozen=True)
class Condition:
    """Cells that differ in the seed alone.

    Attributes:
        values: (dotted key, value) of every setting in which conditions of the study differ.
        results: results by ascending seed.
        implied: keys of `values` that follow from other keys; labels leave them out.
    """

    values: Values
    results: tuple[CellResult, ...]
    implied: frozenset[str] = frozenset()

    @property
    def config(self) -> TrainConfig:
        """The configuration of the first seed."""
        return self.results[0].cell.config

    @property
    def steps(self) -> int:
        """The denoising steps of evaluation."""
        return self.config.evaluation.num_steps or self.config.sampling.num_steps

    @property
    def seeds(self) -> list[int]:
        """The seeds in ascending order."""
        return [result.cell.config.seed for result in self.results]

    @property
    def trained(self) -> list[str]:
        """The reward by which the condition is judged: the trained one, or the sum of several."""
        names = list(self.config.rewards)
        return names if len(names) == 1 else [WEIGHTED_SUM]

    @property
    def rewards(self) -> list[str]:
        """The names of all measured rewards, the trained one first."""
        measured = list(self.results[0].samplers[0]["scores"])
        return list(dict.fromkeys([*self.trained, *measured]))

    @property
    def eta(self) -> float | None:
        """The eta of training; None where eta differs between iterations or steps."""
        sampling = self.config.sampling
        return sampling.eta if isinstance(sampling.eta, float) and sampling.eta_schedule is None else None

    @property
    def label(self) -> str:
        """The settings in words: `alignment, η = 1.2`."""
        return self.text()

    def text(self, without: tuple[str, ...] = ()) -> str:
        """The settings in words, without those of some keys."""
        silent = self.implied.union(without)
        parts = [setting_label(key, value, self.config) for key, value in self.values if key not in silent]
        return ", ".join(part for part in parts if part) or self.config.model

    @cached_property
    def clusters(self) -> list[int]:
        """The index of the prompt of each image, equal in all seeds.

        Raises:
            EtudeError: seeds were measured on different prompts.
        """
        first = self.results[0]
        for other in self.results[1:]:
            if (other.clusters, other.prompts) != (first.clusters, first.prompts):
                raise EtudeError(
                    f"cells '{first.cell.slug}' and '{other.cell.slug}' were measured on different prompts: "
                    "delete their scores.json (unpack them first if they are packed), and run the study again."
                )
        return first.clusters


def collect(study: Study, directory: StudyDirectory) -> tuple[list[CellResult], dict[str, str]]:
    """Read the results of all cells that are done.

    Returns:
        The results in the order of the study, and by cell why other cells are unusable.
    """
    results, unusable = [], {}
    for cell in study.cells:
        progress = directory.progress(cell, look_for_others=False)
        try:
            if progress.state == "done":
                results.append(_result(cell, directory, progress.seconds))
        except (EtudeError, KeyError) as error:
            unusable[cell.slug] = f"'{directory.cell(cell)}' cannot be read: {brief(error)}"
        if progress.state == "failed":
            unusable[cell.slug] = progress.failure
    return results, unusable


def _result(cell: Cell, directory: StudyDirectory, seconds: float) -> CellResult:
    metrics, stored = directory.file(cell, "metrics.jsonl"), directory.file(cell, "scores.json")
    rows = [] if metrics is None else parse_metrics(metrics.text(), metrics.place)[0]
    evaluations = [(row["iteration"], row["evaluation"]) for row in rows if row.get("evaluation")]
    scores = {} if stored is None else stored.mapping()
    measured = {name: scores[name] for name in ("samplers", "best", "clusters", "prompts", "levels", "base_image")}
    return CellResult(cell, evaluations, seconds=seconds, **measured)


def conditions(results: list[CellResult]) -> list[Condition]:
    """Group results by every setting but the seed, in the order of the study.

    No condition has a seed twice.
    """
    groups = _grouped(results, _NOT_A_CONDITION)
    if any(len(set(condition.seeds)) < len(condition.seeds) for condition in groups):
        groups = _grouped(results, ())
    return groups


def _grouped(results: list[CellResult], apart: tuple[str, ...]) -> list[Condition]:
    """Group results by every setting but the seed and those whose key begins as one of `apart`.

    A key that the study varies counts in any case.
    """
    names = {key for result in results for key in result.cell.values}
    trees = [dict(_settings(result.cell.config, apart, names)) for result in results]
    varying = [key for key in (trees[0] if trees else {}) if len({_frozen(tree[key]) for tree in trees}) > 1]
    groups: dict[str, tuple[Values, list[CellResult]]] = {}
    for result, tree in zip(results, trees, strict=True):
        values = [(key, tree[key]) for key in varying]
        groups.setdefault(_frozen(values), (values, []))[1].append(result)
    implied = frozenset(_implied(varying, names, trees))
    return [
        Condition(values, tuple(sorted(members, key=lambda r: r.cell.config.seed)), implied)
        for values, members in groups.values()
    ]


def _implied(varying: list[str], named: set[str], trees: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the keys whose value follows from the values of the keys that the study names."""
    chosen = [key for key in varying if any(f"{name}.".startswith(f"{key}.") for name in named)]
    for key in varying:
        pairs = {(_frozen([tree[name] for name in chosen]), _frozen(tree[key])) for tree in trees}
        if key not in chosen and len(pairs) == len({values for values, _ in pairs}):
            yield key


def families(members: list[Condition], without: tuple[str, ...]) -> list[tuple[str, list[Condition]]]:
    """Group conditions that agree in all but the keys `without`: (label, conditions), in order."""
    groups: dict[str, list[Condition]] = {}
    for condition in members:
        rest = [(key, value) for key, value in condition.values if key not in without]
        groups.setdefault(_frozen(rest), []).append(condition)
    return [(family[0].text(without), family) for family in groups.values()]


def _settings(config: TrainConfig, apart: tuple[str, ...], names: set[str]) -> Iterator[tuple[str, Any]]:
    for key, value in leaves(config.model_dump(mode="json")):
        if key != "seed" and (key in names or not key.startswith(apart)):
            yield key, value


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True)

"""Results of the cells of a study, grouped into conditions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.config import TrainConfig, leaves
from etude.errors import EtudeError, brief
from etude.prompts import clusters
from etude.rewards.reward import WEIGHTED_SUM
from etude.runs.reader import parse_metrics
from etude.study.directory import StudyDirectory
from etude.study.inference import Floats
from etude.study.labels import setting_label
from etude.study.study_file import Cell, Study

_WATCHING = tuple(
    f"evaluation.{key}" for key in ("every", "num_images", "held_out_rewards", "grid_images", "strip_images", "path_kl")
)
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
        best: ODE scores of the best weights, by reward. None: the run kept none.
        clusters: index of the prompt of each image, in `prompts`.
        levels: signal "a" and noise "s" at every level, by number of steps.
        base_image: file with the images of the base model. None: none were kept.
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
        wanted = {"kind": kind, "steps": steps, "sampler": name, "eta": eta}
        return next((row for row in self.samplers if all(v in (None, row[k]) for k, v in wanted.items())), None)


@dataclass(frozen=True)
class Condition:
    """Cells that differ in the seed alone, by ascending seed.

    Attributes:
        values: (dotted key, value) of every setting in which conditions of the study differ.
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
    def clusters(self) -> list[int]:
        """The index of the prompt of each image, equal in all seeds."""
        return self.results[0].clusters

    @property
    def steps(self) -> int:
        """The denoising steps of evaluation."""
        return self.config.evaluation.num_steps or self.config.sampling.num_steps

    @property
    def step_counts(self) -> list[int]:
        """The denoising steps of the measurement."""
        return list(dict.fromkeys(row["steps"] for row in self.results[0].samplers))

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
        return list(dict.fromkeys([*self.trained, *self.results[0].samplers[0]["scores"]]))

    @property
    def eta(self) -> float | None:
        """The eta of training; None where eta differs between iterations or steps."""
        sampling = self.config.sampling
        return sampling.eta if isinstance(sampling.eta, float) and sampling.eta_schedule is None else None

    def text(self, without: tuple[str, ...] = ()) -> str:
        """The settings in words, as `alignment, η = 1.2`, without those of some keys."""
        silent = self.implied.union(without)
        parts = [setting_label(key, value, self.config) for key, value in self.values if key not in silent]
        return ", ".join(part for part in parts if part) or self.config.model

    def scores(
        self, reward: str, kind: str, steps: int, name: str | None = None, eta: Any = None, base: bool = False
    ) -> Floats | None:
        """Scores `[seeds, images]` under a sampler (`find`); None where a seed was not measured."""
        rows = [row for result in self.results if (row := result.find(kind, steps, name, eta)) is not None]
        if len(rows) < len(self.results):
            return None
        return np.array([row["base" if base else "scores"][reward] for row in rows])


def collect(study: Study, directory: StudyDirectory) -> tuple[list[CellResult], dict[str, str]]:
    """The results of cells that are done, in order, and why others are unusable, by cell."""
    results, unusable = [], {}
    for cell in study.cells:
        progress = directory.progress(cell, look_for_others=False)
        try:
            if progress.state == "done":
                results.append(read_result(cell, directory, progress.seconds))
        except (EtudeError, KeyError) as error:
            unusable[cell.slug] = f"'{directory.cell(cell)}' cannot be read: {brief(error)}"
        if progress.state == "failed":
            unusable[cell.slug] = progress.failure
    return results, unusable


def read_result(cell: Cell, directory: StudyDirectory, seconds: float) -> CellResult:
    """Read the result of a cell that is done. EtudeError or KeyError: a file is damaged."""
    metrics, stored = directory.file(cell, "metrics.jsonl"), directory.file(cell, "scores.json")
    rows = [] if metrics is None else parse_metrics(metrics.text(), metrics.place)[0]
    evaluations = [(row["iteration"], row["evaluation"]) for row in rows if row.get("evaluation")]
    scores = {} if stored is None else stored.mapping()
    measured = {name: scores[name] for name in ("samplers", "best", "clusters", "prompts", "levels", "base_image")}
    first = dict(enumerate(clusters(measured["prompts"])))  # scores from before knew no repeated prompts
    measured["clusters"] = [first[index] for index in measured["clusters"]]
    return CellResult(cell, evaluations, seconds=seconds, **measured)


def conditions(results: list[CellResult]) -> list[Condition]:
    """Group results by every setting but the seed, in order; no condition has a seed twice.

    Raises:
        EtudeError: seeds of a condition were measured on different prompts.
    """
    groups = _grouped(results, _NOT_A_CONDITION)
    if any(len(set(condition.seeds)) < len(condition.seeds) for condition in groups):
        groups = _grouped(results, ())
    for first, *others in (condition.results for condition in groups):
        for other in others:
            if (other.clusters, other.prompts) != (first.clusters, first.prompts):
                raise EtudeError(
                    f"cells '{first.cell.slug}' and '{other.cell.slug}' were measured on different prompts: "
                    "delete their scores.json (unpack them first if they are packed), and run the study again."
                )
    return groups


def _grouped(results: list[CellResult], apart: tuple[str, ...]) -> list[Condition]:
    """Leave out of the settings the seed and what begins with `apart`, unless a study names it."""
    names = {key for result in results for key in result.cell.values}
    trees = [
        {k: v for k, v in settings if k != "seed" and (k in names or not k.startswith(apart))}
        for settings in (leaves(result.cell.config.model_dump(mode="json")) for result in results)
    ]
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


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True)

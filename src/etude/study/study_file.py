"""The file of a study: what it holds, and the cells that it stands for.

A study is a base configuration, overrides, and grids. A grid maps dotted keys to lists of values and stands for their Cartesian
product; `cells` lists single ones. Every combination is run with every seed. Two cells of one configuration are one cell.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from etude.config import Section, TrainConfig, leaves, parse_config
from etude.config.tree import explain, read_tree, set_key
from etude.config.yaml_text import parse_yaml, read_yaml_text
from etude.errors import EtudeError

SolverName = Literal["ddim", "euler", "heun", "dpmsolver++", "unipc"]
_LONGEST = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9.+-]+")
Keys = dict[str, Any]


class MatrixConfig(Section):
    """The samplers that every tuned model is deployed with, beside the ODE and the SDE that it was trained with."""

    solvers: list[SolverName] = Field([], description="Deterministic solvers of diffusers.")
    etas: list[float] = Field([], description="Stochastic samplers: gddim at these values of eta.")

    @field_validator("etas")
    @classmethod
    def _positive(cls, etas: list[float]) -> list[float]:
        if any(eta <= 0 for eta in etas):
            raise ValueError("eta = 0 is the ODE, which is always measured; list values above 0")
        return etas


class MeasurementConfig(Section):
    """What is measured of every cell once it is trained, on images of its own: all cells of a seed share prompts and noise."""

    num_images: int = Field(128, ge=4, description="Images per sampler, spread over the prompts.")
    prompts: str | None = Field(None, description="Prompts shown; null is the cell's prompts.evaluation.")
    steps: list[int] | None = Field(None, description="Further step counts of the samplers, beside the cell's own.")
    matrix: MatrixConfig = MatrixConfig()
    shown: int = Field(8, ge=0, description="Images kept of each cell for the picture that compares them.")

    @field_validator("steps")
    @classmethod
    def _counts(cls, steps: list[int] | None) -> list[int] | None:
        if steps is not None and (not steps or min(steps) < 1):
            raise ValueError("list step counts of at least 1, or give null")
        return steps


class GridConfig(Section):
    """A Cartesian product."""

    name: str | None = Field(None, description="What the grid is called in tables; a prefix of nothing.")
    keys: dict[str, list[Any]] = Field(min_length=1, description="Dotted key of the configuration to list of values.")
    overrides: Keys = Field({}, description="Dotted keys that hold in this grid alone.")
    base: str | Keys | None = Field(None, description="Recipe of this grid; null is the study's.")
    measurement: MeasurementConfig | None = Field(None, description="In place of the study's.")

    @field_validator("keys")
    @classmethod
    def _not_empty(cls, keys: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in keys.items():
            if not values:
                raise ValueError(f"{key} has no value; list at least one")
        return keys


class StudyConfig(Section):
    """The tree of a study's file."""

    name: str = Field(description="Title of the report.", min_length=1)
    base: str | Keys = Field(description="Built-in recipe, YAML file, or the configuration itself.")
    overrides: Keys = Field({}, description="Dotted keys that hold in every cell.")
    seeds: list[int] = Field([0], min_length=1, description="Every combination is run with each of these.")
    grids: list[GridConfig] = Field([], description="Cartesian products.")
    cells: list[Keys] = Field([], description="Single combinations, as dotted keys.")
    baseline: Keys = Field(
        {"sampling.kernel": "gddim", "sampling.eta": 1.0},
        description="What cells are compared with: the cell that has these values and agrees in everything else.",
    )
    measurement: MeasurementConfig = MeasurementConfig()

    @field_validator("grids", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _something(self) -> StudyConfig:
        if not self.grids and not self.cells:
            raise ValueError("there is nothing to run: give grids, cells or both")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds} repeats one; a repeated run says nothing new")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        slug: name of its directory; does not change when the study's file grows.
        config: of the run.
        values: what the study says about it, by dotted key, seed included.
        grid: name of the grid that it comes from.
        measurement: what is measured of it.
    """

    slug: str
    config: TrainConfig
    values: Keys
    grid: str
    measurement: MeasurementConfig


@dataclass(frozen=True)
class Study:
    """A study's file, read.

    Attributes:
        settings: its tree.
        cells: without repetitions, in the order of the file.
        text: of the file.
    """

    settings: StudyConfig
    cells: tuple[Cell, ...]
    text: str


def load_study(path: Path) -> Study:
    """Reads a study's file and lays out its cells.

    Raises:
        EtudeError: the file, a key, or a cell's configuration cannot be used; the place is named.
    """
    place = f"study file '{path}'"
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise EtudeError(f"{place} {problem}: give a YAML file.")
    text = read_yaml_text(path, place)
    tree = parse_yaml(text, place)
    if not isinstance(tree, dict):
        raise EtudeError(f"{place} must hold a mapping of keys, not {type(tree).__name__}.")
    return parse_study(tree, place, text)


def parse_study(tree: Mapping[str, Any], place: str = "study", text: str = "") -> Study:
    """A study from its tree; `place` names it in errors.

    Raises:
        EtudeError: as `load_study`.
    """
    try:
        settings = StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise explain(error, place, StudyConfig) from None
    cells: list[Cell] = []
    for cell in _cells(settings, place):
        if any(cell.config == other.config for other in cells):
            continue
        if any(cell.slug == other.slug for other in cells):
            raise EtudeError(f"{place}: two different cells would both be called '{cell.slug}'; name what differs.")
        cells.append(cell)
    known = {key for cell in cells for key, _ in leaves(cell.config.model_dump(mode="json"))}
    unknown = next((key for key in settings.baseline if key not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "`etude recipes --keys` lists the keys."
        raise EtudeError(f"{place}: baseline names {unknown}, which no cell has: {hint}")
    return Study(settings, tuple(cells), text)


def _cells(settings: StudyConfig, place: str) -> Iterator[Cell]:
    """Every combination of every grid with every seed, repetitions included."""
    single = [
        GridConfig(name="cells", keys={k: [v] for k, v in values.items()} or {"seed": settings.seeds})
        for values in settings.cells
    ]
    for number, grid in enumerate([*settings.grids, *single], start=1):
        keys = dict(grid.keys)
        keys.setdefault("seed", settings.seeds)
        for combination in itertools.product(*keys.values()):
            values = {key: _readable(key, value) for key, value in zip(keys, combination, strict=True)}
            slug = _slug(values)
            config = _configuration(settings, grid, values, f"{place}, cell '{slug}'")
            yield Cell(slug, config, values, grid.name or f"grid {number}", grid.measurement or settings.measurement)


def _configuration(settings: StudyConfig, grid: GridConfig, values: Keys, place: str) -> TrainConfig:
    base = settings.base if grid.base is None else grid.base
    tree = copy.deepcopy(base) if isinstance(base, dict) else read_tree(base)
    for key, value in {**settings.overrides, **grid.overrides, **values}.items():
        set_key(tree, key, copy.deepcopy(_readable(key, value)), place)
    return parse_config(tree, place)


def _readable(key: str, value: Any) -> Any:
    """`rewards` may be one name, or a list of names of weight 1."""
    if key == "rewards" and isinstance(value, str):
        return {value: 1.0}
    if key == "rewards" and isinstance(value, list):
        return dict.fromkeys(value, 1.0)
    return value


def _slug(values: Keys) -> str:
    """`eta-1.2_alignment_seed-0`: readable, safe in any file system, and short enough."""
    parts = [_part(key, value) for key, value in values.items()]
    slug = "_".join(_UNSAFE.sub("-", part).strip("-.") for part in parts)
    if len(slug) > _LONGEST:
        slug = f"{slug[:_LONGEST]}-{hashlib.sha256(slug.encode()).hexdigest()[:8]}"
    return slug


def _part(key: str, value: Any) -> str:
    if key == "rewards" and isinstance(value, dict):
        return "+".join(name if weight == 1 else f"{_number(weight)}{name}" for name, weight in value.items())
    leaf = key.rpartition(".")[2]
    if isinstance(value, dict):
        return f"{leaf}-{hashlib.sha256(repr(sorted(value.items())).encode()).hexdigest()[:8]}"
    if isinstance(value, str) and leaf == "kernel":
        return value
    return f"{leaf}-{_number(value)}"


def _number(value: Any) -> str:
    """Shortest, if it is one."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)

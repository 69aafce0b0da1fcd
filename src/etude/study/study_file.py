"""The file of a study, read, checked, and laid out as cells."""

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
from etude.training.blueprint import make_algorithm

SolverName = Literal["ddim", "euler", "heun", "dpmsolver++", "unipc"]
_LONGEST = 120  # characters of a cell's name before it is cut and gets a hash
Keys = dict[str, Any]


class MatrixConfig(Section):
    """Samplers of deployment for every tuned model, beside the ODE and the SDE of its training."""

    solvers: list[SolverName] = Field([], description="Deterministic solvers of diffusers.")
    etas: list[float] = Field([], description="Stochastic samplers: gDDIM at these values of eta.")

    @field_validator("etas")
    @classmethod
    def _positive(cls, etas: list[float]) -> list[float]:
        if any(eta <= 0 for eta in etas):
            raise ValueError("eta = 0 is the ODE, which is always measured; list values above 0")
        return etas


class MeasurementConfig(Section):
    """The measurement of a trained cell. All cells of a seed share prompts and noise."""

    num_images: int = Field(128, ge=4, description="Images per sampler, spread over the prompts.")
    prompts: str | None = Field(None, description="Prompts of the images. null: the cell's `prompts.evaluation`.")
    steps: list[int] | None = Field(None, description="Further step counts of the samplers, beside the cell's own.")
    matrix: MatrixConfig = MatrixConfig()
    shown: int = Field(8, ge=0, description="Images of each cell that the page shows beside those of other cells.")

    @field_validator("steps")
    @classmethod
    def _counts(cls, steps: list[int] | None) -> list[int] | None:
        if steps is not None and (not steps or min(steps) < 1):
            raise ValueError("list step counts of at least 1, or give null")
        return steps


class GridConfig(Section):
    """A Cartesian product of values."""

    name: str | None = Field(None, description="Name in tables and listings. It is no part of a cell's name.")
    keys: dict[str, list[Any]] = Field(min_length=1, description="Lists of values by dotted key of the configuration.")
    overrides: Keys = Field({}, description="Values by dotted key that hold in this grid alone.")
    base: str | Keys | None = Field(None, description="Base configuration of this grid. null: the study's.")
    measurement: MeasurementConfig | None = Field(None, description="Measurement of this grid. null: the study's.")

    @field_validator("keys")
    @classmethod
    def _not_empty(cls, keys: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in keys.items():
            if not values:
                raise ValueError(f"{key} has no value; list at least one")
        return keys


class TrendsConfig(Section):
    """The analysis of long training: slopes of the gap, bands over seeds, and a gap under one SDE for all."""

    periods: list[tuple[int, int]] = Field([], description="First and last iteration of slopes beside that of all.")
    reference_eta: float = Field(
        1.0, gt=0, description="Eta of the gDDIM sampler that measures all conditions; it must be in the matrix's etas."
    )

    @field_validator("periods")
    @classmethod
    def _forward(cls, periods: list[tuple[int, int]]) -> list[tuple[int, int]]:
        for first, last in periods:
            if not 0 <= first < last:
                raise ValueError(f"the period {first} to {last} does not go forward; give its first iteration first")
        return periods


class StudyConfig(Section):
    """The settings of a study, as its file holds them."""

    name: str = Field(description="Title of the report.", min_length=1)
    base: str | Keys = Field(description="Built-in recipe, YAML file, or the configuration itself.")
    overrides: Keys = Field({}, description="Values by dotted key that hold in every cell.")
    seeds: list[int] = Field([0], min_length=1, description="Seeds with each of which every combination is run.")
    grids: list[GridConfig] = Field([], description="Cartesian products of values.")
    cells: list[Keys] = Field([], description="Single combinations: values by dotted key.")
    baseline: Keys = Field(
        {"sampling.kernel": "gddim", "sampling.eta": 1.0},
        description="Values of the cells with which others are compared. A cell's baseline agrees with it in all else.",
    )
    measurement: MeasurementConfig = MeasurementConfig()
    trends: TrendsConfig | None = Field(None, description="Analysis of long training. null: none.")

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
        slug: name of the cell and of its directory. It does not change when the study's file grows.
        values: values that the study gives the cell, by dotted key, seed included.
        measured: whether the weights are measured after training, beside the evaluations of the run.
    """

    slug: str
    config: TrainConfig
    values: Keys
    grid: str
    measurement: MeasurementConfig
    measured: bool = True


@dataclass(frozen=True)
class Study:
    """A study, as the text of its file describes it, with its cells in the file's order."""

    settings: StudyConfig
    cells: tuple[Cell, ...]
    text: str


def load_study(path: Path) -> Study:
    """Read a study's file and lay out its cells.

    Raises:
        EtudeError: the file, a key, or the configuration of a cell cannot be used.
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
    """Lay out a study from the values of its file; `place` names the file in errors.

    Two combinations of values that give one configuration are one cell.

    Raises:
        EtudeError: a key or the configuration of a cell cannot be used.
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
    if settings.trends is not None:
        eta = settings.trends.reference_eta
        lacking = next((cell for cell in cells if eta not in cell.measurement.matrix.etas), None)
        if lacking is not None:
            raise EtudeError(
                f"{place}: trends compare all conditions at reference_eta = {eta:g}, which cell '{lacking.slug}' is not "
                "measured at: add it to measurement.matrix.etas."
            )
    return Study(settings, tuple(cells), text)


def _cells(settings: StudyConfig, place: str) -> Iterator[Cell]:
    """Yield every combination of every grid with every seed, repetitions included."""
    single = [
        GridConfig(name="cells", keys={k: [v] for k, v in values.items()} or {"seed": settings.seeds})
        for values in settings.cells
    ]
    for number, grid in enumerate([*settings.grids, *single], start=1):
        keys = {**grid.keys, "seed": grid.keys.get("seed", settings.seeds)}
        for combination in itertools.product(*keys.values()):
            values = {key: _readable(key, value) for key, value in zip(keys, combination, strict=True)}
            slug = cell_name(values)
            config = _configuration(settings, grid, values, f"{place}, cell '{slug}'")
            yield Cell(slug, config, values, grid.name or f"grid {number}", grid.measurement or settings.measurement)


def _configuration(settings: StudyConfig, grid: GridConfig, values: Keys, place: str) -> TrainConfig:
    base = settings.base if grid.base is None else grid.base
    tree = copy.deepcopy(base) if isinstance(base, dict) else read_tree(base)
    for key, value in {**settings.overrides, **grid.overrides, **values}.items():
        set_key(tree, key, copy.deepcopy(_readable(key, value)), place)
    config = parse_config(tree, place)
    try:
        make_algorithm(config)
    except EtudeError as error:
        raise EtudeError(f"{place}: {error}") from error
    return config


def _readable(key: str, value: Any) -> Any:
    """Replace names under `rewards` by weights of 1; leave other values as they are."""
    if key == "rewards" and isinstance(value, str | list):
        return dict.fromkeys([value] if isinstance(value, str) else value, 1.0)
    return value


def file_name(text: str, also: str = "") -> str:
    """A name that is safe in any file system: `colorfulness-10-steps` of `colorfulness, 10 steps`.

    Every run of characters other than letters, digits, dots and those of `also` becomes one hyphen.
    """
    return re.sub(rf"[^A-Za-z0-9.{re.escape(also)}]+", "-", text).strip("-.")


def cell_name(values: Keys) -> str:
    """The name of a cell, as `alignment_eta-1.2_seed-0`, safe in any file system."""
    slug = "_".join(file_name(_part(key, value), also="+-") for key, value in values.items())
    if len(slug) > _LONGEST:
        slug = f"{slug[:_LONGEST]}-{hashlib.sha256(slug.encode()).hexdigest()[:8]}"
    return slug


def _part(key: str, value: Any) -> str:
    if key == "rewards" and isinstance(value, dict):
        return "+".join(name if weight == 1 else f"{number_text(weight)}{name}" for name, weight in value.items())
    leaf = key.rpartition(".")[2]
    if isinstance(value, dict):
        return f"{leaf}-{hashlib.sha256(repr(sorted(value.items())).encode()).hexdigest()[:8]}"
    if isinstance(value, str) and leaf == "kernel":
        return value
    return f"{leaf}-{number_text(value)}"


def number_text(value: Any) -> str:
    """A number as short as it can be written; any other value as Python prints it."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)

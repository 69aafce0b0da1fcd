"""The file of a race, read and checked: heats, methods, budgets and pilots."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from etude.config import Section
from etude.config.tree import explain
from etude.config.yaml_text import parse_yaml, read_yaml_text
from etude.errors import EtudeError
from etude.study.study_file import Keys, MatrixConfig, MeasurementConfig, file_name


class MethodConfig(Section):
    """A method: its settings, and the values among which its pilots choose."""

    group: str = Field("", description="Methods of one group share a figure. Default: the method is alone.")
    base: str | Keys | None = Field(None, description="Base configuration of this method. null: the race's.")
    overrides: Keys = Field({}, description="Values by dotted key that make the method.")
    pilots: dict[str, list[Any]] = Field(
        min_length=1, description="Lists of values by dotted key; every combination is a pilot."
    )

    @property
    def choices(self) -> list[Keys]:
        """The combinations of the pilots' values, in order."""
        return [dict(zip(self.pilots, values, strict=True)) for values in itertools.product(*self.pilots.values())]


class HeatConfig(Section):
    """One reward on which all methods race."""

    rewards: dict[str, float] | list[str] | str = Field(description="Rewards that are trained on.")
    targets: list[float] = Field(min_length=1, description="Improvements of the deployed reward to be reached.")
    overrides: Keys = Field({}, description="Values by dotted key that hold in this heat alone.")
    methods: list[str] | None = Field(None, description="Names of the methods that take part. null: all.")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each trained reward."""
        if isinstance(self.rewards, dict):
            return self.rewards
        return dict.fromkeys([self.rewards] if isinstance(self.rewards, str) else self.rewards, 1.0)

    @property
    def name(self) -> str:
        """The names of the trained rewards."""
        return " + ".join(self.weights)


class PilotsConfig(Section):
    """The short runs that choose each method's hyper-parameters: other seeds, other prompts."""

    budget: int = Field(ge=1, description="Network evaluations of training for each pilot.")
    seed: int = Field(1000, ge=0, description="Seed of the pilots; no seed of the race.")
    train: str = Field("emoji-train#train", description="Prompts that the pilots train on.")
    evaluation: str = Field("emoji-train#eval", description="Prompts that judge the pilots.")
    num_images: int = Field(64, ge=4, description="Pairs of images that judge a pilot.")
    largest_fall: dict[str, float] = Field(
        {}, description="Largest fall of held-out rewards: a pilot that exceeds one is chosen only if all do."
    )


class RaceConfig(Section):
    """The settings of a race, as its file holds them."""

    name: str = Field(description="Title of the results.", min_length=1)
    base: str | Keys = Field(description="Built-in recipe, YAML file, or the configuration itself.")
    overrides: Keys = Field({}, description="Values by dotted key that hold in every run.")
    budget: int = Field(ge=1, description="Network evaluations of training for each run.")
    evaluations: int = Field(4, ge=1, description="Evaluations along the budget, beside that of the base model.")
    seeds: list[int] = Field([0, 1, 2], min_length=2, description="Seeds with each of which every method is run.")
    pilots: PilotsConfig
    methods: dict[str, MethodConfig] = Field(min_length=2, description="Methods by name.")
    heats: list[HeatConfig] = Field(min_length=1, description="Heats, in the order in which they are run.")
    baseline: str = Field(description="Name of the method with which the others are compared.")
    num_images: int = Field(128, ge=4, description="Images per sampler after training, spread over the prompts.")
    reference_eta: float = Field(1.0, gt=0, description="Eta of the gDDIM sampler under which every gap is measured.")

    @model_validator(mode="after")
    def _fair(self) -> RaceConfig:
        counts = {name: len(method.choices) for name, method in self.methods.items()}
        first, other = next(iter(counts)), next((n for n in counts if counts[n] != len(self.first.choices)), None)
        if other is not None:
            raise ValueError(
                f"every method needs as many pilots as the others, but '{first}' has {counts[first]} and '{other}' "
                f"{counts[other]}: give the same number of combinations"
            )
        named = [self.baseline, *(name for heat in self.heats for name in heat.methods or [])]
        unknown = next((name for name in named if name not in self.methods), None)
        if unknown is not None:
            raise ValueError(f"'{unknown}' is none of the methods ({', '.join(self.methods)})")
        if self.pilots.seed in self.seeds:
            raise ValueError(f"pilots.seed = {self.pilots.seed} is a seed of the race; give another one")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds} repeats one; a repeated run says nothing new")
        for what, names in (("methods", list(self.methods)), ("heats", [heat.name for heat in self.heats])):
            slugs = [file_name(name) for name in names]
            if len(set(slugs)) < len(slugs) or not all(slugs):
                raise ValueError(f"two of the {what} have one name as a file, or none: {', '.join(slugs)}")
        return self

    @property
    def first(self) -> MethodConfig:
        """The first method."""
        return next(iter(self.methods.values()))

    @property
    def measurement(self) -> MeasurementConfig:
        """The measurement of every trained model."""
        return MeasurementConfig(num_images=self.num_images, matrix=MatrixConfig(etas=[self.reference_eta]))

    def entrants(self, heat: HeatConfig) -> list[str]:
        """The names of a heat's methods."""
        return list(self.methods) if heat.methods is None else heat.methods


@dataclass(frozen=True)
class RaceFile:
    """The settings and the text of a race's file; `place` names the file in errors."""

    settings: RaceConfig
    text: str
    place: str


def load_race(path: Path) -> RaceFile:
    """Read a race's file.

    Raises:
        EtudeError: the file or a key cannot be used.
    """
    place = f"race file '{path}'"
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise EtudeError(f"{place} {problem}: give a YAML file.")
    return parse_race(read_yaml_text(path, place), place)


def parse_race(text: str, place: str = "race") -> RaceFile:
    """Read a race from the text of its file; the errors are those of `load_race`."""
    tree = parse_yaml(text, place)
    if not isinstance(tree, dict):
        raise EtudeError(f"{place} must hold a mapping of keys, not {type(tree).__name__}.")
    try:
        settings = RaceConfig.model_validate({k: v for k, v in tree.items() if not str(k).startswith("x-")})
    except ValidationError as error:
        raise explain(error, place, RaceConfig) from None
    return RaceFile(settings, text, place)


def changes(old: RaceConfig, new: RaceConfig) -> Iterator[str]:
    """Yield the names of the settings that a race may not change once it has begun.

    Further seeds, heats and methods may be added at the end.
    """
    before, after = old.model_dump(), new.model_dump()
    for key, value in before.items():
        now = after[key]
        if key in ("seeds", "heats"):
            now = now[: len(value)]
        elif key == "methods":
            now = {name: method for name, method in now.items() if name in value}
        if now != value:
            yield key

"""Reading a configuration: a recipe's name or a YAML file, then overrides."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from etude.config.section import Section
from etude.config.sections import TrainConfig
from etude.config.yaml_text import parse_yaml, read_yaml_text
from etude.errors import EtudeError, brief_value, unknown

_BY_REWARD = ("rewards", "evaluation.stop_on_fall")
"""Keys whose value maps names of rewards to numbers."""
_RECIPES = resources.files("etude.config") / "recipes"
_NOT_QUOTED = re.compile(r"(?!\s*(?:[\"']|!!|(?:~|null|Null|NULL)?\s*\Z))")
"""The start of a text that YAML would not have to read: neither null, nor in quotes, nor tagged."""


def load_config(
    source: str | TrainConfig,
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
    rewards: Mapping[str, float] | None = None,
) -> TrainConfig:
    """Read a recipe or a YAML file, apply overrides and validate the result.

    Args:
        source: built-in recipe, YAML file, or a configuration to start from.
        overrides: values by dotted key, `{"sampling.eta": 1.2}`, or texts, `["sampling.eta=1.2"]`.
        rewards: weights by name that take the place of the recipe's; one that the recipe holds out is then trained instead.

    Raises:
        EtudeError: naming the key, the value and the remedy.

    Example:
        >>> import etude
        >>> config = etude.load_config("emoji-ddpo", {"sampling.eta": 1.5})
        >>> config.sampling.eta
        1.5
    """
    tree = source.model_dump(mode="json") if isinstance(source, TrainConfig) else read_tree(source)
    if rewards:
        tree["rewards"] = dict(rewards)
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            set_key(tree, key, value, f"the override of {key}")
    else:
        for item in overrides or []:
            _apply_override(tree, item)
    return parse_config(tree, "the configuration" if isinstance(source, TrainConfig) else f"'{source}'")


def parse_rewards(items: list[str]) -> dict[str, float]:
    """Weights by name, from items `NAME` or `NAME=WEIGHT`. Default weight: 1.

    The text after the last equals sign is the weight if it is a number. Otherwise it belongs to the
    name, which may be a url or hold options.

    Raises:
        EtudeError: a reward is given two weights.
    """
    rewards: dict[str, float] = {}
    for item in items:
        name, _, text = item.rpartition("=")
        try:
            reward, weight = name or item, float(text) if name else 1.0
        except ValueError:
            reward, weight = item, 1.0
        if rewards.setdefault(reward, weight) != weight:
            raise EtudeError(
                f"the reward '{reward}' is given the weights {rewards[reward]:g} and {weight:g}: give it once."
            )
    return rewards


def parse_config(tree: dict[str, Any], place: str = "configuration") -> TrainConfig:
    """Validates a tree of plain values; errors name it by `place`."""
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise explain(error, place) from None


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(p.name.removesuffix(".yaml") for p in _RECIPES.iterdir() if p.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """A built-in recipe as YAML, comments included."""
    if name not in recipe_names():
        raise unknown("recipe", name, recipe_names())
    return (_RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def read_tree(source: str) -> dict[str, Any]:
    """The plain values of a built-in recipe or a YAML file, not yet validated.

    Raises:
        EtudeError: the recipe or file does not exist, or holds no mapping.
    """
    path = Path(os.path.expanduser(source))
    if source not in recipe_names() and (path.suffix in {".yaml", ".yml"} or os.path.exists(path)):
        if not os.path.isfile(path):
            kind = "is a directory" if os.path.isdir(path) else "is no file"
            problem = kind if os.path.exists(path) else "does not exist"
            raise EtudeError(
                f"recipe file '{source}' {problem}: give a YAML file, or a built-in recipe ({', '.join(recipe_names())})."
            )
        place = f"recipe file '{source}'"
        tree = parse_yaml(read_yaml_text(path, place), place)
    else:
        tree = parse_yaml(recipe_text(source), f"'{source}'")
    if not isinstance(tree, dict):
        raise EtudeError(f"'{source}' must hold a mapping of configuration keys, not {type(tree).__name__}.")
    return tree


def _apply_override(tree: dict[str, Any], item: str) -> None:
    """Puts the value of a text `key=value` under its key."""
    by_reward = item.startswith(tuple(f"{section}." for section in _BY_REWARD))  # a reward's name may hold "="
    key, equals, text = item.rpartition("=") if by_reward else item.partition("=")
    if not equals or not key:
        raise EtudeError(f"--set takes key=value, for example sampling.eta=1.2, not '{item}'.")
    if _takes_text(_split_key(key)) and _NOT_QUOTED.match(text):
        set_key(tree, key, text.strip(), f"--set {item}")  # as it stands: a path may look like a number or a list
        return
    try:
        value = parse_yaml(text, "the value", comments=False)
    except EtudeError as error:
        raise EtudeError(
            f"--set {item[:200]}: it is not a YAML value that can be used ({str(error).rstrip('.')}); quote it."
        ) from None
    set_key(tree, key, value, f"--set {item}")


def _takes_text(location: list[str]) -> bool:
    """Whether the key at `location` holds a text, or a text or null."""
    model: type[Section] = TrainConfig
    *sections, leaf = location
    for name in sections:
        inner = _section(model.model_fields[name].annotation) if name in model.model_fields else None
        if inner is None:
            return False
        model = inner
    return leaf in model.model_fields and _alternatives(model.model_fields[leaf].annotation) <= {str, type(None)}


def _alternatives(annotation: Any) -> set[Any]:
    """The types that a field may hold, without their constraints."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_alternatives, get_args(annotation)))
    return {annotation}


def set_key(tree: dict[str, Any], key: str, value: Any, place: str) -> None:
    """Puts a value under a dotted key and creates missing sections on the way.

    `clip_range` and `clip_nats` are alternatives: setting one sets the other to null.

    Raises:
        EtudeError: a part of the key names a value, not a section; the message begins with `place`.
    """
    *parents, leaf = _split_key(key)
    for name in parents:
        if tree.get(name) is None:
            tree[name] = {}
        child = tree[name]
        if not isinstance(child, dict):
            raise EtudeError(f"{place}: '{name}' is a value, not a section.")
        tree = child
    alternative = {"clip_nats": "clip_range", "clip_range": "clip_nats"}.get(leaf)
    if alternative is not None and value is not None:
        tree[alternative] = None
    tree[leaf] = value


def _split_key(key: str) -> list[str]:
    """The parts of a dotted key. A reward's name is one part: package.module:function."""
    section = next((each for each in _BY_REWARD if key.startswith(f"{each}.")), None)
    return key.split(".") if section is None else [*section.split("."), key.removeprefix(f"{section}.")]


def explain(error: ValidationError, place: str, model: type[Section] = TrainConfig) -> EtudeError:
    """The first of pydantic's errors in one sentence: place, key, value and the rule that it breaks."""
    first, others = error.errors()[0], error.error_count() - 1
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    where = f"{place} (and {others} more error{'s' if others > 1 else ''} there)" if others else place
    if first["type"] == "extra_forbidden":
        return EtudeError(f"{where}: {_unknown_key(location, model)}")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    at = f"{key} = {brief_value(first['input'], 200)}" if key and not isinstance(first["input"], dict) else key
    return EtudeError(f"{where}: {at + ': ' if at else ''}{message.rstrip('.')}.")


def _unknown_key(location: list[str], model: type[Section]) -> str:
    """Suggests a key of the same name in another section, or else the nearest key in this one."""
    key, section = ".".join(location), model
    for name in location[:-1]:
        if name in section.model_fields:  # an index into a list is none
            section = _section(section.model_fields[name].annotation) or section
    siblings = [".".join([*location[:-1], name]) for name in section.model_fields]
    near = [name for name, _, _ in describe_fields(model) if name.rpartition(".")[2] == location[-1]]
    near = near or difflib.get_close_matches(key, siblings, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown key '{key}': {hint}the keys there are {', '.join(siblings)}."


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, also if optional or in a list. None: a plain value."""
    candidates = get_args(annotation) or (annotation,)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def describe_fields(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, help) of every field; of an optional section, too, before its fields."""
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is None or field.default is None:
            yield f"{prefix}{name}", field.default, " ".join((field.description or "").split())
        if section is not None:
            yield from describe_fields(section, f"{prefix}{name}.")


def difference(old: TrainConfig, new: TrainConfig) -> tuple[str, Any, Any] | None:
    """The first setting that differs: (dotted key, old value, new value). None: no setting differs."""
    for (key, before), (_, after) in zip(leaves(old.model_dump()), leaves(new.model_dump()), strict=True):
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
            inner = next(name for name in before if before[name] != after[name])
            return f"{key}.{inner}", before[inner], after[inner]
        return key, before, after
    return None


def continuation(old: TrainConfig, new: TrainConfig) -> tuple[str, Any, Any] | None:
    """The `difference` for a run that goes on, which may have more `iterations` than before.

    Where eta moves over the iterations, each would have had another one, so `iterations` must stay.
    """
    schedule = new.sampling.eta_schedule
    fixed = schedule is not None and schedule.over == "iterations" and schedule.kind != "constant"
    if new.iterations > old.iterations and not fixed:
        old = old.model_copy(update={"iterations": new.iterations})
    return difference(old, new)


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting, with the same keys for every configuration.

    Sections that may be null and mappings by reward count as one value each.
    """
    for key, value in tree.items():
        if (
            isinstance(value, dict)
            and key not in {"window", "eta_schedule", "deployment"}
            and f"{prefix}{key}" not in _BY_REWARD
        ):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

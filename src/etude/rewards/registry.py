"""The table of rewards by name. Every entry is a factory, so that a name costs nothing until somebody asks for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from etude.errors import EtudeError, brief, unknown

if TYPE_CHECKING:
    from torch import Tensor


class Reward(Protocol):
    """`reward(images, prompts, **metadata) -> scores`; larger is better.

    Args:
        images: uint8 [n, 3, h, w], values 0..255, RGB.
        prompts: n texts, the i-th belongs to the i-th image.
        metadata: whatever else the caller knows about the samples; a reward ignores what it does not use.

    Returns:
        float32 [n], finite.
    """

    def __call__(self, images: Tensor, prompts: list[str], **metadata: Any) -> Tensor: ...


RewardT = TypeVar("RewardT", bound=Callable[..., Any])


@dataclass(frozen=True)
class _WithOptions:
    """The factory of a reward whose name may be followed by a colon and options, `pickscore:/models/pickscore`."""

    path: str

    def __call__(self, options: str = "") -> Reward:
        made: Reward = _import(self.path).from_options(options)
        return made


_factories: dict[str, Callable[[], Reward]] = {
    "aesthetic": _WithOptions("etude.rewards.aesthetic:Aesthetic"),
    "alignment": lambda: _import("etude.rewards.alignment:load")(),
    "clip_score": _WithOptions("etude.rewards.clip:CLIPScore"),
    "colorfulness": lambda: _import("etude.rewards.colorfulness:colorfulness"),
    "hpsv2": _WithOptions("etude.rewards.hpsv2:HPSv2"),
    "imagereward": _WithOptions("etude.rewards.imagereward:ImageReward"),
    "jpeg_compressibility": lambda: _import("etude.rewards.jpeg:jpeg_compressibility"),
    "jpeg_incompressibility": lambda: _import("etude.rewards.jpeg:jpeg_incompressibility"),
    "pickscore": _WithOptions("etude.rewards.clip:PickScore"),
}
_loaded: dict[str, Reward] = {}


def register(name: str) -> Callable[[RewardT], RewardT]:
    """Decorator that adds a reward under `name`: a function, or a class, of which one instance is made at first use.

    Registering a name again replaces it, so that a notebook cell can be run twice.

    Raises:
        EtudeError: if the name cannot be one (empty, or with a colon, which marks an import path).
    """
    _check_name(name)

    def add(reward: RewardT) -> RewardT:
        register_factory(name, lambda: _instance(reward))
        return reward

    return add


def register_factory(name: str, factory: Callable[[], Reward]) -> None:
    """Adds a reward that is built by `factory()` at its first use: the way in for scorers that load a network.

    Raises:
        EtudeError: if the name cannot be one (empty, or with a colon, which marks an import path).
    """
    _check_name(name)
    _factories[name] = factory
    _loaded.pop(name, None)


def names() -> list[str]:
    """Names that `get` knows, sorted."""
    return sorted(_factories)


def get(name: str) -> Reward:
    """The reward of that name, or the callable at the import path `package.module:attribute`.

    After the name of a model reward the colon begins its options instead: `name:model`, `name:model,key=value`,
    `name:key=value` (`etude.rewards.base.ModelReward` lists them); such a name comes before a module of the same name.

    Modules in the working directory are found too. A reward is built once and then shared.

    Raises:
        EtudeError: if the name is unknown, or the module or the attribute of the path is missing or not callable.
    """
    if name not in _loaded:
        if name not in _factories and ":" not in name:
            raise unknown("reward", name, names())
        _loaded[name] = _build(name)
    return _loaded[name]


def _check_name(name: str) -> None:
    from etude.rewards.scoring import WEIGHTED_SUM

    if not name.strip() or ":" in name or name == WEIGHTED_SUM:
        raise EtudeError(
            f"a reward cannot be registered as '{name}': give a name without a colon (that marks an import path) "
            f"other than '{WEIGHTED_SUM}' (that names the sum of several rewards)."
        )


def _build(name: str) -> Reward:
    base, _, options = name.partition(":")
    factory = _factories.get(base)
    found: Callable[[], Reward]
    if name in _factories:
        found = _factories[name]
    elif isinstance(factory, _WithOptions):
        found = partial(factory, options)
    else:
        found = partial(_instance, _import(name))
    try:
        return found()
    except EtudeError:
        raise
    except Exception as error:  # the user's constructor: whatever it raises has to say which reward it was
        raise EtudeError(f"reward '{name}' could not be built: {type(error).__name__}: {brief(error)}") from error


def _instance(reward: Any) -> Reward:
    made: Reward = reward() if isinstance(reward, type) else reward
    return made


def _import(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        with _working_directory_importable():
            module = import_module(module_name)
    except Exception as error:  # the user's code runs at import: whatever it raises has to say which reward it was
        raise EtudeError(
            f"reward '{path}': module '{module_name}' cannot be imported ({type(error).__name__}: {brief(error)}); "
            "install it, or run from the directory that holds it."
        ) from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        problem = "has no attribute" if found is None else "holds something that is not callable as"
        raise EtudeError(
            f"reward '{path}': module '{module_name}' {problem} '{attribute}'; give module:function, "
            "where function(images, prompts, **metadata) returns one float32 score per image."
        )
    return found


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """A console script does not see the modules beside the recipe; `python -m` does. Last, so as to shadow nothing."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(here)
        sys.path.reverse()

"""The table of rewards by name. Every entry is a factory, so that a name costs nothing until somebody asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from etude.errors import EtudeError, brief, unknown
from etude.registry import import_callable

if TYPE_CHECKING:
    from torch import Tensor


class Reward(Protocol):
    """`reward(images, prompts, **metadata) -> scores`; larger is better.

    A reward may have further methods, which are called if they are there: `load()`, once before a run, to get ready;
    `submit(images, prompts, **metadata)`, which returns a `concurrent.futures.Future` of the scores at once and is then called instead,
    for those that wait for something else than this process; `offload()`, after each use under `memory.offload`, to leave the device.
    """

    def __call__(self, images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
        """Scores `[n]`, float32 and finite.

        Args:
            images: uint8 `[n, 3, h, w]`, values 0..255, RGB.
            prompts: n texts, the i-th belongs to the i-th image.
            metadata: what else the prompt set says (`etude.prompts`): by name, a list with an entry for each image. A reward
                without `**metadata` gets those that it has a keyword for.
        """


RewardT = TypeVar("RewardT", bound=Callable[..., Any])
PLUGINS = "etude.rewards"
"""The entry point group in which an installed package offers rewards: `name = "package.module:attribute"`."""


@dataclass(frozen=True)
class _WithOptions:
    """The factory of a reward whose name may be followed by a colon and options, `pickscore:/models/pickscore`."""

    path: str

    def __call__(self, options: str = "") -> Reward:
        made: Reward = _import(self.path).from_options(options)
        return made


_factories: dict[str, Callable[[], Reward]] = {
    "aesthetic": _WithOptions("etude.rewards.models.aesthetic:Aesthetic"),
    "alignment": lambda: _import("etude.rewards.alignment:load")(),
    "clip_score": _WithOptions("etude.rewards.models.clip:CLIPScore"),
    "colorfulness": lambda: _import("etude.rewards.colorfulness:colorfulness"),
    "hpsv2": _WithOptions("etude.rewards.models.hpsv2:HPSv2"),
    "imagereward": _WithOptions("etude.rewards.models.imagereward:ImageReward"),
    "jpeg_compressibility": lambda: _import("etude.rewards.jpeg:jpeg_compressibility"),
    "jpeg_incompressibility": lambda: _import("etude.rewards.jpeg:jpeg_incompressibility"),
    "pickscore": _WithOptions("etude.rewards.models.clip:PickScore"),
}
_loaded: dict[str, Reward] = {}
WEIGHTS_GB = {"aesthetic": 1.2, "clip_score": 0.6, "hpsv2": 3.9, "imagereward": 1.9, "pickscore": 3.9}
"""GB that the published weights of the preference models take in float32, as they are used."""
CLOSED_FORMS = ("colorfulness", "jpeg_compressibility", "jpeg_incompressibility")
"""Rewards without weights."""


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
    """Names that `get` knows, sorted: built-in and registered ones, and those that installed packages offer."""
    return sorted({*_factories, *(plugin.name for plugin in entry_points(group=PLUGINS))})


def get(name: str) -> Reward:
    """The reward of that name, the callable at the import path `package.module:attribute`, or the one behind a url.

    A name is looked for among the registered and built-in rewards first, then among the entry points of `PLUGINS`, which
    are functions, or classes of which one instance is made. A url, `http://host:port/path`, is an
    `etude.rewards.remote.client.RemoteReward`. After the name of a model reward the colon begins its options instead of an
    attribute: `name:model`, `name:model,key=value`, `name:key=value` (`etude.rewards.models.model_reward.ModelReward` lists them); such a
    name comes before a module of the same name.

    Modules in the working directory are found too. A reward is built once and then shared.

    Raises:
        EtudeError: if the name is unknown, or the module or the attribute of the path is missing or not callable; if a package's
            reward cannot be imported, or two packages offer it; if a url cannot be one.
    """
    if name not in _loaded:
        _loaded[name] = _build(name)
    return _loaded[name]


def _check_name(name: str) -> None:
    from etude.rewards.reward import WEIGHTED_SUM

    if not name.strip() or ":" in name or name == WEIGHTED_SUM:
        raise EtudeError(
            f"a reward cannot be registered as '{name}': give a name without a colon (that marks an import path) "
            f"other than '{WEIGHTED_SUM}' (that names the sum of several rewards)."
        )


def _build(name: str) -> Reward:
    try:
        return _find(name)()
    except EtudeError:
        raise
    except Exception as error:  # the user's constructor: whatever it raises has to say which reward it was
        raise EtudeError(f"reward '{name}' could not be built: {type(error).__name__}: {brief(error)}") from error


def _find(name: str) -> Callable[[], Reward]:
    """What builds the reward of that name."""
    if name in _factories:
        return _factories[name]
    base, colon, options = name.partition(":")
    if base.lower() in {"http", "https"} and options.startswith("//"):
        made: Callable[[str], Reward] = _import("etude.rewards.remote.client:RemoteReward.from_name")
        return partial(made, name)
    factory = _factories.get(base)
    if isinstance(factory, _WithOptions):
        return partial(factory, options)
    if colon:
        return partial(_instance, _import(name))
    plugins = tuple(entry_points(group=PLUGINS, name=name))
    if not plugins:
        raise unknown("reward", name, names())
    return partial(_instance, _load_plugin(name, plugins))


def _load_plugin(name: str, plugins: tuple[EntryPoint, ...]) -> Any:
    """What the only entry point of that name refers to."""
    owners = sorted({plugin.dist.name if plugin.dist else "an unnamed package" for plugin in plugins})
    if len({plugin.value for plugin in plugins}) > 1:
        raise EtudeError(
            f"reward '{name}' is offered by several packages ({', '.join(owners)}): uninstall all but one, "
            f"or give an import path ({' or '.join(sorted(plugin.value for plugin in plugins))})."
        )
    place = f"reward '{name}' of the package '{owners[0]}' ({plugins[0].value})"
    try:
        found = plugins[0].load()
    except Exception as error:  # the package's code runs at import: whatever it raises has to say whose it is
        raise EtudeError(
            f"{place} cannot be imported ({type(error).__name__}: {brief(error)}): update or uninstall that package."
        ) from error
    if not callable(found):
        raise EtudeError(f"{place} is {type(found).__name__}, which is not callable: update or uninstall that package.")
    return found


def _instance(reward: Any) -> Reward:
    made: Reward = reward() if isinstance(reward, type) else reward
    return made


def _import(path: str) -> Any:
    wanted = "module:function, where function(images, prompts, **metadata) returns one float32 score per image"
    return import_callable(path, "reward", wanted)


WEIGHTED_SUM = "weighted_sum"
"""The name under which the weighted sum of several raw rewards is reported."""

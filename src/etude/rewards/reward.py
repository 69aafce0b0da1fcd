"""Rewards by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from etude.errors import EtudeError, brief
from etude.registry import REWARDS, import_callable
from etude.undisturbed import undisturbed

if TYPE_CHECKING:
    from torch import Tensor


class Reward(Protocol):
    """`reward(images, prompts, **metadata) -> scores`; larger is better.

    A reward may have further methods, which are called if they exist:

    - `load()` is called once before a run, to read weights or to reach a server.
    - `submit(images, prompts, **metadata)` returns a `concurrent.futures.Future` of the scores at
      once. It is called instead of the reward itself, for rewards that wait for another machine.
    - `offload()` is called after each use under `memory.offload`, to free the device.

    A reward that compares the images of a group with one another has an attribute
    `whole_groups = True`. It gets all images of a group in one call, and a keyword `groups`: a list
    with a number for each image, equal within a group. An attribute `least_images` says how many
    images of a prompt it needs: a measurement or a run with fewer is refused before it begins.
    """

    def __call__(self, images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
        """Scores `[n]`, float32 and finite, of uint8 RGB images `[n, 3, h, w]` and their prompts.

        The metadata are the other fields of the prompt set (`etude.prompts`), lists of n entries. A
        reward without `**metadata` gets only the fields for which it has a keyword.
        """


RewardT = TypeVar("RewardT", bound=Callable[..., Any])
_loaded: dict[str, Reward] = {}
_factories: dict[str, Callable[[], Reward]] = {}
WEIGHTED_SUM = "weighted_sum"
"""The name under which the weighted sum of several raw rewards is reported."""
WEIGHTS_GB = {
    "aesthetic": 1.2, "clip_iqa": 0.6, "clip_score": 0.6, "hpsv2": 3.9, "hpsv3": 33.2, "imagereward": 1.9, "pickscore": 3.9,
}  # fmt: skip
"""Size in GB of the published weights of the preference models, in float32, as they are used."""
CLOSED_FORMS = ("colorfulness", "jpeg_compressibility", "jpeg_incompressibility")
"""Rewards without weights."""


def register(name: str) -> Callable[[RewardT], RewardT]:
    """Decorator that adds a reward under `name`: a function, or a class, instantiated at first use.

    A name may be registered again, so that a notebook cell can be run twice. An `EtudeError`
    refuses a name that is empty, is reserved, or has a colon (which marks an import path).

    Example:
        >>> import etude, torch
        >>> @etude.register_reward("brightness")
        ... def brightness(images, prompts, **metadata):
        ...     return images.float().mean(dim=(1, 2, 3)) / 255
        >>> etude.score(["brightness"], torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), ["snow"])
        {'brightness': tensor([1.])}
    """
    if not name.strip() or ":" in name or name == WEIGHTED_SUM:
        other = f"other than '{WEIGHTED_SUM}' (that names the sum of several rewards)"
        remedy = f"give a name without a colon (that marks an import path) {other}"
        raise EtudeError(f"a reward cannot be registered as '{name}': {remedy}.")
    add = REWARDS.register(name)

    def replace(reward: RewardT) -> RewardT:
        _factories.pop(name, None)
        _loaded.pop(name, None)
        return add(reward)

    return replace


def register_factory(name: str, factory: Callable[[], Reward]) -> None:
    """Registers a reward that `factory()` builds at its first use; see `register`."""
    register(name)(factory)
    _factories[name] = factory


def names() -> list[str]:
    """Names that `get` knows, sorted: built-in, registered, and those of installed packages."""
    return REWARDS.names()


def get(name: str) -> Reward:
    """The reward of a name, an import path `package.module:attribute`, or a url; built once, shared.

    A url, `http://host:port/path`, gives an `etude.rewards.remote.client.RemoteReward`. After the
    name of a model reward the colon starts its options instead of an attribute: `name:model`,
    `name:model,key=value`, `name:key=value` (`etude.rewards.models.model_reward.ModelReward` lists
    them). Such a name wins over a module of the same name.

    Raises:
        EtudeError: as `Registry.get`, the url is invalid, or the reward cannot be built.
    """
    if name not in _loaded:
        try:
            with undisturbed():
                _loaded[name] = _build(name)
        except EtudeError:
            raise
        except Exception as error:  # a user's constructor raises anything; the error names the reward
            raise EtudeError(f"reward '{name}' could not be built: {type(error).__name__}: {brief(error)}") from error
    return _loaded[name]


def files(name: str) -> dict[str, Path]:
    """The files of this machine that make up a reward, by name: its code, and weights that it reads from the disk.

    Empty for a reward that was registered in this process.
    """
    base = name.partition(":")[0]
    is_code = base not in REWARDS.builtin and base.lower() not in {"http", "https"}
    return {**(REWARDS.files(name) if is_code else {}), **getattr(get(name), "files", dict)()}


def sources(name: str) -> list[str]:
    """The directories, files and hub ids from which a reward reads weights; empty for one that reads none by name."""
    return list(getattr(get(name), "sources", list)())


def _build(name: str) -> Any:
    if name in _factories:
        return _factories[name]()
    base, _, options = name.partition(":")
    if base.lower() in {"http", "https"} and options.startswith("//"):
        return import_callable("etude.rewards.remote.client:RemoteReward.from_name", "reward", REWARDS.wanted)(name)
    # Only a built-in or registered name may take options: any other text before a colon is a module.
    thing: Any = REWARDS.get(base) if base in REWARDS.builtin or base in REWARDS.registered else None
    if hasattr(thing, "from_options"):
        return thing.from_options(options)
    thing = REWARDS.get(name)
    return thing() if isinstance(thing, type) else thing

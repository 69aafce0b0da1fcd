"""Doors: kernels, windows, rewards, objectives, advantages and pipeline families by name.

A registry holds import paths and loads nothing before a name is used, so names are checked without
torch. It looks a name up, in this order, among what was registered in this process, what is built
in, and what installed packages offer. Any `package.module:attribute` is a name, too.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from etude.errors import EtudeError, brief, unknown
from etude.undisturbed import undisturbed

ThingT = TypeVar("ThingT", bound=Callable[..., Any])
_PATH = re.compile(r"[\w.]+:[\w.]+")


@dataclass(frozen=True)
class Entry:
    """A built-in name: its import path, a clause for help texts, and the published name of its use."""

    path: str
    about: str = ""
    title: str = ""


class Registry:
    """All kernels, or all things of another kind, by name: registered, built in, or of an installed package.

    Args:
        kind: noun for errors, for example "kernel".
        group: entry-point group of installed packages, for example "etude.kernels".
        wanted: description of what an import path must refer to, for errors.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, Entry], wanted: str) -> None:
        self.kind, self.group, self.builtin, self.wanted = kind, group, builtin, wanted
        self.registered: dict[str, Any] = {}
        self._imported: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[ThingT], ThingT]:
        """Decorator that adds a class or function under `name`, for this process.

        The name has no colon. It may be registered again, so that a notebook cell can be run twice.
        """
        if not name.strip() or ":" in name:
            remedy = "give a name without a colon (that marks an import path)"
            raise EtudeError(f"a {self.kind} cannot be registered as '{name}': {remedy}.")

        def add(thing: ThingT) -> ThingT:
            self.registered[name] = thing
            return thing

        return add

    def names(self) -> list[str]:
        """Every name, sorted: registered, built in, or offered by an installed package."""
        return sorted({*self.registered, *self.builtin, *(plugin.name for plugin in entry_points(group=self.group))})

    def check(self, name: str) -> str:
        """Returns the name, or raises `errors.unknown`; an import path is checked for its form alone."""
        known = name in self.registered or name in self.builtin or _PATH.fullmatch(name)
        if not known and name not in (names := self.names()):  # which reads the metadata of every installed package
            raise unknown(self.kind, name, names)
        return name

    def get(self, name: str) -> Any:
        """The thing itself, imported at first use.

        Raises:
            EtudeError: the name is unknown, the module cannot be imported, the attribute is missing
                or not callable, or two packages offer the name.
        """
        if name not in self.registered:
            self._imported[name] = self._import(name)
        return self.registered.get(name, self._imported.get(name))

    def files(self, name: str) -> dict[str, Path]:
        """Files with the code of a name, by their path from its directory.

        They are those of its module, and of the modules in the same directory that it imports.
        Empty for what is built in, was registered in this process, or has no file.
        """
        if name in self.registered or name in self.builtin:
            return {}
        thing = self.get(name)
        home = sys.modules.get(name.partition(":")[0] if ":" in name else thing.__module__)
        if home is None or home.__name__.partition(".")[0] in {"etude", *sys.stdlib_module_names}:
            return {}
        directory = Path(getattr(home, "__file__", None) or "").parent
        found: dict[str, Path] = {}
        modules: list[ModuleType | None] = [home]
        while modules:
            module = modules.pop()
            path = Path(getattr(module, "__file__", None) or "")
            if module is None or not path.is_relative_to(directory) or not path.is_file():
                continue
            place = path.relative_to(directory).as_posix()
            if place not in found:
                found[place] = path
                code = [value for value in vars(module).values() if isinstance(value, ModuleType | type | FunctionType)]
                modules += [v if isinstance(v, ModuleType) else sys.modules.get(v.__module__) for v in code]
        return dict(sorted(found.items()))

    def title(self, name: str) -> str:
        """Published name of the choice: a built-in entry's, or the attribute `title` of another thing.

        Without a title, or before the import, it is the name itself.
        """
        if name in self.builtin and name not in self.registered:
            return self.builtin[name].title
        thing = self.registered.get(name, self._imported.get(name))
        return str(getattr(thing, "title", name.rpartition(":")[2]))

    def about(self) -> str:
        """The built-in names with a clause each, for help texts."""
        return "; ".join(f"{name}: {entry.about}" if entry.about else name for name, entry in self.builtin.items())

    def _import(self, name: str) -> Any:
        if name in self.builtin:
            return import_callable(self.builtin[name].path, self.kind, self.wanted)
        plugins = tuple(entry_points(group=self.group, name=name))
        if not plugins:
            return import_callable(self.check(name), self.kind, self.wanted)
        owners = sorted({plugin.dist.name if plugin.dist else "an unnamed package" for plugin in plugins})
        if len(paths := sorted({plugin.value for plugin in plugins})) > 1:
            remedy = f"uninstall all but one, or give an import path ({' or '.join(paths)})"
            raise EtudeError(f"{self.kind} '{name}' is offered by several packages ({', '.join(owners)}): {remedy}.")
        place = f"{self.kind} '{name}' of the package '{owners[0]}' ({plugins[0].value})"
        remedy = "update or uninstall that package."
        try:
            with undisturbed():
                thing = plugins[0].load()
        except Exception as error:  # the package's code runs at import: whatever it raises has to say whose it is
            raise EtudeError(
                f"{place} cannot be imported ({type(error).__name__}: {brief(error)}): {remedy}"
            ) from error
        if not callable(thing):
            raise EtudeError(f"{place} is {type(thing).__name__}, which is not callable: {remedy}")
        return thing


def import_callable(path: str, kind: str, wanted: str) -> Any:
    """The callable at an import path. Modules in the working directory are importable from now on.

    Args:
        path: `package.module:attribute`, the attribute with dots if it is inside another.
        kind: noun for errors, as `wanted`: "reward", "prompts".

    Raises:
        EtudeError: the module cannot be imported, another one hides the file of that name in the
            working directory, or the attribute is missing or not callable.
    """
    module_name, _, attribute = path.partition(":")
    try:
        # A console script does not see the modules beside the recipe. Their directory comes last, so that it shadows
        # nothing, and stays, because a module may import its helpers when it is called.
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)
        own = module_name.partition(".")[0] == "etude"  # whose modules change nothing, and may load without torch
        with nullcontext() if own or module_name in sys.modules else undisturbed():
            thing: Any = import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's code runs at import: it may raise anything
        problem = f"module '{module_name}' cannot be imported ({type(error).__name__}: {brief(error)})"
        remedy = "install it, or run from the directory that holds it"
        raise EtudeError(f"{kind} '{path}': {problem}; {remedy}.") from error
    if not own:
        _check_not_hidden(module_name, f"{kind} '{path}'")
    module, place = thing, getattr(thing, "__file__", None) or "built into Python"
    for part in attribute.split("."):
        thing = getattr(thing, part, None)
    if not callable(thing):
        problem = "has no attribute" if thing is None else "holds something that is not callable as"
        raise EtudeError(
            f"{kind} '{path}': module '{module.__name__}' ({place}) {problem} '{attribute}'; give {wanted}."
        )
    return thing


def _check_not_hidden(module_name: str, subject: str) -> None:
    """Refuses a module in whose place a file of the working directory was meant."""
    name = module_name.partition(".")[0]
    here, used = Path.cwd(), getattr(sys.modules.get(name), "__file__", None)
    for file in (here / name / "__init__.py", here / f"{name}.py"):
        if file.is_file() and not (used and os.path.exists(used) and os.path.samefile(file, used)):
            place = f"'{used}'" if used else "built into Python"
            remedy = f"rename '{file}', or run from another directory"
            raise EtudeError(f"{subject}: module '{name}' is {place}, not '{file}': {remedy}.")


KERNELS = Registry(
    "kernel",
    "etude.kernels",
    {
        "gddim": Entry("etude.sampling.kernels:GDDIM", "any model, any eta"),
        "ddim": Entry("etude.sampling.kernels:DDIM", "any model, to a largest eta"),
        "cps": Entry("etude.sampling.kernels:CPS", "any model, eta at most 1"),
        "flow_sde": Entry("etude.sampling.kernels:FlowSDE", "flow models, Flow-GRPO's"),
        "dance_sde": Entry("etude.sampling.kernels:DanceSDE", "flow models, DanceGRPO's"),
        "precise": Entry("etude.sampling.published_kernels:Precise", "any model, gddim at eta / sqrt(2)"),
        "dance_precise": Entry("etude.sampling.published_kernels:DancePrecise", "flow models, dance_sde's SDE exactly"),
        "churn": Entry("etude.sampling.published_kernels:Churn", "any model, FDFO's"),
    },
    "module:Class, a subclass of etude.sampling.kernels.Kernel that is built from eta",
)

WINDOWS = Registry(
    "window strategy",
    "etude.windows",
    {
        "progressive": Entry(
            "etude.sampling.windows:ProgressiveWindow",
            "moves by stride steps every iters_per_shift iterations (the paper's choice)",
        ),
        "random": Entry("etude.sampling.windows:RandomWindow", "drawn anew each iteration"),
        "decay": Entry("etude.sampling.windows:DecayWindow", "progressive, but staying ever shorter as it moves on"),
        "fixed": Entry("etude.sampling.windows:FixedWindow", "never moves"),
    },
    "module:Class, a subclass of etude.sampling.windows.WindowSchedule",
)

REWARDS = Registry(
    "reward",
    "etude.rewards",
    {
        "aesthetic": Entry("etude.rewards.models.aesthetic:Aesthetic"),
        "alignment": Entry("etude.rewards.alignment:Alignment"),
        "clip_iqa": Entry("etude.rewards.models.clip_iqa:CLIPIQA"),
        "clip_score": Entry("etude.rewards.models.clip:CLIPScore"),
        "colorfulness": Entry("etude.rewards.colorfulness:colorfulness"),
        "diversity": Entry("etude.rewards.diversity:Diversity"),
        "hpsv2": Entry("etude.rewards.models.hpsv2:HPSv2"),
        "hpsv3": Entry("etude.rewards.models.hpsv3:HPSv3"),
        "imagereward": Entry("etude.rewards.models.imagereward:ImageReward"),
        "jpeg_compressibility": Entry("etude.rewards.jpeg:jpeg_compressibility"),
        "jpeg_incompressibility": Entry("etude.rewards.jpeg:jpeg_incompressibility"),
        "ocr": Entry("etude.rewards.ocr:OCR"),
        "pickscore": Entry("etude.rewards.models.clip:PickScore"),
        "preference": Entry("etude.preferences.preference_reward:PreferenceReward"),
        "style": Entry("etude.rewards.style:Style"),
        "vendi": Entry("etude.rewards.diversity:Vendi"),
        "vlm_judge": Entry("etude.rewards.remote.judge:VLMJudge"),
    },
    "module:function, where function(images, prompts, **metadata) returns one float32 score per image",
)

POLICIES = Registry(
    "pipeline family",
    "etude.policies",
    {
        "StableDiffusionPipeline": Entry("etude.policies.stable_diffusion:StableDiffusionPolicy"),
        "StableDiffusionXLPipeline": Entry("etude.policies.stable_diffusion_xl:StableDiffusionXLPolicy"),
        "StableDiffusion3Pipeline": Entry("etude.policies.stable_diffusion_3:StableDiffusion3Policy"),
        "FluxPipeline": Entry("etude.policies.flux:FluxPolicy"),
        "Flux2KleinPipeline": Entry("etude.policies.flow_families:Flux2KleinPolicy"),
        "ZImagePipeline": Entry("etude.policies.flow_families:ZImagePolicy"),
        "QwenImagePipeline": Entry("etude.policies.flow_families:QwenImagePolicy"),
        "SanaPipeline": Entry("etude.policies.flow_families:SanaPolicy"),
        "Lumina2Pipeline": Entry("etude.policies.flow_families:Lumina2Policy"),
        "Krea2Pipeline": Entry("etude.policies.flow_families:Krea2Policy"),
        "LongCatImagePipeline": Entry("etude.policies.flow_families:LongCatImagePolicy"),
        "ErnieImagePipeline": Entry("etude.policies.flow_families:ErnieImagePolicy"),
        "ChromaPipeline": Entry("etude.policies.flow_families:ChromaPolicy"),
        "HiDreamImagePipeline": Entry("etude.policies.flow_families:HiDreamImagePolicy"),
        "WanPipeline": Entry("etude.policies.flow_families:WanPolicy"),
    },
    "module:Class, a subclass of etude.policies.pipeline.PipelinePolicy",
)

OBJECTIVES = Registry(
    "objective",
    "etude.objectives",
    {
        "ppo": Entry("etude.learning.objectives.ppo:PPO", "clipped importance ratio"),
        "reinforce": Entry("etude.learning.objectives.reinforce:Reinforce", "-A log p, one optimiser step a rollout"),
        "nft": Entry(
            "etude.learning.objectives.nft:NFT",
            "contrast of good and bad images under fresh noise, from any sampler",
            title="DiffusionNFT",
        ),
        "awm": Entry(
            "etude.learning.objectives.awm:AWM",
            "matching error of images under fresh noise, weighted by advantage",
            title="AWM",
        ),
        "elbo_pg": Entry(
            "etude.learning.objectives.elbo_pg:ELBOPG",
            "policy gradient of the evidence bound of final images",
            title="ELBO-PG",
        ),
        "dpo": Entry(
            "etude.learning.objectives.dpo:DPO",
            "preference for the better of two images, of a group or of a file of pairs",
            title="Diffusion-DPO",
        ),
    },
    "module:Class, a subclass of etude.learning.objectives.objective.Objective",
)

ADVANTAGES = Registry(
    "advantage",
    "etude.advantages",
    {
        "per_prompt": Entry(
            "etude.learning.advantages:PerPrompt", "against the past rewards of the same prompt", "DDPO"
        ),
        "group": Entry("etude.learning.advantages:Group", "against the other images of its group", "GRPO"),
        "group_mean_global_std": Entry(
            "etude.learning.advantages:GroupMeanGlobalStd",
            "the mean of its group, the standard deviation of all images",
            "GRPO",
        ),
    },
    "module:Class, a subclass of etude.learning.advantages.Advantage",
)


def register_kernel(name: str) -> Callable[[ThingT], ThingT]:
    """Decorator that adds a kernel class under `name`, for this process, as `Registry.register`.

    Example:
        >>> from dataclasses import dataclass
        >>> import etude
        >>> @etude.register_kernel("half_gddim")
        ... @dataclass(frozen=True)
        ... class HalfGDDIM(etude.GDDIM):
        ...     def coefficients(self, source, target):
        ...         return etude.GDDIM(self.eta / 2).coefficients(source, target)
        >>> etude.load_config("emoji-mixgrpo", {"sampling.kernel": "half_gddim"}).sampling.kernel
        'half_gddim'
    """
    return KERNELS.register(name)


def register_window(name: str) -> Callable[[ThingT], ThingT]:
    """Decorator that adds a window strategy, a class, for this process, as `Registry.register`.

    Example:
        >>> from dataclasses import dataclass
        >>> import etude
        >>> from etude.sampling.windows import WindowSchedule
        >>> @etude.register_window("last")
        ... @dataclass(frozen=True)
        ... class LastWindow(WindowSchedule):
        ...     def start_at(self, iteration):
        ...         return self.stop - self.size
        >>> etude.load_config("emoji-mixgrpo", {"sampling.window.strategy": "last"}).sampling.window.strategy
        'last'
    """
    return WINDOWS.register(name)


def register_objective(name: str) -> Callable[[ThingT], ThingT]:
    """Decorator that adds an objective class under `name`, for this process, as `Registry.register`.

    Example:
        >>> import etude
        >>> from etude.learning.objectives.reinforce import Reinforce
        >>> @etude.register_objective("half_reinforce")
        ... class HalfReinforce(Reinforce):
        ...     def surrogate(self, log_prob, old_log_prob, advantages, policy):
        ...         return super().surrogate(log_prob, old_log_prob, advantages / 2, policy)
        >>> etude.load_config("emoji-ddpo", {"objective.kind": "half_reinforce"}).objective.kind
        'half_reinforce'
    """
    return OBJECTIVES.register(name)


def register_advantage(name: str) -> Callable[[ThingT], ThingT]:
    """Decorator that adds an advantage class under `name`, for this process, as `Registry.register`.

    Example:
        >>> import etude
        >>> from etude.learning.advantages import Group
        >>> @etude.register_advantage("half_group")
        ... class HalfGroup(Group):
        ...     def normalise(self, name, rewards, prompts, groups):
        ...         return super().normalise(name, rewards, prompts, groups) / 2
        >>> etude.load_config("emoji-mixgrpo", {"advantage.kind": "half_group"}).advantage.kind
        'half_group'
    """
    return ADVANTAGES.register(name)


def register_policy(name: str) -> Callable[[ThingT], ThingT]:
    """Decorator that adds the adapter of a pipeline family, a class, as `Registry.register`.

    `name` is the class name in the pipeline's `model_index.json`, or what `family` in a recipe says.

    Example:
        >>> import etude
        >>> from etude.policies.stable_diffusion import StableDiffusionPolicy
        >>> @etude.register_policy("OurDiffusionPipeline")
        ... class OurDiffusionPolicy(StableDiffusionPolicy):
        ...     pass
        >>> etude.load_config("emoji-ddpo", {"family": "OurDiffusionPipeline"}).family
        'OurDiffusionPipeline'
    """
    return POLICIES.register(name)

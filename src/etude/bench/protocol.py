"""A protocol: all that a measurement of a model depends on, apart from the model, in one file with a hash.

    hash = sha256(canonical JSON of prompts, images a prompt, seed, sampler, shift, dtype, rewards)

Prompts enter as the digest of their texts and metadata. Rewards enter with the commits and digests of
their weights and code, or with the digest that `etude serve-reward` sends of them. So two files with
equal content under other paths are one protocol. The name, the further samplers and the values of
the sensitivity table change no number of the protocol's own sampler and stay outside the hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from etude.config import SamplerSettings, Section
from etude.config.sections import Precision
from etude.config.tree import explain
from etude.config.yaml_text import parse_yaml, read_yaml_text
from etude.errors import EtudeError, unknown
from etude.files import fingerprints
from etude.prompts import PromptSet, clusters, load_prompts
from etude.rewards import check_group_size, files, get, sources
from etude.training.inputs import prompts_digest

_PROTOCOLS = resources.files("etude.bench") / "protocols"
_COMMIT = re.compile(r".+@[0-9a-f]{40}")
FORMAT = 1
"""The version of what is hashed: another number is another hash."""


class SensitivityConfig(Section):
    """Values around the protocol's sampler for `--sensitivity`, one axis at a time."""

    solvers: list[str] = Field(["ddim", "euler", "heun", "dpmsolver++", "unipc"])
    """Solvers, beside the protocol's. Not used where that has an eta above 0."""
    steps: list[int] | None = None
    """Step counts. null: half and twice the protocol's."""
    guidance: list[float] | None = None
    """Guidance scales. null: 1, and half and one and a half of the protocol's."""
    sizes: list[int] = Field([])
    """Sides of the images in pixels."""
    product: bool = False
    """Every combination of the values, instead of one axis at a time."""


class Protocol(Section):
    """The settings of a protocol, as its file holds them."""

    name: str = Field(min_length=1, max_length=120)
    """Title of the results."""
    prompts: str
    """Prompts: a built-in set, a file, module:function, or hub:dataset."""
    prompts_digest: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the prompts that are used; others are refused. null: any, and the hash tells."""
    num_prompts: int | None = Field(None, ge=1)
    """Number of prompts, the first ones of the source without repeats. null: all."""
    images_per_prompt: int = Field(4, ge=1, le=10_000)
    """Images of each prompt, the same noise for every model and sampler. Diversity needs 2 at least."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Key of the noise."""
    sampler: SamplerSettings = SamplerSettings()
    """The sampler of deployment: solver, steps, guidance, size, and eta, kernel and first_step of a stochastic one."""
    samplers: list[SamplerSettings] = Field([])
    """Further samplers on the same noise, such as that of training. What they do not name is the sampler's."""
    shift: float | None = Field(None, gt=0)
    """Shift of a flow model's levels. null: the pipeline's own."""
    dtype: Precision = "float32"
    """Precision of the weights."""
    rewards: list[str] = Field(min_length=1)
    """Rewards. Weights from the hub must name their commit, as in owner/name@COMMIT."""
    sensitivity: SensitivityConfig = SensitivityConfig()

    @field_validator("rewards")
    @classmethod
    def _once(cls, rewards: list[str]) -> list[str]:
        if len(set(rewards)) < len(rewards):
            raise ValueError("a reward stands there twice; name each once")
        return rewards


@dataclass(frozen=True)
class Pinned:
    """A protocol with its prompts, and the digests of all that it names."""

    settings: Protocol
    prompts: PromptSet

    @property
    def sampler(self) -> SamplerSettings:
        """The protocol's own sampler, complete."""
        return self.settings.sampler.filled()

    @property
    def others(self) -> list[SamplerSettings]:
        """The further samplers, complete."""
        return [each.filled(self.sampler) for each in self.settings.samplers]

    @property
    def variations(self) -> list[SamplerSettings]:
        """The samplers of the sensitivity table, without the protocol's own.

        Raises:
            EtudeError: the protocol's sampler is stochastic and the protocol lists solvers, or a value cannot be used.
        """
        asked, point = self.settings.sensitivity, self.sampler
        if point.eta and asked.solvers and "solvers" in asked.model_fields_set:
            raise EtudeError(
                f"protocol '{self.settings.name}': sensitivity.solvers are deterministic, and the sampler has eta {point.eta:g}: "
                "leave them out."
            )
        assert point.steps is not None
        assert point.guidance is not None
        halves = [max(1, point.steps // 2), 2 * point.steps]
        scales = [1.0, point.guidance / 2, 1.5 * point.guidance]
        axes: dict[str, list[Any]] = {
            "solver": [] if point.eta else list(asked.solvers),
            "steps": halves if asked.steps is None else asked.steps,
            "guidance": scales if asked.guidance is None else asked.guidance,
            "size": asked.sizes,
        }
        chosen: list[dict[str, Any]] = [{}]
        for axis, values in axes.items():
            changes = [{axis: value} for value in values]
            if asked.product:
                chosen = [{**before, **change} for before in chosen for change in ({}, *changes)]
            else:
                chosen += changes
        tree = point.model_dump(mode="json")
        place = f"the sensitivity of protocol '{self.settings.name}'"
        drawn = [_validated(SamplerSettings, {**tree, **change}, place) for change in chosen]
        return [each for each in dict.fromkeys(drawn) if each != point]

    @cached_property
    def canonical(self) -> dict[str, Any]:
        """The hashed content, as plain values."""
        settings = self.settings
        return {
            "format": FORMAT,
            "prompts": prompts_digest(self.prompts),
            "num_prompts": len(self.prompts),
            "images_per_prompt": settings.images_per_prompt,
            "seed": settings.seed,
            "sampler": self.sampler.model_dump(mode="json"),
            "shift": settings.shift,
            "dtype": settings.dtype,
            "rewards": {name: _identity(name) for name in sorted(settings.rewards)},
        }

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical content, in hexadecimal digits."""
        text = json.dumps(self.canonical, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def protocol_names() -> list[str]:
    """Names of the built-in protocols."""
    return sorted(p.name.removesuffix(".yaml") for p in _PROTOCOLS.iterdir() if p.name.endswith(".yaml"))


def protocol_text(name: str) -> str:
    """A built-in protocol as YAML, comments included."""
    if name not in protocol_names():
        raise unknown("protocol", name, protocol_names())
    return (_PROTOCOLS / f"{name}.yaml").read_text(encoding="utf-8")


def read_protocol(source: str) -> Protocol:
    """The settings in a built-in protocol or a YAML file, validated; reads no prompt and no reward.

    Raises:
        EtudeError: there is no such file, a key is unknown, or a value cannot be used.
    """
    path, place = Path(os.path.expanduser(source)), f"protocol '{source}'"
    if source in protocol_names():
        text = protocol_text(source)
    elif path.suffix in {".yaml", ".yml"} or path.exists():
        if not path.is_file():
            problem = "is a directory" if path.is_dir() else "does not exist"
            raise EtudeError(f"{place} {problem}: give a YAML file, or one of {', '.join(protocol_names())}.")
        text = read_yaml_text(path, place)
    else:
        raise unknown("protocol", source, protocol_names())
    tree = parse_yaml(text, place)
    if not isinstance(tree, dict):
        raise EtudeError(f"{place} must hold a mapping of keys, not {type(tree).__name__}.")
    return _validated(Protocol, tree, place)


def pin(settings: Protocol) -> Pinned:
    """Read the prompts, and check that everything that the protocol names is pinned.

    Raises:
        EtudeError: the prompts have another digest than the protocol says, there are fewer than it
            asks for, a reward reads weights of the hub at no commit, needs more images of a prompt,
            or has a server that does not answer.
    """
    place = f"protocol '{settings.name}'"
    prompts = load_prompts(settings.prompts)
    first = [i for i, cluster in enumerate(clusters(prompts.texts)) if i == cluster]
    if settings.num_prompts is not None and len(first) < settings.num_prompts:
        raise EtudeError(
            f"{place} uses {settings.num_prompts} prompts, and '{settings.prompts}' holds {len(first)} without repeats: "
            "lower num_prompts."
        )
    prompts = prompts.select(first[: settings.num_prompts])
    digest = prompts_digest(prompts)
    if settings.prompts_digest not in (None, digest):
        raise EtudeError(
            f"{place} is of other prompts: those of '{settings.prompts}' have the digest {digest}; put the old ones back, "
            "or change prompts_digest, which makes it another protocol."
        )
    if len(prompts) * settings.images_per_prompt < 2:
        raise EtudeError(f"{place} draws a single image, and an interval needs 2: raise images_per_prompt.")
    check_group_size(settings.rewards, settings.images_per_prompt, "images_per_prompt")
    for reward in settings.rewards:
        for source in sources(reward):
            if not Path(os.path.expanduser(source)).exists() and not _COMMIT.fullmatch(source):
                raise EtudeError(
                    f"{place}: the reward '{reward}' reads {source} at whatever commit the hub gives: name one, as in "
                    f"{reward.partition(':')[0]}:{source.partition('@')[0]}@COMMIT."
                )
        scorer: Any = get(reward)
        if hasattr(scorer, "served"):
            scorer.load()  # the answer of its server says what is computed there
    return Pinned(settings, prompts)


def _identity(reward: str) -> dict[str, str]:
    """The digests of a reward's files, and of what its server says that it computes."""
    served = getattr(get(reward), "served", None)
    return {**fingerprints(files(reward)), **({"served": served} if served else {})}


def _validated(model: Any, tree: dict[str, Any], place: str) -> Any:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise explain(error, place, model) from None

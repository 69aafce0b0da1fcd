"""The origin of a model and the settings of its loading: one value, passed on whole."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from etude import zoo
from etude.config import TrainConfig

if TYPE_CHECKING:
    from etude.batching import Size

_READ = (".json", ".jinja", ".model", ".safetensors", ".txt")
"""Endings of the files that a pipeline's parts are read from."""
_VARIANT = re.compile(r"[^.]+\.([\w-]+?)(-\d+-of-\d+)?\.safetensors|.+\.safetensors\.index\.([\w-]+)\.json")


@dataclass(frozen=True)
class ModelSource:
    """A model to be loaded: its place, an adapter on top, and how it is held in memory.

    The fields are the arguments of `etude.load_policy`, which explains each.

    Example:
        >>> import etude
        >>> source = etude.ModelSource("emoji-sd", dtype="bfloat16")
        >>> etude.ModelSource.of(etude.load_config("emoji-ddpo")).name
        'emoji-sd'
    """

    name: str | Path
    lora: str | Path | None = None
    dtype: str = "float32"
    resolution: int | None = None
    shift: float | None = None
    variant: str | None = None
    pipeline_config: str | Path | None = None
    offload: bool = False
    decode_batch_size: Size | None = None
    prompt_cache_mb: int | None = None
    family: str | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> ModelSource:
        """The base model of a run, as its configuration wants it loaded."""
        return cls(
            config.model,
            dtype=config.dtype,
            resolution=config.resolution,
            shift=config.sampling.shift,
            variant=config.variant,
            pipeline_config=config.pipeline_config,
            offload=config.memory.offload,
            decode_batch_size=config.memory.decode_batch_size,
            prompt_cache_mb=config.memory.prompt_cache_mb,
            family=config.family,
        )

    def files(self) -> dict[str, dict[str, Path]]:
        """The files of this machine that the model is read from: by `model`, `pipeline_config` and `adapter`, then by path in it.

        A repository of the hub has none here: its commit tells what it held.
        """
        named = {"model": self.name, "pipeline_config": self.pipeline_config, "adapter": self.lora}
        found = {what: source_files(str(name), self.variant) for what, name in named.items() if name}
        return {what: files for what, files in found.items() if files}

    @classmethod
    def tuned(cls, config: TrainConfig, run: Path, suffix: str = "") -> ModelSource:
        """The model with the weights that a run exported to `lora` or `model`, with the suffix."""
        base = cls.of(config)
        if config.lora.rank:
            return replace(base, lora=run / f"lora{suffix}")
        return replace(base, name=run / f"model{suffix}", pipeline_config=None, variant=None)


def source_files(name: str, variant: str | None = None) -> dict[str, Path]:
    """The files of a pipeline's directory, of an adapter's, or a single file; empty where there is none."""
    place = zoo.path(name) if name in zoo.names() else Path(expanduser(name))
    if place.is_file():
        return {place.name: place}
    index = place / "model_index.json"
    try:
        folders = [place / part for part in json.loads(index.read_bytes()) if re.fullmatch(r"[a-z]\w*", part)]
    except (OSError, ValueError, TypeError, RecursionError):  # no pipeline, or one that the loader refuses
        folders = [place]
    inside = [index, *(path for folder in folders for path in sorted(folder.glob("*.*")))]
    chosen = [path for path in inside if path.suffix in _READ and path.is_file() and _is_read(path.name, variant)]
    return {path.relative_to(place).as_posix(): path for path in chosen}


def _is_read(name: str, variant: str | None) -> bool:
    """Whether a file has no suffix of a variant, or that of this one."""
    match = _VARIANT.fullmatch(name)
    return match is None or (match[1] or match[3]) == variant

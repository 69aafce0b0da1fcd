"""Where a model comes from and how it is loaded: one value, passed on whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from etude.config import TrainConfig


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
    decode_batch_size: int | None = None
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

    @classmethod
    def tuned(cls, config: TrainConfig, run: Path, suffix: str = "") -> ModelSource:
        """The model with the weights that a run exported to `lora` or `model`, with the suffix."""
        base = cls.of(config)
        if config.lora.rank:
            return replace(base, lora=run / f"lora{suffix}")
        return replace(base, name=run / f"model{suffix}", pipeline_config=None, variant=None)

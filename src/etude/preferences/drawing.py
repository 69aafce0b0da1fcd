"""Draw images into a pool, with everything that made them. What is there already is not drawn again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import etude
from etude.batching import Progress, silent
from etude.config import SamplerSettings, parse_sampler
from etude.errors import EtudeError
from etude.policies.adapter_file import WEIGHTS
from etude.policies.source import ModelSource
from etude.preferences.pictures import encode_pictures
from etude.preferences.pool import Pool
from etude.sampling.model import Policy
from etude.sampling.sampler import Sampler

STREAM = "preferences"
"""Stream of the noise, so that the images are none that training or evaluations draw."""


def draw_into(
    pool: Pool,
    policy: Policy,
    source: ModelSource,
    sampler: Sampler,
    prompts: Sequence[str],
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 32,
    on_step: Progress = silent,
) -> int:
    """Draw `count` images, image i of prompt i modulo their number, and return the maker's number.

    Batches are stored as they are drawn: a call that was killed is continued by the same call.

    Args:
        pool: where the images go.
        policy: the model, as `source` names it.
        source: place of the model and its adapter.
        sampler: how the images are drawn.
        prompts: distinct texts.
        count: number of images.
        seed: key of the noise.
        batch_size: images in a network call, and in a transaction.
        on_step: called with the number of images that just made one step.

    Raises:
        EtudeError: the sampler does not fit the model, or the pool cannot be written.
    """
    sampler.check(policy)
    maker = pool.add_maker(label(source, sampler), describe(policy, source, sampler, prompts, seed))
    missing = sorted(set(range(count)) - pool.samples(maker))
    on_step((count - len(missing)) * sampler.evaluations)
    for start in range(0, len(missing), batch_size):
        samples = missing[start : start + batch_size]
        texts = [prompts[i % len(prompts)] for i in samples]
        images = sampler.draw(
            policy, texts, seed, samples=samples, stream=STREAM, batch_size=batch_size, on_step=on_step
        )
        pool.add_images(maker, zip(samples, texts, encode_pictures(images.numpy()), strict=True))
    return maker


def describe(
    policy: Policy, source: ModelSource, sampler: Sampler, prompts: Sequence[str], seed: int
) -> dict[str, Any]:
    """Everything that determines the images of a maker, as plain values."""
    adapter = source.lora and Path(source.lora).expanduser() / WEIGHTS
    return {
        "kind": "etude",
        "etude": etude.__version__,
        "model": str(source.name),
        "commit": getattr(policy, "revision", None),
        "adapter_sha256": hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter else None,
        "dtype": source.dtype,
        "resolution": source.resolution,
        "shift": source.shift,
        "sampler": {"kind": type(sampler).__name__, **json.loads(json.dumps(asdict(sampler), default=str))},  # type: ignore[call-overload]
        "seed": seed,
        "stream": STREAM,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    }


def label(source: ModelSource, sampler: Sampler) -> str:
    """A maker's name for people: `emoji-sd + runs/first/lora, eta 1.2, 20 steps`."""
    adapter = f" + {source.lora}" if source.lora else ""
    return f"{source.name}{adapter}, {sampler.label}, {sampler.steps} steps"


def parse_side(text: str, base: ModelSource, beside: SamplerSettings) -> tuple[ModelSource, Sampler]:
    """The model and the sampler of one side of a judgement: `MODEL[,lora=DIR][,SAMPLER]`.

    Args:
        text: the side; the sampler as `config.parse_sampler` reads it, such as `eta=1.2,steps=10`.
        base: settings that both sides share.
        beside: steps, guidance and size where the side names none.

    Raises:
        EtudeError: an option is unknown or stands twice, or its value cannot be used.
    """
    name, *parts = (part.strip() for part in text.split(","))
    adapters = [part.removeprefix("lora=") for part in parts if part.startswith("lora=")]
    if len(adapters) > 1 or "" in (name, *adapters):
        raise EtudeError(f"the side '{text}' needs one model and at most one lora: write MODEL,lora=DIR,eta=1.2.")
    rest = ",".join(part for part in parts if not part.startswith("lora="))
    settings = parse_sampler(rest, beside) if rest else beside.filled()
    return replace(base, name=name, lora=next(iter(adapters), None), resolution=settings.size), settings.sampler()

"""The cells of a benchmark: a model under a sampler, scored image by image, kept on the disk as they come.

A cell is measured prompt by prompt, in parts of equal size whatever was measured before. Each part
is one line of `cells/NAME.jsonl`, which is on the disk before the next begins. A killed benchmark
therefore goes on where it ended, with the bits of one that was not killed.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from etude.bench.protocol import Pinned
from etude.config import SamplerSettings
from etude.errors import EtudeError, brief
from etude.files import append_line, atomic_write_bytes, atomic_write_text, fingerprints, locked, made
from etude.measuring.pairs import Measurement, Scores
from etude.policies import TrainablePolicy
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.rewards import WeightedRewards
from etude.runs.environment import gpu, processor, versions
from etude.runs.layout import BEST, holds_something

SHOWN = 8
"""Number of prompts whose first image is kept for the contact sheet."""
Advance = Callable[[int, int], None]
Environment = dict[str, str]
"""Versions of the software, and the name of the processor, on which the last bits of a score depend."""


@dataclass(frozen=True)
class Entry:
    """A model of a benchmark: the base model, or an adapter on it."""

    label: str
    source: ModelSource

    def identity(self, policy: TrainablePolicy) -> dict[str, Any]:
        """Plain values that tell this model from another: digests of its files, or its commit on the hub."""
        digests = {what: _digest(fingerprints(files)) for what, files in self.source.files().items()}
        name = None if "model" in digests else str(self.source.name)
        return {"hub": name, "commit": policy.revision, **digests}


@dataclass(frozen=True)
class Cell:
    """The scores of one model under one sampler, and the pictures of the contact sheet.

    `environments` are the software and processors that measured its parts, each once.
    """

    entry: str
    identity: dict[str, Any]
    sampler: SamplerSettings
    scores: Scores
    pictures: tuple[Path, ...]
    environments: tuple[Environment, ...]


def entries(source: ModelSource, adapters: list[Path]) -> list[Entry]:
    """The base model, and each adapter under a short name that no other has.

    The name is that of the directory, or of the one above it where a run exported to `lora`. The best weights of a
    run have both.
    """
    labels, found = {"base"}, [Entry("base", replace(source, lora=None))]
    for adapter in adapters:
        place = adapter.resolve()
        run = place.parent.name if place.name in {"lora", "model"} else place.name.removesuffix(".safetensors")
        both = f"{place.parent.name}/{place.name}"
        names = [*([] if run.endswith(BEST) else [run]), both, str(adapter), *(f"{run} {n}" for n in range(2, 1000))]
        label = next(name for name in names if name and name not in labels)
        labels.add(label)
        found.append(Entry(label, replace(source, lora=adapter)))
    return found


def measure_cells(
    pinned: Pinned, models: list[Entry], samplers: list[SamplerSettings], out: Path, batch_size: int, advance: Advance
) -> list[Cell]:
    """Measure every model under every sampler from the same noise, or read what `out` holds already.

    Args:
        pinned: the protocol.
        models: models, one of which is in memory at a time.
        samplers: samplers; the first is the protocol's.
        out: directory of the benchmark, new or of the same protocol and batch size.
        batch_size: images in a network call.
        advance: called with the image steps just made, and those of the whole benchmark.

    Raises:
        EtudeError: `out` holds something else, or a model, a sampler or a reward cannot be used.
    """
    _check(out, pinned, batch_size)
    count = len(pinned.prompts) * pinned.settings.images_per_prompt
    rewards = WeightedRewards(dict.fromkeys(pinned.settings.rewards, 1.0))
    rewards.load()

    def score(images: Any, prompts: list[str], metadata: Any) -> Any:
        return rewards(images, prompts, metadata)  # without the sum of several rewards, which has no unit

    each = pinned.settings.images_per_prompt
    measurement = Measurement(
        pinned.prompts, score, count, pinned.settings.seed, batch_size=batch_size, images_per_prompt=each
    )
    total, cells = len(models) * count * sum(s.sampler().evaluations for s in samplers), []
    # At the protocol's size, so that the trial at loading is none at another, which may be far larger.
    sources = {entry.label: replace(entry.source, resolution=pinned.sampler.size) for entry in models}
    for entry in models[1:]:  # on shapes, since one model is held at a time: what is refused leaves nothing
        _loaded(sources[entry.label], samplers, outline=True)
    policy: TrainablePolicy | None = _loaded(sources[models[0].label], samplers)
    with made(out), locked(out):
        settings = {"hash": pinned.hash, "batch_size": batch_size}
        atomic_write_text(out / "bench.json", json.dumps(settings) + "\n")
        (out / "cells").mkdir(exist_ok=True)
        for entry in models:
            policy = policy or load_source(sources[entry.label])
            identity = entry.identity(policy)
            for sampler in samplers:
                file = CellFile(out, {"model": identity, "sampler": sampler.model_dump(mode="json")}, entry.label)
                scores, known = file.measure(
                    policy, sampler, measurement, batch_size, lambda done: advance(done, total)
                )
                cells.append(Cell(entry.label, identity, sampler, scores, tuple(file.pictures()), known))
            policy = None
    return cells


def _loaded(source: ModelSource, samplers: list[SamplerSettings], outline: bool = False) -> TrainablePolicy:
    """Load a model, and check that its levels allow every sampler."""
    policy = load_source(source, outline=outline)
    for sampler in samplers:
        sampler.sampler().check(policy.resized(sampler.size))
    return policy


class CellFile:
    """The file of a cell: a line that says what it is, and a line for each part that was measured.

    Args:
        out: directory of the benchmark.
        header: plain values that determine the scores, apart from the protocol.
        label: beginning of the file's name, for people.
    """

    def __init__(self, out: Path, header: dict[str, Any], label: str) -> None:
        self.header = header
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.")[:40]
        self.name = f"{readable}-{_digest(header)[:16]}"
        self.path, self.folder = out / "cells" / f"{self.name}.jsonl", out / "cells"

    def pictures(self) -> list[Path]:
        """The pictures for the contact sheet that have been written, in the order of the prompts."""
        return sorted(self.folder.glob(f"{self.name}-*.png"))

    def measure(
        self,
        policy: TrainablePolicy,
        settings: SamplerSettings,
        measurement: Measurement,
        batch_size: int,
        on_step: Callable[[int], None],
    ) -> tuple[Scores, tuple[Environment, ...]]:
        """Measure the parts that the file lacks, and return the scores of all images and where they were measured."""
        planned, model, sampler = (
            list(parts(measurement, batch_size)),
            policy.resized(settings.size),
            settings.sampler(),
        )
        rows, here = self._read(planned), {**versions(), "processor": gpu() or processor()}
        for samples in planned[: len(rows)]:
            on_step(len(samples) * sampler.evaluations)
        for samples in planned[len(rows) :]:
            images = measurement.images(model, sampler, on_step, samples)
            scores = {name: values.tolist() for name, values in measurement.scores(images, samples).items()}
            for sample, image in zip(samples, images, strict=True):
                if sample < SHOWN:
                    self._show(sample, image.permute(1, 2, 0).numpy())
            rows.append({"samples": samples, "scores": scores, "environment": here})
            append_line(self.path, json.dumps(rows[-1]))
        scores = {name: np.zeros(measurement.num_images) for name in rows[0]["scores"]}
        environments: list[Environment] = []
        for row in rows:
            for name, values in row["scores"].items():
                scores[name][row["samples"]] = values
            if isinstance(known := row.get("environment"), dict) and known not in environments:
                environments.append(known)
        return scores, tuple(environments)

    def _show(self, sample: int, pixels: Any) -> None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        atomic_write_bytes(self.folder / f"{self.name}-{sample:02d}.png", buffer.getvalue())

    def _read(self, planned: list[list[int]]) -> list[dict[str, Any]]:
        """The parts that were measured, the first of those `planned`; a torn last line is cut off."""
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        header = json.dumps(self.header, sort_keys=True).encode()
        if len(lines) < 2:  # nothing, or a torn header
            atomic_write_bytes(self.path, header + b"\n")
            return []
        *whole, torn = lines
        try:
            rows = [json.loads(line) for line in whole[1:]]
            fits = whole[0] == header and len(rows) <= len(planned)
            for row, samples in zip(rows, planned, strict=False):
                lengths = {len([float(v) for v in values]) for values in row["scores"].values()}
                fits = fits and row["samples"] == samples and lengths == {len(samples)}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            fits = False
        if not fits:
            raise EtudeError(f"'{self.path}' is damaged: delete it to measure it anew.")
        if torn:
            atomic_write_bytes(self.path, b"\n".join([*whole, b""]))
        return rows


def parts(measurement: Measurement, batch_size: int) -> Iterator[list[int]]:
    """The images of as many whole prompts as fit into a batch, at least one prompt, as lists of their indices."""
    prompts = len(measurement.prompts)
    each = measurement.num_images // prompts
    at_once = max(1, batch_size // each)
    for first in range(0, prompts, at_once):
        chosen = range(first, min(first + at_once, prompts))
        yield [place + prompts * copy for copy in range(each) for place in chosen]


def _check(out: Path, pinned: Pinned, batch_size: int) -> None:
    """Refuses a directory with something else than this benchmark."""
    file, remedy = out / "bench.json", "give another --out"
    if out.exists() and not out.is_dir():
        raise EtudeError(f"--out '{out}' is a file: give a directory.")
    if not file.is_file():
        if holds_something(out):
            raise EtudeError(f"--out '{out}' is not empty and holds no benchmark: {remedy}.")
        return
    try:
        stored = json.loads(file.read_bytes())
        before, size = str(stored["hash"]), int(stored["batch_size"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EtudeError(f"'{file}' is damaged ({brief(error, 80)}): {remedy}.") from None
    if before != pinned.hash:
        raise EtudeError(
            f"--out '{out}' holds results of another protocol, hash {before[:12]}, and this one's is {pinned.hash[:12]}: {remedy}."
        )
    if size != batch_size:
        raise EtudeError(
            f"--out '{out}' was measured with {size} images a call, on which last bits depend: give --batch-size {size}, or "
            "another --out."
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

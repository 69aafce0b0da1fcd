"""Measure a trained cell and its base model: scores image by image under every sampler."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from etude.config import TrainConfig
from etude.files import atomic_write_bytes, atomic_write_text
from etude.measuring.pairs import Measurement
from etude.policies import TrainablePolicy
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.prompts import load_prompts
from etude.rewards import WeightedRewards
from etude.runs.layout import BEST
from etude.sampling.etas import compact, eta_text
from etude.sampling.sampler import ODE, SDE, Sampler
from etude.sampling.solvers import Solver
from etude.study.directory import StudyDirectory
from etude.study.study_file import Cell, MeasurementConfig

Scores = dict[str, list[float]]


def sampler_settings(sampler: Sampler) -> dict[str, Any]:
    """Plain values that name a sampler; all of a cell share guidance and first step."""
    if isinstance(sampler, SDE):
        return {"kind": "sde", "sampler": sampler.kernel, "eta": sampler.eta, "steps": sampler.steps}
    kind, name = ("solver", sampler.name) if isinstance(sampler, Solver) else ("ode", "ode")
    return {"kind": kind, "sampler": name, "eta": 0.0, "steps": sampler.steps}


def samplers(config: TrainConfig, measurement: MeasurementConfig) -> list[Sampler]:
    """The ODE, the SDE of training and the samplers of the matrix, at all step counts.

    The first is the ODE at the cell's own step count. The SDE of training is that of the last
    iteration. A list of etas, one for each step, has none at another step count.
    """
    own = config.evaluation.num_steps or config.sampling.num_steps
    sampling, etas = config.sampling, config.sampling.etas(config.iterations)
    guidance, first_step = sampling.guidance_scale, sampling.first_step
    chosen: list[Sampler] = []
    for steps in dict.fromkeys([own, *(measurement.steps or [])]):
        chosen.append(ODE(steps, guidance))
        if not isinstance(sampling.eta, list) or steps == len(sampling.eta):
            eta = compact(etas.at(config.iterations, steps))
            chosen.append(SDE(eta, steps, sampling.kernel, first_step, guidance))
        chosen += [Solver(name, steps, guidance) for name in measurement.matrix.solvers]
        chosen += [SDE(other, steps, "gddim", first_step, guidance) for other in measurement.matrix.etas]
    return list(dict.fromkeys(sorted(chosen, key=lambda sampler: sampler.steps != own)))


def measure(cell: Cell, directory: StudyDirectory, on_sampler: Callable[[str], None]) -> None:
    """Write `scores.json` and `samples/study.png`; `on_sampler` is told which sampler is next.

    Raises:
        EtudeError: the run's weights, a sampler or a reward cannot be used.
    """
    started = time.perf_counter()
    config, asked, run = cell.config, cell.measurement, directory.cell(cell)
    rewards = WeightedRewards(config.rewards, held_out=config.evaluation.held_out_rewards)
    rewards.load()
    prompts, batch_size = load_prompts(asked.prompts or config.prompts.evaluation), config.rollout.batch_size
    measurement = Measurement(prompts, rewards.evaluate, asked.num_images, config.seed, batch_size=batch_size)
    chosen = samplers(config, asked)
    base, policy = Base(cell, directory, measurement), load_source(ModelSource.tuned(config, run))
    rows = []
    for number, sampler in enumerate(chosen):
        settings = sampler_settings(sampler)
        eta = f" {eta_text(settings['eta'])}" if settings["eta"] else ""
        on_sampler(f"measuring {settings['sampler']}{eta}")
        images = measurement.images(policy, sampler)
        shown = asked.shown if number == 0 else 0
        if shown:
            (run / "samples").mkdir(exist_ok=True)
            atomic_write_bytes(run / "samples" / "study.png", strip(images[:shown]))
        rows.append({**settings, "scores": _scores(measurement, images), "base": base.scores(sampler, shown)})
    best = None
    if (run / f"{'lora' if config.lora.rank else 'model'}{BEST}").is_dir():  # kept by `checkpoint.best`
        kept = load_source(ModelSource.tuned(config, run, BEST))
        best = _scores(measurement, measurement.images(kept, chosen[0]))
    levels = {str(steps): policy.grid(steps) for steps in dict.fromkeys(sampler.steps for sampler in chosen)}
    result = {
        "measurement": asked.model_dump(mode="json"),
        "seed": config.seed,
        "prompts": measurement.prompts.texts,
        "clusters": measurement.clusters,
        "samplers": rows,
        "best": best,
        "levels": {steps: {"a": grid.a.tolist(), "s": grid.s.tolist()} for steps, grid in levels.items()},
        "base_image": base.image,
        "seconds": time.perf_counter() - started,
    }
    atomic_write_text(directory.scores(cell), json.dumps(result, ensure_ascii=False) + "\n")


class Base:
    """The base model's scores, measured once for all cells that would measure the same."""

    def __init__(self, cell: Cell, directory: StudyDirectory, measurement: Measurement) -> None:
        config, self.directory, self.measurement = cell.config, directory, measurement
        self.image: str | None = None  # file in DIR/base with images of the first sampler, if any are kept
        self.source = source = ModelSource.of(config)
        self._policy: TrainablePolicy | None = None
        self._key = {
            "model": [source.name, source.pipeline_config, source.resolution, source.dtype, source.variant],
            "shift": source.shift,
            "guidance_scale": config.sampling.guidance_scale,
            "first_step": config.sampling.first_step,
            "prompts": cell.measurement.prompts or config.prompts.evaluation,
            "num_images": cell.measurement.num_images,
            "seed": config.seed,
            "rewards": sorted({*config.rewards, *config.evaluation.held_out_rewards}),
            "weights": dict(sorted(config.rewards.items())) if len(config.rewards) > 1 else None,
        }

    def scores(self, sampler: Sampler, shown: int) -> Scores:
        """Read the base model's scores, or measure them and keep the first `shown` images."""
        key = {**self._key, "sampler": sampler_settings(sampler)}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        file, picture = f"{name}.json", f"{name}-{shown}.png"
        stored = self.directory.base_file(file)
        if stored is None or (shown and self.directory.base_file(picture) is None):
            self._policy = self._policy or load_source(self.source)
            images = self.measurement.images(self._policy, sampler)
            folder = self.directory.root / "base"
            folder.mkdir(parents=True, exist_ok=True)
            if shown:
                atomic_write_bytes(folder / picture, strip(images[:shown]))
            text = json.dumps({"key": key, "scores": _scores(self.measurement, images)}, ensure_ascii=False)
            atomic_write_text(folder / file, text + "\n")
            stored = self.directory.base_file(file)
            assert stored is not None
        if shown:
            self.image = picture
        return stored.mapping()["scores"]


def strip(images: Tensor) -> bytes:
    """The images side by side as a PNG."""
    pixels = torch.cat(list(images.cpu()), dim=2).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _scores(measurement: Measurement, images: Tensor) -> Scores:
    """Every reward of every image, to the seven digits that float32 has."""
    scores = measurement.scores(images)
    return {name: [float(f"{value:.7g}") for value in values.tolist()] for name, values in scores.items()}

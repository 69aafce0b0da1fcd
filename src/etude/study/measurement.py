"""What is measured of a cell once it is trained: scores image by image under every sampler, and the base model's beside them.

All cells of a seed show the same prompts from the same noise, so that their scores can be paired image by image. The base model's
scores are kept in `DIR/base/`: cells that would measure the same share them.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.config import TrainConfig
from etude.files import atomic_write_bytes, atomic_write_text
from etude.measuring.gap import Protocol
from etude.policies import TrainablePolicy, load_policy
from etude.policies.loading import policy_of
from etude.prompts import load_prompts
from etude.rewards import WeightedRewards
from etude.runs.layout import BEST
from etude.sampling.etas import compact, eta_text
from etude.sampling.solvers import sample_with_solver
from etude.study.directory import StudyDirectory
from etude.study.study_file import Cell, MeasurementConfig

Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Sampler:
    """What images are drawn with.

    Attributes:
        kind: "ode", "sde" or "solver".
        name: of the kernel or the solver; "ode" for the ODE.
        eta: 0 unless it is an SDE; one for each step where they differ.
        steps: denoising steps.
    """

    kind: str
    name: str
    eta: float | tuple[float, ...]
    steps: int

    def settings(self) -> dict[str, Any]:
        """Plain values."""
        eta = list(self.eta) if isinstance(self.eta, tuple) else self.eta
        return {"kind": self.kind, "sampler": self.name, "eta": eta, "steps": self.steps}

    def draw(self, policy: TrainablePolicy, protocol: Protocol) -> Tensor:
        """uint8 images `[n, 3, h, w]`; image i starts from the same noise under every sampler."""
        if self.kind != "solver":
            return protocol.images(policy, self.eta, self.steps)
        texts, size = protocol.shown().texts, protocol.batch_size
        assert isinstance(size, int)
        return sample_with_solver(
            policy, texts, self.name, self.steps, protocol.guidance_scale, protocol.seed, batch_size=size
        )


def samplers(config: TrainConfig, measurement: MeasurementConfig) -> list[Sampler]:
    """The ODE, the SDE of training and those of the matrix, at the cell's own step count and the others; the first is the ODE at its own.

    The SDE of training is that of the last iteration. A list of etas, one for each step, has none at another step count.
    """
    own = config.evaluation.num_steps or config.sampling.num_steps
    etas = config.sampling.etas(config.iterations)
    found = []
    for steps in dict.fromkeys([own, *(measurement.steps or [])]):
        found.append(Sampler("ode", "ode", 0.0, steps))
        if not isinstance(config.sampling.eta, list) or steps == len(config.sampling.eta):
            eta = compact(etas.at(config.iterations, steps))
            found.append(Sampler("sde", config.sampling.kernel, tuple(eta) if isinstance(eta, list) else eta, steps))
        found += [Sampler("solver", name, 0.0, steps) for name in measurement.matrix.solvers]
        found += [Sampler("sde", "gddim", other, steps) for other in measurement.matrix.etas]
    return list(dict.fromkeys(sorted(found, key=lambda s: s.steps != own)))


def measure(cell: Cell, directory: StudyDirectory, on_sampler: Callable[[str], None] = lambda name: None) -> None:
    """Writes `scores.json`, and a strip of images as `samples/study.png`.

    Args:
        on_sampler: told what is drawn with next.

    Raises:
        EtudeError: the run's weights, a sampler or a reward cannot be used.
    """
    started = time.perf_counter()
    config, measurement = cell.config, cell.measurement
    rewards = WeightedRewards(config.rewards, held_out=config.evaluation.held_out_rewards)
    rewards.load()
    prompts = load_prompts(measurement.prompts or config.prompts.evaluation).head(measurement.num_images)

    def protocol(kernel: str) -> Protocol:
        return Protocol(
            prompts=prompts,
            score=rewards.evaluate,
            num_images=measurement.num_images,
            guidance_scale=config.sampling.guidance_scale,
            kernel=kernel,
            seed=config.seed,
            batch_size=config.rollout.batch_size,
            first_step=config.sampling.first_step,
        )

    chosen = samplers(config, measurement)
    base, policy = Base(cell, directory), _tuned(config, directory.cell(cell))
    rows = []
    for number, sampler in enumerate(chosen):
        under = protocol(sampler.name if sampler.kind == "sde" else "gddim")
        on_sampler(f"measuring {sampler.name} {eta_text(sampler.eta)}" if sampler.eta else f"measuring {sampler.name}")
        images = sampler.draw(policy, under)
        if number == 0 and measurement.shown:
            (directory.cell(cell) / "samples").mkdir(exist_ok=True)
            atomic_write_bytes(directory.cell(cell) / "samples" / "study.png", strip(images[: measurement.shown]))
        shown = measurement.shown if number == 0 else 0
        rows.append(
            {**sampler.settings(), "scores": _scores(under, images), "base": base.scores(sampler, under, shown)}
        )
    found = {
        "measurement": measurement.model_dump(mode="json"),
        "seed": config.seed,
        "prompts": prompts.texts,
        "clusters": protocol("gddim").clusters,
        "samplers": rows,
        "best": _best(config, directory.cell(cell), chosen[0], protocol("gddim")),
        "levels": {str(count): _levels(policy, count) for count in dict.fromkeys(s.steps for s in chosen)},
        "base_image": base.image,
        "seconds": time.perf_counter() - started,
    }
    atomic_write_text(directory.scores(cell), json.dumps(found, ensure_ascii=False) + "\n")


class Base:
    """The base model's scores, measured once for all the cells that would measure the same.

    Attributes:
        image: file under `DIR/base/` of the strip of images that belongs to the first sampler; None if none is kept.
    """

    def __init__(self, cell: Cell, directory: StudyDirectory) -> None:
        config, self.directory = cell.config, directory
        self.config, self.image = config, None if cell.measurement.shown == 0 else ""
        self._policy: TrainablePolicy | None = None
        summed = dict(sorted(config.rewards.items())) if len(config.rewards) > 1 else None
        self._key = {
            "model": [config.model, config.pipeline_config, config.resolution, config.dtype, config.variant],
            "shift": config.sampling.shift,
            "guidance_scale": config.sampling.guidance_scale,
            "first_step": config.sampling.first_step,
            "prompts": cell.measurement.prompts or config.prompts.evaluation,
            "num_images": cell.measurement.num_images,
            "seed": config.seed,
            "rewards": sorted({*config.rewards, *config.evaluation.held_out_rewards}),
            "weights": summed,
        }

    def scores(self, sampler: Sampler, protocol: Protocol, shown: int) -> Scores:
        """Of the base model under a sampler."""
        key = {**self._key, "sampler": sampler.settings()}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        file, picture = f"{name}.json", f"{name}-{shown}.png"
        stored = self.directory.base_file(file)
        if stored is None or (shown and self.directory.base_file(picture) is None):
            self._policy = self._policy or policy_of(self.config)
            images = sampler.draw(self._policy, protocol)
            folder = self.directory.root / "base"
            folder.mkdir(parents=True, exist_ok=True)
            if shown:
                atomic_write_bytes(folder / picture, strip(images[:shown]))
            text = json.dumps({"key": key, "scores": _scores(protocol, images)}, ensure_ascii=False)
            atomic_write_text(folder / file, text + "\n")
            stored = self.directory.base_file(file)
            assert stored is not None
        if shown:
            self.image = picture
        scores: Scores = stored.mapping()["scores"]
        return scores


def strip(images: Tensor) -> bytes:
    """The images side by side as a PNG."""
    from PIL import Image

    pixels = torch.cat(list(images.cpu()), dim=2).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _tuned(config: TrainConfig, run: Path, suffix: str = "") -> TrainablePolicy:
    """The model as the run left it, or with the suffix of the best weights as it was at its best."""
    if not config.lora.rank:
        return load_policy(run / f"model{suffix}", dtype=config.dtype, resolution=config.resolution)
    policy: TrainablePolicy = policy_of(config)
    policy.load_lora(run / f"lora{suffix}")
    return policy


def _best(config: TrainConfig, run: Path, sampler: Sampler, protocol: Protocol) -> Scores | None:
    """The ODE scores of the weights that were best in training; None if the run kept none (`checkpoint.best`)."""
    if not (run / f"{'lora' if config.lora.rank else 'model'}{BEST}").is_dir():
        return None
    return _scores(protocol, sampler.draw(_tuned(config, run, BEST), protocol))


def _levels(policy: TrainablePolicy, steps: int) -> dict[str, list[float]]:
    """Signal and noise at the levels that the samplers visit."""
    grid = policy.grid(steps)
    return {"a": grid.a.tolist(), "s": grid.s.tolist()}


def _scores(protocol: Protocol, images: Tensor) -> Scores:
    """Every reward of every image, to the seven digits that float32 has."""
    return {name: list(_rounded(values.tolist())) for name, values in protocol.scores(images).items()}


def _rounded(values: list[float]) -> Iterator[float]:
    for value in values:
        yield float(f"{value:.7g}")

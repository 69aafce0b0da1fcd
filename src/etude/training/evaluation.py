"""Evaluate training: held-out images of the weights under the ODE and the SDE, from the same noise.

    improvement = E r(ODE, tuned) - E r(ODE, base)          gap = E r(ODE, tuned) - E r(SDE_eta, tuned)

Both samplers take `evaluation.num_steps` steps (default: those of training) over the same levels,
with the guidance of training. On the SDE side every step is stochastic, without MixGRPO's window and
tail, with the training kernel at the eta of the iteration that the evaluation follows. Under
`sampling.eta_schedule` over iterations the SDE side moves, so a gap may narrow because eta falls. A
schedule over steps is stretched to the evaluation's number of steps.

`evaluation.deployment` adds a third sampler, the one that will serve the model, with its gap to the
SDE and the improvement under it. `evaluation.path_kl` adds the KL of the SDE's path from that of the
model before training.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from etude.batching import MicroBatch, Progress
from etude.config import SamplerSettings, TrainConfig
from etude.files import atomic_write_bytes, atomic_write_text
from etude.learning.exchange import gather, share
from etude.measuring.divergence import divergences
from etude.measuring.pairs import Measurement, Scores, by_quantity, compare
from etude.measuring.path_kl import images_and_path_kl
from etude.measuring.statistics import estimate_mean
from etude.policies import Policy, TrainablePolicy
from etude.prompts import PromptSet, load_prompts, overlap
from etude.report.grids import image_grid
from etude.report.strips import thumbnails, write_strip
from etude.rewards import WEIGHTED_SUM, WeightedRewards
from etude.sampling.etas import compact
from etude.sampling.sampler import ODE, SDE, Sampler
from etude.training.guards import fallen
from etude.training.processes import failing_together
from etude.training.reward_queue import Scorer


class SamplerPair:
    """The two samplers of a run's evaluations: the ODE, and the SDE at the eta of an iteration."""

    def __init__(self, config: TrainConfig) -> None:
        self._sampling, self._etas = config.sampling, config.sampling.etas(config.iterations)
        self.num_steps = config.evaluation.num_steps or config.sampling.num_steps
        self.ode = ODE(self.num_steps, config.sampling.guidance_scale)
        beside = SamplerSettings(steps=self.num_steps, guidance=config.sampling.guidance_scale)
        deployed = config.evaluation.deployment
        self.deployed = None if deployed is None else deployed.filled(beside)

    @property
    def deployed_evaluations(self) -> int:
        """Network evaluations of one image under the deployed sampler; 0 where none is named."""
        return 0 if self.deployed is None else self.deployed.sampler().evaluations

    def eta(self, iteration: int) -> float | list[float]:
        """The eta of the evaluation after an iteration, by step where it differs."""
        return compact(self._etas.at(iteration, self.num_steps))

    def sde(self, iteration: int) -> SDE:
        """The training kernel at the eta of the evaluation after an iteration, in every step."""
        sampling, eta = self._sampling, self.eta(iteration)
        return SDE(eta, self.num_steps, sampling.kernel, sampling.first_step, sampling.guidance_scale)

    def check(self, policy: Policy) -> None:
        """Refuses an eta that the kernel does not allow at the policy's levels, and a deployed sampler that it cannot have."""
        if self.deployed is not None:
            self.deployed.sampler().check(policy.resized(self.deployed.size))
        for iteration in self._etas.extremes:
            self.sde(iteration).check(policy)


def count_trained(evaluated: PromptSet, trained: PromptSet, warn: bool = True) -> int:
    """The number of evaluated prompts that are trained on, too. There is a warning if there is one."""
    seen, count = overlap(trained, evaluated), len(set(evaluated.texts))
    if seen and warn:
        warnings.warn(
            f"{len(seen)} of the {count} prompts in prompts.evaluation are trained on ({seen[0]!r}), so the figures say little about new ones: "
            "give others, or the two parts of one source (SOURCE#train and SOURCE#eval)",
            stacklevel=3,
        )
    return len(seen)


def write_grids(out: Path, when: str, ode: Tensor, sde: Tensor, prompts: list[str]) -> None:
    """Writes `samples/{when}_ode.png`, `samples/{when}_sde.png`, and the captions in `prompts.json`."""
    (out / "samples").mkdir(exist_ok=True)
    for sampler, images in (("ode", ode), ("sde", sde)):
        buffer = io.BytesIO()
        image_grid(images, columns=8, scale=max(1, 96 // images.shape[-1]), labels=prompts).save(buffer, format="PNG")
        atomic_write_bytes(out / "samples" / f"{when}_{sampler}.png", buffer.getvalue())
    atomic_write_text(out / "samples" / "prompts.json", json.dumps(prompts, ensure_ascii=False))


def _plain(scores: Scores) -> dict[str, list[float]]:
    """Every score, to the seven digits that float32 has."""
    return {name: [float(f"{value:.7g}") for value in values] for name, values in scores.items()}


class Evaluation:
    """The evaluations of one run, which share prompts and noise; the first one also measures the base model.

    Every process draws a share of the images and gets all results.

    Args:
        batches: size of the micro-batches, shared with the rollout. Default: `rollout.batch_size`.
        trained: prompts of training. Evaluating on any of them gives a warning and is counted in
            every result.
        prompts: prompts to evaluate on. Default: those of `config.prompts.evaluation`.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: TrainablePolicy,
        rewards: WeightedRewards | Scorer,
        accelerator: Accelerator,
        out: Path,
        batches: MicroBatch | None = None,
        trained: PromptSet | None = None,
        prompts: PromptSet | None = None,
    ) -> None:
        self.config, self.policy, self.accelerator, self.out = config, policy, accelerator, out
        prompts, count = prompts or load_prompts(config.prompts.evaluation), config.evaluation.num_images
        batch_size = batches or config.rollout.batch_size
        each = config.evaluation.images_per_prompt
        self.measurement = Measurement(
            prompts, rewards.evaluate, count, config.seed, batch_size=batch_size, images_per_prompt=each
        )
        self.whole_groups = rewards.whole_groups
        self.samplers = SamplerPair(config)
        self.samplers.check(policy)
        known = trained or PromptSet([])
        self.prompts_trained_on = count_trained(self.measurement.prompts, known, warn=accelerator.is_main_process)
        self.samples = share(count, accelerator.num_processes, accelerator.process_index)
        self.base_scores: dict[str, list[float]] | None = None  # rewards of the base model's ODE images, once measured
        self.base_deployed: dict[str, list[float]] | None = None  # the same under the deployed sampler, if there is one
        self.last: dict[str, Any] = {}  # the newest result
        self.scores: dict[str, Any] = {}  # the scores behind it, image by image, and the prompts' clusters

    @property
    def measures_base(self) -> bool:
        """Whether the next evaluation also draws with the base model: a new adapter changes nothing at first."""
        return self.base_scores is None and self.config.lora.init is not None

    @property
    def work(self) -> int:
        """The number of image steps that the next evaluation costs this process."""
        deployed = (1 + self.measures_base) * self.samplers.deployed_evaluations
        return len(self.samples) * ((2 + self.measures_base) * self.samplers.num_steps + deployed)

    @property
    def fallen(self) -> str | None:
        """The reward that has fallen further than `evaluation.stop_on_fall` allows, in the newest result."""
        return fallen(self.last, self.config.evaluation.stop_on_fall)

    def measure(self, on_step: Progress, grids: str | None = None, iteration: int = 0) -> dict[str, Any]:
        """Evaluate the policy with its present weights.

        Args:
            grids: "before" or "after": also write pictures of both samplers under that name. An
                evaluation in which a reward has fallen too far ends the run and always writes those
                of "after".
            iteration: iteration that the evaluation follows, which determines the SDE side's eta.

        Returns:
            `eta`, `num_steps`, `prompts_trained_on` (number of prompts that are not held out), and the
            estimates of `compare` by quantity and reward, as plain values; under `std` the standard
            deviation of each reward over the ODE's images, under `deployed` the estimates of the
            deployed sampler, if there is one, under `divergence` those from each gold reward, and
            under `path_kl` that of the KL in nats, if asked for.
        """
        ode_images, ode = self._images(self.samplers.ode, on_step)
        stochastic = self.samplers.sde(iteration)
        kl: list[Tensor] | None = [] if self.config.evaluation.path_kl else None
        sde_images, sde = self._images(stochastic, on_step, kl=kl)
        deployed = {} if self.samplers.deployed is None else {"deployed": self._deployed(sde, on_step)}
        if self.base_scores is None:
            base_ode = ode
            if self.measures_base:
                with self.policy.reference():
                    base_ode = self._images(self.samplers.ode, on_step)[1]
            self.base_scores = {name: values.tolist() for name, values in base_ode.items()}
        base = {name: np.array(values) for name, values in self.base_scores.items()}
        clusters = self.measurement.clusters
        sides = {"ode": ode, "sde": sde, "base": base}
        self.scores = {"clusters": clusters, **{side: _plain(scores) for side, scores in sides.items()}}
        self.last = {
            "eta": self.samplers.eta(iteration),
            "num_steps": self.samplers.num_steps,
            "prompts_trained_on": self.prompts_trained_on,
            **by_quantity(compare(ode, sde, base, clusters)),
            "std": {name: float(values.std()) for name, values in ode.items()},
            **deployed,
        }
        if gold := self.config.evaluation.gold_rewards:
            trained = WEIGHTED_SUM if len(self.config.rewards) > 1 else next(iter(self.config.rewards))
            found = divergences(ode, base, trained, gold, clusters)
            self.last["divergence"] = {name: estimate.to_dict() for name, estimate in found.items()}
        if kl:
            self.last["path_kl"] = estimate_mean(self._gather(kl[0]).numpy(), self.measurement.clusters).to_dict()
        if count := self.config.evaluation.strip_images:
            strip = self._gather(thumbnails(ode_images))[:count]
            if self.accelerator.is_main_process:
                write_strip(self.out, iteration, strip, self.measurement.shown().head(count).texts)
        if grids is None and self.fallen is not None:
            grids = "after"
        if grids is not None:
            count = self.config.evaluation.grid_images
            ode_shown, sde_shown = self._gather(ode_images)[:count], self._gather(sde_images)[:count]
            if self.accelerator.is_main_process:
                write_grids(self.out, grids, ode_shown, sde_shown, self.measurement.shown().head(count).texts)
        return self.last

    def again(self, states: Mapping[str, AbstractContextManager[Any]], on_step: Progress) -> dict[str, Scores]:
        """Score the ODE images of several weights, all from fresh noise that no evaluation has seen.

        `states` has, by the name of the weights, the context inside which the policy holds them.
        """
        fresh, scores = replace(self.measurement, stream="confirmation"), {}
        for name, weights in states.items():
            with weights:
                scores[name] = self._images(self.samplers.ode, on_step, fresh)[1]
        return scores

    def _deployed(self, sde: Scores, on_step: Progress) -> dict[str, Any]:
        """The deployed sampler as plain values, with its reward, gap to the SDE and improvement by reward."""
        settings = self.samplers.deployed
        assert settings is not None
        served = self._images(settings.sampler(), on_step, size=settings.size)[1]
        if self.base_deployed is None:
            base = served
            if self.measures_base:
                with self.policy.reference():
                    base = self._images(settings.sampler(), on_step, size=settings.size)[1]
            self.base_deployed = {name: values.tolist() for name, values in base.items()}
        known = {name: np.array(values) for name, values in self.base_deployed.items()}
        estimates = by_quantity(compare(served, sde, known, self.measurement.clusters))
        chosen = {"reward": estimates["ode"], "gap": estimates["gap"], "improvement": estimates["improvement"]}
        return {"sampler": settings.model_dump(mode="json"), **chosen}

    def _images(
        self,
        sampler: Sampler,
        on_step: Progress,
        measurement: Measurement | None = None,
        size: int | None = None,
        kl: list[Tensor] | None = None,
    ) -> tuple[Tensor, Scores]:
        """This process's images, of a `size` in pixels or the policy's own, and every image's scores.

        The list `kl` receives the KL of this process's images.
        """
        measurement = measurement or self.measurement
        if kl is not None:
            assert isinstance(sampler, SDE)
            images, nats = images_and_path_kl(self.policy, sampler, measurement, on_step, self.samples)
            kl.append(nats)
        else:
            images = measurement.images(self.policy.resized(size), sampler, on_step, self.samples)
        if self.whole_groups and self.accelerator.num_processes > 1:  # the processes share the images of a prompt
            scores: list[Scores | None] = [None]
            everything = self._gather(images)
            with failing_together(self.accelerator):
                if self.accelerator.is_main_process:
                    scores = [measurement.scores(everything)]
            return images, broadcast_object_list(scores)[0]
        with failing_together(self.accelerator):
            own = measurement.scores(images, self.samples)
        return images, {name: self._gather(torch.from_numpy(values)).numpy() for name, values in own.items()}

    def _gather(self, values: Tensor) -> Tensor:
        return gather(self.accelerator, values, self.measurement.num_images)

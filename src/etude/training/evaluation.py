"""Evaluate training: held-out images of the current weights under the ODE and under the SDE, from
the same noise.

    improvement = E r(ODE, tuned) - E r(ODE, base)          gap = E r(ODE, tuned) - E r(SDE_eta, tuned)

Both samplers take `evaluation.num_steps` steps (default: those of training) over the same levels,
with the guidance of training. The ODE is deployed. On the SDE side every step is stochastic, with
the training kernel at the eta of the iteration that the evaluation follows; the base model is
evaluated at the eta of the first iteration. Two steps are deterministic by nature: the one into
clean data, and the one out of pure noise unless `sampling.first_step` is "sde" or "capped".

For DDPO and GRPO the SDE side is the training sampler. For MixGRPO it is not: it has no window and
no compressed tail. The gap is then, as for every other run, between the ODE and the fully
stochastic sampler. The mixed sampler, with its few stochastic steps, lies somewhere between the
two.

Under `sampling.eta_schedule` over iterations the SDE side moves. Each evaluation records its eta,
and the last one has the last iteration's, so a gap may narrow because eta falls. The ODE reward and
the improvement do not depend on eta; `etude gap` measures any run at any one eta. A schedule over
steps is stretched to the evaluation's number of steps. A list of etas is taken as it is.
"""

from __future__ import annotations

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
from etude.config import TrainConfig
from etude.learning.exchange import gather, share
from etude.measuring.gap import Measurement, Scores, by_quantity, compare
from etude.policies import Policy, TrainablePolicy
from etude.prompts import PromptSet, load_prompts, overlap
from etude.rewards import WeightedRewards
from etude.sampling.etas import Eta, compact
from etude.sampling.sampler import ODE, SDE, Sampler
from etude.training import finish
from etude.training.guards import fallen
from etude.training.processes import failing_together
from etude.training.reward_queue import Scorer


class SamplerPair:
    """The two samplers of a run's evaluations: the ODE, and the SDE at the eta of an iteration.

    Attributes:
        num_steps: number of steps of both.
        ode: the sampler of deployment.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._sampling = config.sampling
        self._etas = config.sampling.etas(config.iterations)
        self.num_steps = config.evaluation.num_steps or config.sampling.num_steps
        self.ode = ODE(self.num_steps, config.sampling.guidance_scale)

    def eta(self, iteration: int) -> float | list[float]:
        """The eta of the evaluation after an iteration, by step where it differs."""
        return compact(self._etas.at(iteration, self.num_steps))

    def sde(self, eta: Eta) -> SDE:
        """The training kernel at an eta, in every step."""
        sampling = self._sampling
        return SDE(eta, self.num_steps, sampling.kernel, sampling.first_step, sampling.guidance_scale)

    def check(self, policy: Policy) -> None:
        """Refuses an eta that the kernel does not allow at the policy's levels.

        Raises:
            EtudeError: an evaluation of the run has such an eta.
        """
        for iteration in self._etas.extremes:
            self.sde(self.eta(iteration)).check(policy)


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


class Evaluation:
    """The evaluations of one run, which share prompts and noise; the first one also measures the base model.

    Every process draws a share of the images and gets all results.

    Args:
        batches: size of the micro-batches of sampling, which the rollout may share. Default:
            `rollout.batch_size`.
        trained: prompts of training. Evaluating on any of them gives a warning and is counted in
            every result.

    Attributes:
        samplers: the two samplers.
        measurement: prompts, rewards and noise of every evaluation.
        whole_groups: whether a reward compares the images of a prompt.
        work: number of image steps that the next evaluation costs this process.
        base_scores: rewards of the base model's ODE images by name, once measured.
        last: newest result.
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
    ) -> None:
        self.config, self.policy, self.accelerator, self.out = config, policy, accelerator, out
        evaluation = config.evaluation
        self.measurement = Measurement(
            load_prompts(config.prompts.evaluation),
            rewards.evaluate,
            evaluation.num_images,
            config.seed,
            batch_size=batches or config.rollout.batch_size,
        )
        self.whole_groups = rewards.whole_groups
        self.samplers = SamplerPair(config)
        self.samplers.check(policy)
        self.prompts_trained_on = count_trained(
            self.measurement.prompts, trained or PromptSet([]), warn=accelerator.is_main_process
        )
        self.samples = share(evaluation.num_images, accelerator.num_processes, accelerator.process_index)
        self.base_scores: dict[str, list[float]] | None = None
        self.last: dict[str, Any] = {}

    @property
    def measures_base(self) -> bool:
        """Whether the next evaluation also draws with the base model: a new adapter changes nothing at first."""
        return self.base_scores is None and self.config.lora.init is not None

    @property
    def work(self) -> int:
        return (2 + self.measures_base) * len(self.samples) * self.samplers.num_steps

    @property
    def fallen(self) -> str | None:
        """The reward that has fallen further than `evaluation.stop_on_fall` allows, in the newest
        result.
        """
        return fallen(self.last, self.config.evaluation.stop_on_fall)

    def measure(self, on_step: Progress, grids: str | None = None, iteration: int = 0) -> dict[str, Any]:
        """Evaluate the policy with its present weights.

        Args:
            on_step: called with the number of images that just made one step.
            iteration: iteration that the evaluation follows, which determines the SDE side's eta.
            grids: "before" or "after": also write pictures of both samplers under that name. An
                evaluation in which a reward has fallen too far ends the run and always writes those
                of "after".

        Returns:
            `eta` (a list where it differs by step), `num_steps`, `prompts_trained_on` (number of
            prompts that are not held out), and the estimates of `compare` by quantity and reward,
            as plain values.
        """
        eta = self.samplers.eta(iteration)
        ode_images, ode = self._images(self.samplers.ode, on_step)
        sde_images, sde = self._images(self.samplers.sde(eta), on_step)
        if self.base_scores is None:
            base_ode = ode
            if self.measures_base:
                with self.policy.reference():
                    base_ode = self._images(self.samplers.ode, on_step)[1]
            self.base_scores = {name: values.tolist() for name, values in base_ode.items()}
        base = {name: np.array(values) for name, values in self.base_scores.items()}
        estimates = by_quantity(compare(ode, sde, base, self.measurement.clusters))
        settings = {"eta": eta, "num_steps": self.samplers.num_steps, "prompts_trained_on": self.prompts_trained_on}
        self.last = {**settings, **estimates}
        if grids is None and self.fallen is not None:
            grids = "after"
        if grids is not None:
            count = self.config.evaluation.grid_images
            ode_shown, sde_shown = self._gather(ode_images)[:count], self._gather(sde_images)[:count]
            if self.accelerator.is_main_process:
                finish.write_grids(self.out, grids, ode_shown, sde_shown, self.measurement.shown().head(count).texts)
        return self.last

    def again(self, states: Mapping[str, AbstractContextManager[Any]], on_step: Progress) -> dict[str, Scores]:
        """Score the ODE images of several weights, all from fresh noise that no evaluation has
        seen.

        Args:
            states: by the name of the weights, the context manager inside which the policy has
                them.
            on_step: called with the number of images that just made one step.
        """
        fresh, scores = replace(self.measurement, stream="confirmation"), {}
        for name, weights in states.items():
            with weights:
                scores[name] = self._images(self.samplers.ode, on_step, fresh)[1]
        return scores

    def _images(
        self, sampler: Sampler, on_step: Progress, measurement: Measurement | None = None
    ) -> tuple[Tensor, Scores]:
        """This process's images, and every image's scores."""
        measurement = measurement or self.measurement
        images = measurement.images(self.policy, sampler, on_step, self.samples)
        if self.whole_groups and self.accelerator.num_processes > 1:
            return images, self._scores_of_whole_groups(self._gather(images), measurement)
        with failing_together(self.accelerator):
            own = measurement.scores(images, self.samples)
        return images, {name: self._gather(torch.from_numpy(values)).numpy() for name, values in own.items()}

    def _scores_of_whole_groups(self, images: Tensor, measurement: Measurement) -> Scores:
        """The scores of all images, by the main process: the images of a prompt come from several
        processes.
        """
        scores: list[Scores | None] = [None]
        with failing_together(self.accelerator):
            if self.accelerator.is_main_process:
                scores = [measurement.scores(images)]
        (found,) = broadcast_object_list(scores)
        return found

    def _gather(self, values: Tensor) -> Tensor:
        return gather(self.accelerator, values, self.measurement.num_images)

"""What training is judged by: held-out images of the current weights under the ODE and under the SDE, from the same noise.

    improvement = E r(ODE, tuned) - E r(ODE, base)          gap = E r(ODE, tuned) - E r(SDE_eta, tuned)

Both samplers take `evaluation.num_steps` steps (by default those of training) over the same levels, with the guidance of training.
The ODE is what is deployed. The SDE side has every step stochastic, with the training kernel at the eta of the iteration that it follows
(the base model's at that of the first one), except those that are deterministic by nature (the one into clean data; the one out of pure
noise unless `sampling.first_step` is "sde"). For DDPO and GRPO that is the training sampler. For MixGRPO it is not: there is no window and
no compressed tail in it, so the gap is that between the ODE and the fully stochastic sampler, as for every other run, and not that of the
mixed sampler, whose few stochastic steps lie somewhere between the two.

Under `sampling.eta_schedule` over iterations the SDE side thus moves: each evaluation says which eta it took, the last one has the last
iteration's, and its gap narrows for two reasons when eta falls. The ODE reward and the improvement do not depend on it; `etude gap` measures any
run at any one eta. Over steps the schedule is stretched to the evaluation's number of steps. A list of etas by step is taken as it is.
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
from torch import Tensor

from etude.batching import MicroBatch
from etude.config import TrainConfig
from etude.learning.exchange import gather, share
from etude.measuring.gap import Progress, Protocol, Scores, summarise
from etude.policies import TrainablePolicy
from etude.prompts import PromptSet, load_prompts, overlap
from etude.rewards import WeightedRewards
from etude.sampling.etas import Eta, compact
from etude.training import finish
from etude.training.guards import fallen
from etude.training.processes import failing_together
from etude.training.reward_queue import Scorer


class Evaluation:
    """The evaluations of one run; they share prompts and noise, and the first one is the base model's.

    Every process makes a share of the images and has all the results.

    Args:
        batches: the size of the micro-batches of sampling, which a rollout may share; default: `rollout.batch_size`.
        trained: the prompts of training. Evaluating on any of them is said, in a warning and in every result.

    Attributes:
        num_steps: steps of both samplers.
        work: image steps that one evaluation costs this process.
        base_scores: rewards of the base model's ODE images, by name, once measured.
        last: the newest result.
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
        sampling, evaluation = config.sampling, config.evaluation
        self.num_steps = evaluation.num_steps or sampling.num_steps
        self.protocol = Protocol(
            prompts=load_prompts(config.prompts.evaluation).head(evaluation.num_images),
            score=rewards.evaluate,
            num_images=evaluation.num_images,
            guidance_scale=sampling.guidance_scale,
            kernel=sampling.kernel,
            seed=config.seed,
            batch_size=batches or config.rollout.batch_size,
            first_step=sampling.first_step,
        )
        self.etas = sampling.etas(config.iterations)
        for iteration in self.etas.extremes:
            self.protocol.plan(self._eta(iteration), self.num_steps).tabulate(policy.grid(self.num_steps))
        self.prompts_trained_on = self._trained_on(trained or PromptSet([]))
        self.samples = share(evaluation.num_images, accelerator.num_processes, accelerator.process_index)
        self.work = 2 * len(self.samples) * self.num_steps
        self.base_scores: dict[str, list[float]] | None = None
        self.last: dict[str, Any] = {}

    def _trained_on(self, trained: PromptSet) -> int:
        """How many of the prompts that are evaluated are trained on too."""
        seen, count = overlap(trained, self.protocol.prompts), len(set(self.protocol.prompts.texts))
        if seen and self.accelerator.is_main_process:
            warnings.warn(
                f"{len(seen)} of the {count} prompts in prompts.evaluation are trained on ({seen[0]!r}), so the figures say little about new ones: "
                "give others, or the two parts of one source (SOURCE#train and SOURCE#eval)",
                stacklevel=3,
            )
        return len(seen)

    @property
    def fallen(self) -> str | None:
        """The reward that has fallen further than `evaluation.stop_on_fall` allows, in the newest result."""
        return fallen(self.last, self.config.evaluation.stop_on_fall)

    def measure(self, on_step: Progress, grids: str | None = None, iteration: int = 0) -> dict[str, Any]:
        """Evaluates the policy as it is.

        Args:
            on_step: called with the number of images that just made one step.
            iteration: that it follows, which determines the SDE side's eta.
            grids: "before" or "after": also write pictures of both samplers under that name. Without it an evaluation in which a reward
                has fallen too far, which is the last, writes those of "after".

        Returns:
            `eta` (a list where it differs by step), `num_steps`, `prompts_trained_on` (how many of the prompts are not held out), and
            the estimates of `summarise` by quantity and reward.
        """
        eta = self._eta(iteration)
        ode_images, ode = self._images(0.0, on_step)
        sde_images, sde = self._images(eta, on_step)
        if self.base_scores is None:
            self.base_scores = {name: values.tolist() for name, values in ode.items()}
        base = {name: np.array(values) for name, values in self.base_scores.items()}
        summary = summarise(ode, sde, base, self.protocol.clusters)
        self.last = {"eta": eta, "num_steps": self.num_steps, "prompts_trained_on": self.prompts_trained_on, **summary}
        if grids is None and self.fallen is not None:
            grids = "after"
        if grids is not None:
            count = self.config.evaluation.grid_images
            ode_shown, sde_shown = self._gather(ode_images)[:count], self._gather(sde_images)[:count]
            if self.accelerator.is_main_process:
                finish.write_grids(self.out, grids, ode_shown, sde_shown, self.protocol.shown().head(count).texts)
        return self.last

    def again(self, states: Mapping[str, AbstractContextManager[Any]], on_step: Progress) -> dict[str, Scores]:
        """Rewards under the ODE of every image from noise that no evaluation has seen, by the name of the weights.

        Args:
            states: context managers inside which the policy has those weights.
        """
        fresh, scores = replace(self.protocol, stream="confirmation"), {}
        for name, weights in states.items():
            with weights:
                scores[name] = self._images(0.0, on_step, fresh)[1]
        return scores

    def _eta(self, iteration: int) -> float | list[float]:
        return compact(self.etas.at(iteration, self.num_steps))

    def _images(self, eta: Eta, on_step: Progress, protocol: Protocol | None = None) -> tuple[Tensor, Scores]:
        """This process's images, and every image's scores."""
        protocol = protocol or self.protocol
        images = protocol.images(self.policy, eta, self.num_steps, on_step, self.samples)
        with failing_together(self.accelerator):
            own = protocol.scores(images, self.samples)
        return images, {name: self._gather(torch.from_numpy(values)).numpy() for name, values in own.items()}

    def _gather(self, values: Tensor) -> Tensor:
        return gather(self.accelerator, values, self.protocol.num_images)

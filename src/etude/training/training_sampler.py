"""The sampler of a run's training images: the plan of the iteration, or a deterministic solver."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from etude.batching import MicroBatch, Progress
from etude.config import TrainConfig
from etude.learning.draws import Draw
from etude.learning.objectives import Objective, Samples
from etude.policies import TrainablePolicy
from etude.policies.loading import DTYPES
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import StepTable
from etude.sampling.rollout import Trajectory, rollout
from etude.sampling.sample_gradients import SampleGradients
from etude.sampling.solvers import Solver

OnImages = Callable[[slice, Tensor], None]
"""Receiver of finished images: their rows, and uint8 `[n, 3, h, w]`."""


class TrainingSampler:
    """Draws an iteration's images from the weights of the moment, and keeps what the objective needs.

    Args:
        config: settings of the run.
        policy: policy that draws.
        parameters: trained weights by name, which the objective may swap while it draws.
        objective: objective that says what the rollout keeps.
        solver: solver that draws the images. None: the kernels of the iteration's plan.
        batches: size of the micro-batches.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: TrainablePolicy,
        parameters: dict[str, nn.Parameter],
        objective: Objective,
        solver: Solver | None,
        batches: MicroBatch,
    ) -> None:
        self.config, self.policy, self.parameters = config, policy, parameters
        self.objective, self.solver, self.batches = objective, solver, batches

    def evaluations(self, table: StepTable) -> int:
        """Network evaluations for one image."""
        return table.num_evaluations if self.solver is None else self.solver.evaluations

    def draw(self, iteration: int, table: StepTable, batch: Draw, on_images: OnImages, on_step: Progress) -> Samples:
        """Draws this process's images; `on_images` gets them while the next are drawn, where memory allows."""
        config, own = self.config, batch.own

        def decode(rows: slice, latents: Tensor) -> None:
            on_images(rows, self.policy.decode(latents))

        ahead = config.rollout.score_ahead and not config.memory.offload
        dtype, guidance = config.rollout.dtype, config.sampling.guidance_scale
        conditioning, on_rows = self.policy.encode(own.texts), decode if ahead else None
        noise = NoiseSource(config.seed, "training", iteration)
        with self.policy.precision(DTYPES[dtype] if dtype else None), self.objective.sampling(self.parameters):
            if self.solver is not None:
                latents = self.solver.walk(
                    self.policy, conditioning, noise, batch.noise_keys, self.batches, on_step, on_rows
                )
                trajectory = Trajectory.of_images(latents)
            else:
                trajectory = rollout(
                    self.policy,
                    table,
                    conditioning,
                    noise,
                    batch.indices,
                    guidance,
                    self.batches,
                    config.objective.logprob_reduction,
                    reference=self.policy.reference if self.objective.needs_reference else None,
                    on_step=on_step,
                    noise_samples=batch.noise_keys,
                    on_rows=on_rows,
                    prompts=own.texts,
                    starts=batch.starts,
                    keep_means=self.objective.keeps_means,
                    gradients=self._gradients(len(batch.indices)),
                )
        if not ahead:
            decode(slice(0, len(batch.indices)), trajectory.latents)
        noise = NoiseSource(config.seed, "objective", iteration)
        size = config.rollout.images_per_prompt
        return Samples(table, trajectory, conditioning, guidance, batch.indices, noise, size)

    def _gradients(self, images: int) -> SampleGradients | None:
        """The receiver of the rollout's gradients, if the update is to use them."""
        if self.config.objective.gradients == "replay":
            return None
        policy = self.policy
        backward = partial(policy.attention.allowed, policy.device, policy.denoiser)
        return SampleGradients(policy.network, self.parameters, images, backward)

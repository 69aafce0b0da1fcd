"""Offline iterations: pairs of images from a file take the place of rollouts and rewards."""

from __future__ import annotations

import torch

from etude.batching import Progress
from etude.config import TrainConfig
from etude.errors import EtudeError
from etude.learning.objectives import Samples
from etude.policies import TrainablePolicy
from etude.policies.pipeline import PipelinePolicy
from etude.prompts.preference_pairs import Pair, load_pairs
from etude.sampling.noise import NoiseSource, keyed_generator, to_device
from etude.sampling.plans import StepTable
from etude.sampling.rollout import Trajectory


class OfflinePairs:
    """The pairs of a file as samples: of each pair the preferred image, then the other one.

    An iteration has `rollout.images_per_iteration / 2` pairs. No pair comes a second time before
    every pair has come once. EtudeError if the file (`etude.prompts.preference_pairs`) cannot be
    used, or `rollout.images_per_prompt` is not 2.
    """

    def __init__(self, source: str, config: TrainConfig) -> None:
        if config.rollout.images_per_prompt != 2:
            raise EtudeError(
                f"objective.options.pairs gives pairs of images: set rollout.images_per_prompt to 2, not "
                f"{config.rollout.images_per_prompt}."
            )
        self.pairs, self.config = load_pairs(source), config

    def drawn(self, iteration: int) -> list[Pair]:
        """The pairs of an iteration, over all processes."""
        count = self.config.rollout.images_per_iteration // 2
        generator = keyed_generator(self.config.seed, "pairs", iteration)
        chosen: list[int] = []
        while len(chosen) < count:
            chosen += generator.permutation(len(self.pairs)).tolist()
        return [self.pairs[number] for number in chosen[:count]]

    def captions(self, iteration: int) -> list[str]:
        """The prompts of an iteration's pairs."""
        return [pair.caption for pair in self.drawn(iteration)]

    def samples(
        self, policy: TrainablePolicy, table: StepTable, iteration: int, indices: list[int], on_step: Progress
    ) -> Samples:
        """The images `indices` of this process, whole pairs, encoded, with advantages 1 and -1.

        `on_step` is called with the number of images that were just encoded. EtudeError if the model
        has no autoencoder, or an image cannot be read.
        """
        if not isinstance(policy, PipelinePolicy):
            raise EtudeError(
                "objective.options.pairs needs a model with an autoencoder, to encode the images of the file."
            )
        drawn = self.drawn(iteration)
        own = [drawn[index // 2] for index in indices[::2]]
        latents = torch.cat([self._encoded(policy, pair, on_step) for pair in own])
        conditioning = policy.encode([pair.caption for pair in own for _ in range(2)])
        noise, guidance = NoiseSource(self.config.seed, "objective", iteration), self.config.sampling.guidance_scale
        advantages = torch.tensor([1.0, -1.0]).repeat(len(own))
        return Samples(
            table,
            Trajectory.of_images(latents),
            conditioning,
            guidance,
            indices,
            noise,
            2,
            to_device(advantages, policy.device),
        )

    def _encoded(self, policy: PipelinePolicy, pair: Pair, on_step: Progress) -> torch.Tensor:
        both = [torch.tensor(image).permute(2, 0, 1) for image in pair.images(*policy.image_size)]
        on_step(2)
        return policy.encode_images(torch.stack(both))

"""The seam between a rollout and a loss: what an objective keeps of a rollout, what it makes of it, and what it remembers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, nn

from etude.batching import MicroBatch, Progress
from etude.config import ObjectiveConfig
from etude.errors import EtudeError
from etude.learning.metrics import Metric, Records
from etude.policies import Conditioning, TrainablePolicy
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import StepTable
from etude.sampling.rollout import Trajectory


class Keep(Enum):
    """What a rollout keeps of each image."""

    TRANSITIONS = "states and log-probabilities of the trained steps"
    IMAGES = "the final latents alone"


@dataclass(frozen=True)
class Samples:
    """The images of one iteration that this process learns from.

    Attributes:
        table: the plan they were sampled under.
        trajectory: their final latents; under `Keep.TRANSITIONS` also the states and log-probabilities of the trained steps.
        conditioning: their prompts, encoded.
        guidance_scale: guidance of the rollout.
        indices: their numbers among the images of all processes, the keys of their noise.
        noise: noise of this iteration for what an objective draws itself.
        advantages: `[n]`, on the policy's device; empty before the images are judged.
    """

    table: StepTable
    trajectory: Trajectory
    conditioning: Conditioning
    guidance_scale: float
    indices: list[int]
    noise: NoiseSource
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))

    def judged(self, advantages: Tensor) -> Samples:
        """The same samples with their advantages."""
        return replace(self, advantages=advantages)


@dataclass(frozen=True)
class Loss:
    """What a micro-batch gives.

    Attributes:
        value: scalar to differentiate, a mean over the `m` pairs.
        records: detached tensors `[m]`, or scalars, by name, from which the objective's metrics are computed.
    """

    value: Tensor
    records: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """What an optimiser step minimises, from what the rollout kept.

    A pair is (sample, column). Under `Keep.TRANSITIONS` the columns of a sample are its trained steps; otherwise the objective
    says how many there are, for example noise levels. An optimiser step trains some pairs, in micro-batches.

    Attributes:
        label: name for the model card, for example "PPO's clipped ratio".
        title: published name of a run with this objective; empty where window and advantage name the algorithm.
        keep: what the rollout keeps.
        metrics: the numbers that it adds to those of `etude.learning.metrics.COMMON`.
    """

    label: ClassVar[str]
    title: ClassVar[str] = ""
    keep: ClassVar[Keep] = Keep.TRANSITIONS
    metrics: ClassVar[tuple[Metric, ...]] = ()

    @classmethod
    def from_config(cls, config: ObjectiveConfig) -> Objective:
        """The objective of a configuration. Default: a constructor that takes `objective.options`.

        Raises:
            EtudeError: an option that the constructor does not take.
        """
        try:
            return cls(**config.options)
        except TypeError as error:
            raise EtudeError(f"objective.options do not fit {cls.__name__}: {error}.") from error

    @property
    def needs_reference(self) -> bool:
        """Whether the loss asks for the model before training, of which full fine-tuning must then keep a copy."""
        return False

    def columns(self, table: StepTable) -> int:
        """Number of columns of each sample under a plan. Default: the trained steps."""
        return len(table.trained_steps)

    def averaged_dimensions(self, policy: TrainablePolicy) -> int:
        """Number of latent dimensions that the loss is a mean over, from which float16 chooses its loss scale."""
        return policy.dimensions

    def sampling(self, parameters: Mapping[str, nn.Parameter]) -> AbstractContextManager[None]:
        """Context manager inside which the parameters are those that draw the images. Default: the trained ones as they are."""
        return nullcontext()

    def prepare(
        self,
        policy: TrainablePolicy,
        samples: Samples,
        batches: list[tuple[Tensor, Tensor]],
        micro_batches: MicroBatch,
        on_step: Progress,
    ) -> Records:
        """Work before the first optimiser step of an iteration; returns what is recorded of it. Default: nothing.

        Args:
            batches: rows and columns of the distinct pairs, an entry an optimiser step.
            on_step: called with 0 after each micro-batch.
        """
        return {}

    @abstractmethod
    def loss(self, policy: TrainablePolicy, samples: Samples, rows: Tensor, columns: Tensor) -> Loss:
        """The loss of one micro-batch of pairs under the present weights.

        Args:
            rows: int64 `[m]`, which samples.
            columns: int64 `[m]`, which column of each.
        """

    def after_first_step(self, records: Records) -> Records:
        """What is recorded of the first optimiser step of an iteration beside the records of all of them. Default: nothing."""
        return {}

    def after_step(self, parameters: Mapping[str, nn.Parameter]) -> None:  # noqa: B027 - a hook
        """What follows each optimiser step, for example an average of the weights. Default: nothing."""

    def evaluations(self, images: int, trained: int, distinct: int, pairs: int) -> dict[str, int]:
        """Network evaluations of one iteration beside its rollout, by part.

        Args:
            images: images of the iteration.
            trained: trained steps of each.
            distinct: pairs that some optimiser step trains, each counted once.
            pairs: pairs that all optimiser steps together train.
        """
        return {"replay": pairs}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it. Default: nothing."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - a hook
        """Restores what `state` gave."""

"""The interface of an objective: what it keeps of a rollout, its loss, its metrics and its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Self

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
    """The data that a rollout keeps of each image."""

    TRANSITIONS = "states and log-probabilities of the trained steps"
    IMAGES = "the final latents alone"


@dataclass(frozen=True)
class Samples:
    """The images of one iteration that this process learns from.

    The trajectory has the final latents, and under `Keep.TRANSITIONS` the data of the trained
    steps. `indices` are the numbers of the images among those of all processes, the keys of their
    noise; `noise` is for the objective's own draws. A group is `images_per_prompt` consecutive
    images. The advantages `[n]` are on the policy's device, and empty before the images are judged.
    """

    table: StepTable
    trajectory: Trajectory
    conditioning: Conditioning
    guidance_scale: float
    indices: list[int]
    noise: NoiseSource
    images_per_prompt: int = 1
    advantages: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))

    def judged(self, advantages: Tensor) -> Samples:
        """The same samples with their advantages."""
        return replace(self, advantages=advantages)


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch, a mean over its `m` pairs, and detached records `[m]` or scalars by name."""

    value: Tensor
    records: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """The loss that an optimiser step minimises, computed from the samples of a rollout.

    A pair is (sample, column). Under `Keep.TRANSITIONS` the columns of a sample are its trained
    steps; otherwise the objective defines them, for example as noise levels. An optimiser step
    trains some pairs, in micro-batches.

    Attributes:
        label: name for the model card, for example "PPO's clipped ratio".
        title: published name of an algorithm with this objective; empty: window and advantage name it.
        keep: data that the rollout keeps.
        by_group: whether a row is a whole group, numbered from 0 in each process, instead of an image.
        pairs: file of preferences that takes the place of rollouts and rewards. Default: none.
        metrics: metrics of the objective, beside those of `etude.learning.metrics.COMMON`.
    """

    label: ClassVar[str]
    title: ClassVar[str] = ""
    keep: ClassVar[Keep] = Keep.TRANSITIONS
    by_group: ClassVar[bool] = False
    pairs: str | None = None
    metrics: ClassVar[tuple[Metric, ...]] = ()

    @classmethod
    def from_config(cls, config: ObjectiveConfig) -> Objective:
        """The objective of a configuration. Default: calls `cls(**objective.options)`."""
        return cls.with_options(config.options)

    @classmethod
    def with_options(cls, options: Mapping[str, Any], **settings: Any) -> Self:
        """Calls `cls(**settings, **options)`; an option that the constructor does not take is an EtudeError."""
        try:
            return cls(**settings, **options)
        except TypeError as error:
            raise EtudeError(f"objective.options do not fit {cls.__name__}: {error}.") from error

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs the model before training. Full fine-tuning must then keep a copy."""
        return False

    @property
    def keeps_means(self) -> bool:
        """Whether the rollout also keeps the means of the trained steps (`Trajectory.mean`)."""
        return False

    def at_ratio_one(self, samples: Samples, policy: TrainablePolicy) -> tuple[Loss, Tensor] | None:
        """The loss over all pairs while no weight has moved, and its derivative by log-probability, `[n, columns]`.

        Default: None, the loss needs a second forward.
        """
        return None

    def columns(self, table: StepTable) -> int:
        """Number of columns of each sample under a plan. Default: the trained steps."""
        return len(table.trained_steps)

    def averaged_dimensions(self, policy: TrainablePolicy) -> int:
        """Number of latent dimensions that the loss is a mean over; it sets float16's loss scale."""
        return policy.dimensions

    def sampling(self, parameters: Mapping[str, nn.Parameter]) -> AbstractContextManager[None]:
        """Context in which the parameters are those that draw the images. Default: the present ones."""
        return nullcontext()

    def prepare(
        self,
        policy: TrainablePolicy,
        samples: Samples,
        batches: list[tuple[Tensor, Tensor]],
        micro_batches: MicroBatch,
        on_step: Progress,
    ) -> Records:
        """Work before the first optimiser step of an iteration; returns its records. Default: none.

        The policy has the weights that drew the images. `batches` are the rows and columns of each
        optimiser step's distinct pairs. Call `on_step` with 0 after each micro-batch.
        """
        return {}

    @abstractmethod
    def loss(self, policy: TrainablePolicy, samples: Samples, rows: Tensor, columns: Tensor) -> Loss:
        """The loss of one micro-batch under the present weights, from the pairs' rows and columns, int64 `[m]`."""

    def after_first_step(self, records: Records) -> Records:
        """Records of an iteration's first optimiser step beside the given ones of its loss. Default: none."""
        return {}

    def after_step(self, parameters: Mapping[str, nn.Parameter]) -> None:  # noqa: B027 - a hook
        """Work after each optimiser step, for example on an average of the weights. Default: nothing."""

    def after_iteration(self, parameters: Mapping[str, nn.Parameter], iteration: int) -> None:  # noqa: B027 - a hook
        """Work after the last optimiser step of an iteration. Default: nothing."""

    def evaluations(self, images: int, trained: int, distinct: int, pairs: int) -> dict[str, int]:
        """Network evaluations of an iteration beside its rollout, by part.

        The arguments are numbers of images, trained steps of each, and distinct and all pairs.
        """
        return {"replay": pairs}

    def state(self) -> dict[str, Tensor]:
        """Memory of the objective for a checkpoint. Default: empty."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - a hook
        """Restores the result of `state`."""

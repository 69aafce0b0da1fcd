"""Matching: objectives that noise the final images again and compare the network's answers with them.

    x = a x0 + s eps        x0: latents of a sampled image; (a, s): a level; eps: fresh noise
    e = x0_hat(x) - x0      error of a network

The velocity of the path (`a eps - s x0` on VP, `eps - x0` on rectified flow) has the error `-e / s`
whatever the network predicts, so that one error serves all parametrisations. No trajectory is
stored, and the images may come from any sampler, the ODE and diffusers' solvers among them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from etude.batching import MicroBatch, Progress
from etude.config import ObjectiveConfig
from etude.errors import EtudeError
from etude.learning.metrics import Metric, Records, mean
from etude.learning.objectives.noise_levels import Levels, LevelSampling, draw_levels
from etude.learning.objectives.objective import Keep, Loss, Objective, Samples
from etude.learning.objectives.old_policy import OldPolicy
from etude.policies import Conditioning, TrainablePolicy
from etude.sampling.noise import to_device
from etude.sampling.paths import per_sample, to_x0_eps
from etude.sampling.plans import StepTable

_OWN = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "velocity", "flow": "velocity"}
_FOREIGN = ("clip_range", "clip_nats", "old_log_prob", "logprob_reduction")


@dataclass(frozen=True)
class Noised:
    """The latents x0 of `m` images and their noise eps, `[m, ...]`, at levels (a, s), `[m]`.

    `own` is the quantity that the network predicts: `velocity`, `epsilon` or `x0`.
    """

    x0: Tensor
    eps: Tensor
    a: Tensor
    s: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    guidance_scale: float
    own: str

    @property
    def x(self) -> Tensor:
        """`a x0 + s eps`."""
        return per_sample(self.a, self.x0) * self.x0 + per_sample(self.s, self.x0) * self.eps

    def error(self, policy: TrainablePolicy) -> Tensor:
        """`x0_hat - x0` of the policy's present weights, `[m, ...]`."""
        x = self.x
        output = policy.predict(x, self.timesteps, self.conditioning, self.guidance_scale)
        return to_x0_eps(output, x, self.a, self.s, policy.prediction_type)[0] - self.x0


class Matching(Objective):
    """The common part of matching objectives: levels, errors under several weights, distances.

        loss = pair_loss + kl_coef mean |v - v_ref|^2

    with the velocities `v` of the trained and `v_ref` of the reference model. Each image is trained
    at `levels` noise levels in an iteration (None: as many as the sampler has steps), drawn as in
    `etude.learning.objectives.noise_levels`. `old_rate` and `old_most` are those of `OldPolicy`.
    Advantages are clipped to +- adv_clip_max. An option out of its range is an EtudeError.
    """

    keep = Keep.IMAGES
    asks_old: ClassVar[bool] = True
    """Whether the loss compares with the old policy's answers."""

    def __init__(
        self,
        levels: int | None = None,
        level_sampling: LevelSampling = "steps",
        old_rate: float = 0.001,
        old_most: float = 0.5,
        kl_coef: float = 0.0,
        adv_clip_max: float = 5.0,
    ) -> None:
        if levels is not None and (not isinstance(levels, int) or levels < 1):
            raise EtudeError(f"objective.options: levels = {levels} must be a whole number of at least 1, or null.")
        if level_sampling not in get_args(LevelSampling):
            raise EtudeError(
                f"objective.options: level_sampling = {level_sampling} must be one of {', '.join(get_args(LevelSampling))}."
            )
        self.levels, self.level_sampling = levels, level_sampling
        self.kl_coef, self.adv_clip_max = kl_coef, adv_clip_max
        self.old = OldPolicy(old_rate, old_most)
        self._at: Levels | None = None
        self._parameters: dict[str, nn.Parameter] = {}

    @classmethod
    def from_config(cls, config: ObjectiveConfig) -> Matching:
        """The objective of a configuration; a setting of log-probabilities is an EtudeError."""
        for name in _FOREIGN:
            value = getattr(config, name)
            if value not in (None, ObjectiveConfig.model_fields[name].default):
                raise EtudeError(
                    f"objective.{name} = {value} is for objectives on log-probabilities, and {config.kind} has none: leave it out."
                )
        return cls.with_options(config.options, kl_coef=config.kl_coef, adv_clip_max=config.adv_clip_max)

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def columns(self, table: StepTable) -> int:
        return self.levels or table.num_steps

    def averaged_dimensions(self, policy: TrainablePolicy) -> int:
        return policy.dimensions

    def sampling(self, parameters: Mapping[str, nn.Parameter]) -> AbstractContextManager[None]:
        """The old policy draws the images."""
        return self.old.active(parameters)

    def prepare(
        self,
        policy: TrainablePolicy,
        samples: Samples,
        batches: list[tuple[Tensor, Tensor]],
        micro_batches: MicroBatch,
        on_step: Progress,
    ) -> Records:
        """Draws the levels of the iteration and keeps the old weights."""
        self._at = draw_levels(policy, samples, self.columns(samples.table), self.level_sampling)
        self._parameters = policy.trainable()
        if self.asks_old or self.old.rate > 0:
            self.old.remember(self._parameters)
        return {}

    def noised(
        self, policy: TrainablePolicy, samples: Samples, rows: Tensor, columns: Tensor, keys: Tensor | None = None
    ) -> Noised:
        """The images of some pairs, each at the level and noise of its column and of the image in `keys`, or itself."""
        assert self._at is not None
        keys = rows if keys is None else keys
        pairs = zip(columns.tolist(), (samples.indices[key] for key in keys.tolist()), strict=True)
        drawn = [
            samples.noise.step([index for _, index in together], column, policy.latent_shape)
            for column, together in groupby(pairs, key=itemgetter(0))
        ]
        at = keys, columns
        return Noised(
            samples.trajectory.latents[rows],
            to_device(torch.cat(drawn), policy.device),
            self._at.a[at],
            self._at.s[at],
            self._at.timesteps[at],
            samples.conditioning.take(rows),
            samples.guidance_scale,
            _OWN[policy.prediction_type],
        )

    @torch.no_grad()
    def old_error(self, policy: TrainablePolicy, noised: Noised) -> Tensor | None:
        """The error of the old weights; None while they equal the present ones."""
        if self.old.current or not self.asks_old:
            return None
        with self.old.active(self._parameters):
            return noised.error(policy)

    @torch.no_grad()
    def reference_error(self, policy: TrainablePolicy, noised: Noised) -> Tensor | None:
        """The error of the reference model; None without a KL."""
        if not self.needs_reference:
            return None
        with policy.reference():
            return noised.error(policy)

    def loss(self, policy: TrainablePolicy, samples: Samples, rows: Tensor, columns: Tensor) -> Loss:
        noised = self.noised(policy, samples, rows, columns)
        # Weights are swapped before the forward that is differentiated, never after it.
        old, reference = self.old_error(policy, noised), self.reference_error(policy, noised)
        error = noised.error(policy)
        old = error.detach() if old is None else old
        advantages = samples.advantages[rows].to(error).clamp(-self.adv_clip_max, self.adv_clip_max)
        records = {
            "matching_error": squared(error.detach(), noised.s**-2),
            "old_distance": squared(error.detach() - old, noised.s**-2),
            **self.records(error.detach(), old, noised),
        }
        value = self.pair_loss(error, old, advantages, noised).mean()
        if reference is not None:
            distance = squared(error - reference, noised.s**-2)
            value = value + self.kl_coef * distance.mean()
            records["reference_distance"] = distance.detach()
        return Loss(value, records)

    @abstractmethod
    def pair_loss(self, error: Tensor, old: Tensor, advantages: Tensor, noised: Noised) -> Tensor:
        """The loss of each pair, `[m]`, without the distance to the reference.

        `error` is `x0_hat - x0` of the trained weights, `[m, ...]`, with gradient; `old` that of the
        old weights. The advantages `[m]` are clipped.
        """

    def records(self, error: Tensor, old: Tensor, noised: Noised) -> dict[str, Tensor]:
        """Further records of the pairs, from errors without gradient. Default: none."""
        return {}

    def after_step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.old.current = False

    def after_iteration(self, parameters: Mapping[str, nn.Parameter], iteration: int) -> None:
        self.old.follow(parameters, iteration)

    def evaluations(self, images: int, trained: int, distinct: int, pairs: int) -> dict[str, int]:
        # A step on weights that still equal the old ones asks the old policy nothing, and so takes fewer.
        return {
            "old policy": pairs if self.asks_old else 0,
            "reference": pairs if self.needs_reference else 0,
            "replay": pairs,
        }

    def state(self) -> dict[str, Tensor]:
        return self.old.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.old.load_state(tensors)


def squared(error: Tensor, weight: Tensor) -> Tensor:
    """`weight mean error^2` of each pair, `[m]`, the mean over the latent dimensions."""
    return weight * error.square().flatten(1).mean(1)


def level_weight(of: str, a: Tensor, s: Tensor) -> Tensor:
    """The weight `[m]` that turns squared errors in x0 into those of `velocity`, `epsilon` or `x0`.

    It is `1 / s^2`, `a^2 / s^2` or 1.
    """
    return {"velocity": s**-2, "epsilon": (a / s) ** 2, "x0": torch.ones_like(s)}[of]


MATCHING_ERROR = Metric(
    "matching_error",
    "matching error",
    "The mean squared error of the trained velocity on the noised images.",
    compute=mean("matching_error"),
    from_zero=True,
)
OLD_DISTANCE = Metric(
    "old_distance",
    "distance to the old policy",
    "The mean squared difference between the trained velocity and that of the policy that drew the images.",
    "above the matching error: the trust region is left; lower the learning rate or raise beta",
    compute=mean("old_distance"),
    from_zero=True,
)
REFERENCE_DISTANCE = Metric(
    "reference_distance",
    "distance to the reference model",
    "With `objective.kl_coef`: the mean squared difference between the trained velocity and that before training.",
    compute=mean("reference_distance"),
    from_zero=True,
)
DISTANCES = (MATCHING_ERROR, OLD_DISTANCE, REFERENCE_DISTANCE)

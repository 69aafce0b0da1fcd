"""PPO's clipped surrogate (arXiv 1707.06347), as DDPO uses it on denoising steps (arXiv 2305.13301)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from etude.batching import MicroBatch, Progress
from etude.config import ObjectiveConfig
from etude.errors import EtudeError
from etude.learning.metrics import Records
from etude.learning.objectives.objective import Samples
from etude.learning.objectives.policy_gradient import (
    RATIOS,
    REFERENCE_KL,
    ROLLOUT_RATIO_DEVIATION,
    ROLLOUT_RATIO_MAX_DEVIATION,
    PolicyGradient,
    PolicyLoss,
    check_shapes,
    clip_advantages,
    diagnostics,
)
from etude.learning.objectives.trust import divergence_masked, normalised_log_ratio
from etude.policies import TrainablePolicy
from etude.sampling.replay import replay_log_prob


class PPO(PolicyGradient):
    """`mean max(-A r, -A clip(r, 1 - c, 1 + c))` with the importance ratio `r`: see `ppo_loss`.

    Args:
        clip_range: c, in units of the ratio. Give this or `clip_nats`.
        clip_nats: clip range in nats of the whole image's log-probability; c = clip_nats / D under
            the mean over D dimensions.
        ratio: `plain`, or `normalised`, GRPO-Guard's. The clip range then belongs to that ratio.
        kl_limit: largest KL of a step to the weights that drew it, reduced like the log-probability.
            Flow-DPPO's trust region then takes the place of the clip. Default: none.
        old_log_prob: "rollout" or "replay", the log-probabilities that the ratios compare with.
        common: arguments of `PolicyGradient`.

    Raises:
        EtudeError: not exactly one of the two clip ranges is set, or an option is out of its range.
    """

    label = "PPO's clipped ratio"
    metrics = (*RATIOS, ROLLOUT_RATIO_DEVIATION, ROLLOUT_RATIO_MAX_DEVIATION, REFERENCE_KL)

    def __init__(
        self,
        clip_range: float | None = 1e-4,
        clip_nats: float | None = None,
        old_log_prob: Literal["rollout", "replay"] = "rollout",
        ratio: Literal["plain", "normalised"] = "plain",
        kl_limit: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if (clip_range is None) == (clip_nats is None):
            raise EtudeError(
                "objective: give exactly one of clip_range and clip_nats, and set the other to null, not "
                f"{clip_range} and {clip_nats}."
            )
        if ratio not in ("plain", "normalised") or (kl_limit is not None and not kl_limit > 0):
            raise EtudeError(
                f"objective.options: ratio = {ratio} must be plain or normalised, and kl_limit = {kl_limit} null or above 0."
            )
        if ratio == "normalised" and kl_limit is not None:
            raise EtudeError(
                "objective.options: ratio = normalised is for the clip, which kl_limit replaces: give one of them."
            )
        self.ratio, self.kl_limit = ratio, kl_limit
        self.range, self.nats, self.old_log_prob = clip_range, clip_nats, old_log_prob

    @classmethod
    def from_config(cls, config: ObjectiveConfig) -> PPO:
        try:
            return cls(
                config.clip_range,
                config.clip_nats,
                config.old_log_prob,
                logprob_reduction=config.logprob_reduction,
                adv_clip_max=config.adv_clip_max,
                kl_coef=config.kl_coef,
                **config.options,
            )
        except TypeError as error:
            raise EtudeError(f"objective.options do not fit {cls.__name__}: {error}.") from error

    @property
    def keeps_means(self) -> bool:
        return self.ratio == "normalised" or self.kl_limit is not None

    def clip_range(self, policy: TrainablePolicy) -> float:
        """c, the clip range of the ratio. In nats it depends on the policy's latent dimensions."""
        if self.range is not None:
            return self.range
        assert self.nats is not None
        return self.nats / self.averaged_dimensions(policy)

    def surrogate(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, policy: TrainablePolicy
    ) -> PolicyLoss:
        return ppo_loss(log_prob, old_log_prob, advantages, self.clip_range(policy), self.adv_clip_max)

    def surrogate_of(
        self, log_ratio: Tensor, kl: Tensor, std: Tensor, advantages: Tensor, policy: TrainablePolicy
    ) -> PolicyLoss:
        if self.kl_limit is not None:
            advantages = clip_advantages(advantages, self.adv_clip_max, log_ratio)
            return divergence_masked(log_ratio, kl, advantages, self.kl_limit)
        return self.surrogate(normalised_log_ratio(log_ratio, kl, std), torch.zeros_like(log_ratio), advantages, policy)

    def prepare(
        self,
        policy: TrainablePolicy,
        samples: Samples,
        batches: list[tuple[Tensor, Tensor]],
        micro_batches: MicroBatch,
        on_step: Progress,
    ) -> Records:
        """With `old_log_prob: replay`, replaces the old log-probabilities by those of a replay.

        Records the ratios of the new ones to those of the rollout.
        """
        if self.old_log_prob == "rollout":
            return {}
        ratios = replay_log_prob(
            policy,
            samples.table,
            samples.trajectory,
            batches,
            samples.conditioning,
            samples.guidance_scale,
            micro_batches,
            self.logprob_reduction,
            on_step=lambda pairs: on_step(0),
        )
        return {"rollout_ratio": ratios}

    def after_first_step(self, records: Records) -> Records:
        """Records the ratios before any weight has moved, unless the replay has set them to 1."""
        return {"rollout_ratio": list(records["ratio"])} if self.old_log_prob == "rollout" else {}

    def evaluations(self, images: int, trained: int, distinct: int, pairs: int) -> dict[str, int]:
        parts = super().evaluations(images, trained, distinct, pairs)
        return parts if self.old_log_prob == "rollout" else {**parts, "old log-probabilities": distinct}


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float, adv_clip_max: float
) -> PolicyLoss:
    """`mean max(-A r, -A clip(r, 1 - c, 1 + c))`, `r = exp(log_prob - old_log_prob)`, `|A| <= adv_clip_max`.

    The clipped surrogate of PPO (arXiv 1707.06347) as DDPO uses it (arXiv 2305.13301); a term per
    (sample, step) pair.

    Args:
        log_prob: log-probabilities `[n]` of the stored samples under the current weights, with
            gradient.
        old_log_prob: log-probabilities `[n]` of the same samples under the weights that drew them.
        advantages: advantages `[n]`.
        clip_range: `c`, in units of the ratio.
        adv_clip_max: largest magnitude of an advantage; larger ones are clipped.

    Raises:
        EtudeError: the shapes differ.
    """
    check_shapes(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    advantage = clip_advantages(advantages, adv_clip_max, log_prob)
    log_ratio = log_prob - old_log_prob.detach()
    ratio = log_ratio.exp()
    terms = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    return PolicyLoss(terms.mean(), *diagnostics(log_ratio, clip_range))

"""PPO's clipped surrogate (arXiv 1707.06347), as DDPO uses it on denoising steps (arXiv 2305.13301)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from etude.batching import MicroBatch, Progress
from etude.config import ObjectiveConfig
from etude.errors import EtudeError
from etude.learning.metrics import Metric, Records, joined
from etude.learning.objectives.objective import Loss, Samples
from etude.learning.objectives.policy_gradient import RATIOS, REFERENCE_KL, PolicyGradient, clip_advantages, policy_loss
from etude.learning.objectives.trust import divergence_masked, normalised_log_ratio
from etude.policies import TrainablePolicy
from etude.sampling.replay import replay_log_prob

ROLLOUT_RATIO_DEVIATION = Metric(
    "rollout_ratio_deviation",
    "mean deviation of a ratio before the first update",
    "The mean distance of a ratio from 1 before the first update, from precision and batch shape alone; with "
    "`objective.old_log_prob: replay`, what that setting takes away.",
    "near the clip range: `old_log_prob: replay`, or more digits in the rollout",
    compute=lambda records: (joined(records["rollout_ratio"]) - 1).abs().mean(),
    needs=("rollout_ratio",),
    from_zero=True,
)
ROLLOUT_RATIO_MAX_DEVIATION = Metric(
    "rollout_ratio_max_deviation",
    "largest deviation of a ratio before the first update",
    "The largest distance of a ratio from 1 before the first update, from precision and batch shape alone.",
    compute=lambda records: (joined(records["rollout_ratio"]) - 1).abs().max(),
    needs=("rollout_ratio",),
    merge="max",
    from_zero=True,
)


class PPO(PolicyGradient):
    """`mean max(-A r, -A clip(r, 1 - c, 1 + c))` with the importance ratio `r`: see `ppo_loss`.

    Give exactly one of clip_range, c in units of the ratio, and clip_nats, in nats of the whole
    image's log-probability: c = clip_nats / D under the mean over D dimensions. The ratios compare
    with the log-probabilities of the "rollout" or of a "replay". The "normalised" ratio is that of
    GRPO-Guard, to which the clip range then belongs. With kl_limit, the largest KL of a step to the
    weights that drew it, reduced like the log-probability, Flow-DPPO's trust region replaces the
    clip.
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
                f"objective: give exactly one of clip_range and clip_nats, and set the other to null, not {clip_range} and {clip_nats}."
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
        names = {"clip_range", "clip_nats", "old_log_prob", "logprob_reduction", "adv_clip_max", "kl_coef"}
        common = config.model_dump(include=names)
        return cls.with_options(config.options, **common)

    @property
    def keeps_means(self) -> bool:
        return self.ratio == "normalised" or self.kl_limit is not None

    def clip_range(self, policy: TrainablePolicy) -> float:
        """c, the clip range of the ratio. In nats it depends on the policy's latent dimensions."""
        if self.range is not None:
            return self.range
        assert self.nats is not None
        return self.nats / self.averaged_dimensions(policy)

    def surrogate(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, policy: TrainablePolicy) -> Loss:
        return ppo_loss(log_prob, old_log_prob, advantages, self.clip_range(policy), self.adv_clip_max)

    def surrogate_of(
        self, log_ratio: Tensor, kl: Tensor, std: Tensor, advantages: Tensor, policy: TrainablePolicy
    ) -> Loss:
        if self.kl_limit is not None:
            advantages = clip_advantages(advantages, self.adv_clip_max, log_prob=log_ratio)
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
        """Replaces the rollout's log-probabilities under `old_log_prob: replay`, and records the ratios to them."""
        if self.old_log_prob == "rollout":
            return {}
        table, trajectory, reduction = samples.table, samples.trajectory, self.logprob_reduction
        conditioning, scale = samples.conditioning, samples.guidance_scale
        log_ratios = replay_log_prob(
            policy, table, trajectory, batches, conditioning, scale, micro_batches, reduction, lambda pairs: on_step(0)
        )
        nats = [self.in_nats(log_ratio, policy) for log_ratio in log_ratios]
        return {"rollout_ratio": [log_ratio.exp() for log_ratio in log_ratios], "rollout_log_ratio": nats}

    def after_first_step(self, records: Records) -> Records:
        """Records the ratios before any weight has moved, unless the replay has set them to 1."""
        if self.old_log_prob == "replay":
            return {}
        return {"rollout_ratio": list(records["ratio"]), **super().after_first_step(records)}

    def evaluations(self, images: int, trained: int, distinct: int, pairs: int) -> dict[str, int]:
        parts = super().evaluations(images, trained, distinct, pairs)
        return parts if self.old_log_prob == "rollout" else {**parts, "old log-probabilities": distinct}


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float, adv_clip_max: float
) -> Loss:
    """`mean max(-A r, -A clip(r, 1 - c, 1 + c))`, `r = exp(log_prob - old_log_prob)`, `|A| <= adv_clip_max`.

    The clipped surrogate of PPO (arXiv 1707.06347) as DDPO uses it (arXiv 2305.13301); a term per
    (sample, step) pair. The log-probabilities `[n]` are those of the stored samples under the
    current weights, with gradient, and under the weights that drew them.
    """
    advantage = clip_advantages(advantages, adv_clip_max, log_prob=log_prob, old_log_prob=old_log_prob)
    log_ratio = log_prob - old_log_prob.detach()
    ratio = log_ratio.exp()
    terms = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    return policy_loss(terms, log_ratio, clip_range)

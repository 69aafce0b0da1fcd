"""REINFORCE: the score-function estimator of DDPO (arXiv 2305.13301)."""

from __future__ import annotations

import torch
from torch import Tensor

from etude.config import ObjectiveConfig
from etude.errors import EtudeError
from etude.learning.objectives.objective import Loss
from etude.learning.objectives.policy_gradient import PolicyGradient, clip_advantages, policy_loss
from etude.policies import TrainablePolicy


class Reinforce(PolicyGradient):
    """`mean -A log_prob`, valid for one optimiser step on fresh samples: see `reinforce_loss`."""

    label = "REINFORCE"

    @classmethod
    def from_config(cls, config: ObjectiveConfig) -> Reinforce:
        if (config.num_inner_epochs, config.updates_per_epoch) != (1, 1):
            raise EtudeError(
                "objective.kind = reinforce is on-policy: num_inner_epochs and updates_per_epoch must be 1, not "
                f"{config.num_inner_epochs} and {config.updates_per_epoch}."
            )
        if config.old_log_prob == "replay":
            raise EtudeError("objective.kind = reinforce has no ratio: old_log_prob = replay is for ppo; leave it out.")
        return cls(config.logprob_reduction, config.adv_clip_max, config.kl_coef)

    def surrogate(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, policy: TrainablePolicy) -> Loss:
        return reinforce_loss(log_prob, advantages, self.adv_clip_max)


def reinforce_loss(log_prob: Tensor, advantages: Tensor, adv_clip_max: float) -> Loss:
    """`mean -A log_prob`: the score-function estimator of DDPO (arXiv 2305.13301).

    It is valid for one optimiser step on fresh samples: the policy is still the one that drew them,
    so every `ratio` is 1. `log_prob` and `advantages` are `[n]`.
    """
    terms = -clip_advantages(advantages, adv_clip_max, log_prob=log_prob) * log_prob
    return policy_loss(terms, torch.zeros_like(log_prob), 0.0)

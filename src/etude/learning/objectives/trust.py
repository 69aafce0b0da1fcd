"""Two replacements of the clipped importance ratio, from the exact Gaussians of a step.

A step under the weights that drew it is N(m_old, std^2 I), under the present ones N(m, std^2 I). With
`delta = m - m_old`, the state `x = m_old + std z` and averages over the latent dimensions (sums,
under `logprob_reduction: sum`),

    log p - log p_old = mean(delta z) / std - kl,        kl = mean delta^2 / (2 std^2)

so that the ratio is biased downwards by kl, and varies with the step's std.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etude.learning.objectives.objective import Loss
from etude.learning.objectives.policy_gradient import policy_loss


def normalised_log_ratio(log_ratio: Tensor, kl: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's ratio (arXiv 2510.22319), as its logarithm: `(log p - log p_old + kl) std = mean(delta z)`.

    Its mean is exactly 0 under the weights that drew the state, and one clip range suits all steps
    and kernels. The paper also divides each step's loss by its length of time, which is not done
    here. All arguments are `[m]`, the KL reduced like the log-probability.
    """
    return (log_ratio + kl) * std


def divergence_masked(log_ratio: Tensor, kl: Tensor, advantages: Tensor, limit: float) -> Loss:
    """Flow-DPPO's trust region (arXiv 2606.11025): `mean -A r`, r the ratio, without some pairs.

    A pair is left out while `kl > limit` and its gradient leads further away: A > 0 and r > 1, or
    A < 0 and r < 1. Pairs that lead back stay. All tensors are `[m]`, the advantages clipped.
    """
    outside = (kl.detach() > limit) & (advantages * log_ratio.detach() > 0)
    terms = torch.where(outside, 0.0, -advantages * log_ratio.exp())
    loss = policy_loss(terms, log_ratio, limit)
    return Loss(loss.value, {**loss.records, "clipped": outside})

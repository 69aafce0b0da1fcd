"""Policy losses and the KL to the reference, as pure functions of the log-probabilities of (sample, step) pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from etude.errors import EtudeError


@dataclass(frozen=True)
class PolicyLoss:
    """A loss to differentiate, and what to log about it (detached).

    Attributes:
        loss: scalar, mean over the `n` pairs.
        ratio: `[n]`, `exp(log_prob - old_log_prob)`.
        clipped: bool `[n]`, `|ratio - 1| > clip_range`; the mean is `clipfrac`.
        approx_kl: scalar, mean of `0.5 (log_prob - old_log_prob)^2`.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    approx_kl: Tensor


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float, adv_clip_max: float
) -> PolicyLoss:
    """`mean max(-A r, -A clip(r, 1 - c, 1 + c))`, `r = exp(log_prob - old_log_prob)`, `A` clipped to `+- adv_clip_max`.

    The clipped surrogate of PPO (arXiv 1707.06347) as DDPO uses it (arXiv 2305.13301); a term per (sample, step) pair.

    Args:
        log_prob: `[n]`, of the stored samples under the current weights; carries the gradient.
        old_log_prob: `[n]`, of the same samples under the weights that drew them.
        advantages: `[n]`.
        clip_range: `c`, in units of the ratio.
        adv_clip_max: largest advantage counted.

    Raises:
        EtudeError: the shapes differ.
    """
    _same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    advantage = _clip(advantages, adv_clip_max, log_prob)
    difference = log_prob - old_log_prob.detach()
    ratio = difference.exp()
    terms = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    return PolicyLoss(terms.mean(), *_diagnostics(difference, clip_range))


def reinforce_loss(log_prob: Tensor, advantages: Tensor, adv_clip_max: float) -> PolicyLoss:
    """`mean -A log_prob`: the score-function estimator of DDPO (arXiv 2305.13301), valid for one step on fresh samples.

    `log_prob` and `advantages` are `[n]`. The policy is the one that drew the samples: every `ratio` is 1.

    Raises:
        EtudeError: the shapes differ.
    """
    _same_shape(log_prob=log_prob, advantages=advantages)
    terms = -_clip(advantages, adv_clip_max, log_prob) * log_prob
    return PolicyLoss(terms.mean(), *_diagnostics(torch.zeros_like(log_prob), 0.0))


def gaussian_kl(
    mean: Tensor, reference_mean: Tensor, std: Tensor, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """`KL(N(mean, std^2) || N(reference_mean, std^2)) = ||mean - reference_mean||^2 / (2 std^2)`, one per sample.

    Args:
        mean: `[n, ...]`.
        reference_mean: the same shape.
        std: positive, the same for both; a scalar, `[n]` or anything that broadcasts like `[n, 1, 1, 1]`.
        reduction: over the D latent dimensions, as for the log-probability: `sum` is in nats, `mean` divides by D.

    Returns:
        `[n]`.

    Raises:
        EtudeError: the shapes differ, or a std is not positive (a deterministic step has no KL). On a GPU the stds are not
            looked at, since that would wait for the device: there a std of 0 gives infinity or NaN.
    """
    _same_shape(mean=mean, reference_mean=reference_mean)
    if std.device.type == "cpu" and not bool((std > 0).all()):
        raise EtudeError("std is 0 or negative, and a deterministic step has no KL: pass only the stochastic steps.")
    if std.ndim == 1:
        std = std.reshape(-1, *[1] * (mean.ndim - 1))
    nats = ((mean - reference_mean) / std).square() / 2
    flat = nats.flatten(1)
    return flat.mean(dim=1) if reduction == "mean" else flat.sum(dim=1)


@dataclass
class UpdateStatistics:
    """What the optimiser steps of one iteration saw. Everything stays on the device until the iteration's row is made.

    Attributes:
        loss: one scalar per optimiser step.
        policy: the policy loss of each micro-batch.
        reference_kl: `[m]` per micro-batch, where there is a KL.
        rollout_ratio: `[m]` per micro-batch, before the first optimiser step: what the rollout's precision and batches make of the ratio.
        grad_norm: one scalar per optimiser step, before clipping.
    """

    loss: list[Tensor] = field(default_factory=list)
    policy: list[PolicyLoss] = field(default_factory=list)
    reference_kl: list[Tensor] = field(default_factory=list)
    rollout_ratio: list[Tensor] = field(default_factory=list)
    grad_norm: list[Tensor] = field(default_factory=list)

    def extend(self, more: UpdateStatistics) -> None:
        """Adds what another part of the iteration saw."""
        self.loss += more.loss
        self.policy += more.policy
        self.reference_kl += more.reference_kl
        self.grad_norm += more.grad_norm

    def row(self) -> dict[str, float]:
        """The means over the iteration, as logged; the device is read once."""
        ratio = torch.cat([part.ratio for part in self.policy])
        pairs = torch.tensor([len(part.ratio) for part in self.policy], device=ratio.device)
        approx_kl = torch.stack([part.approx_kl for part in self.policy])
        values = {
            "loss": torch.stack(self.loss).mean(),
            "ratio_mean": ratio.mean(),
            "ratio_max_deviation": (ratio - 1).abs().max(),
            "clipfrac": torch.cat([part.clipped for part in self.policy]).float().mean(),
            "approx_kl": (approx_kl * pairs).sum() / pairs.sum(),
            "grad_norm": torch.stack(self.grad_norm).mean(),
        }
        if self.rollout_ratio:
            deviation = (torch.cat(self.rollout_ratio) - 1).abs()
            values |= {"rollout_ratio_deviation": deviation.mean(), "rollout_ratio_max_deviation": deviation.max()}
        if self.reference_kl:
            values["reference_kl"] = torch.cat(self.reference_kl).mean()
        return dict(zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True))


def _clip(advantages: Tensor, limit: float, like: Tensor) -> Tensor:
    return advantages.detach().to(like).clamp(-limit, limit)


@torch.no_grad()
def _diagnostics(difference: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    difference = difference.detach()
    ratio = difference.exp()
    return ratio, (ratio - 1).abs() > clip_range, difference.square().mean() / 2


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise EtudeError(f"the objective needs tensors of one shape, aligned by (sample, step) pair, not {listed}.")

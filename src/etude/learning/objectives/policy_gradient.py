"""Policy gradients: the common part of objectives on log-probabilities of stored steps."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.learning.metrics import Metric, Records, joined, mean
from etude.learning.objectives.objective import Loss, Objective, Samples
from etude.policies import TrainablePolicy
from etude.sampling.replay import replay


@dataclass(frozen=True)
class PolicyLoss:
    """A loss to differentiate, with detached numbers to log.

    Attributes:
        loss: scalar, mean over the `n` pairs.
        ratio: importance ratio `[n]`, `exp(log_prob - old_log_prob)`.
        clipped: whether `|ratio - 1| > clip_range`, bool `[n]`; the mean is `clipfrac`.
        approx_kl: scalar, mean of `0.5 (log_prob - old_log_prob)^2`.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    approx_kl: Tensor


class PolicyGradient(Objective):
    """A surrogate of the log-probabilities, and the closed-form KL to the model before training.

        loss = surrogate(log p, log p_old, A) + kl_coef mean KL(N(mean, std^2) || N(reference mean,
        std^2))

    Args:
        logprob_reduction: "mean" over latent dimensions, or "sum", the true density.
        adv_clip_max: largest magnitude of an advantage; larger ones are clipped.
        kl_coef: weight of the KL, which is reduced like the log-probability.
    """

    def __init__(
        self, logprob_reduction: Literal["mean", "sum"] = "mean", adv_clip_max: float = 5.0, kl_coef: float = 0.0
    ) -> None:
        self.logprob_reduction, self.adv_clip_max, self.kl_coef = logprob_reduction, adv_clip_max, kl_coef

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def averaged_dimensions(self, policy: TrainablePolicy) -> int:
        return policy.dimensions if self.logprob_reduction == "mean" else 1

    @abstractmethod
    def surrogate(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, policy: TrainablePolicy
    ) -> PolicyLoss:
        """The policy loss of `m` pairs, from their present log-probabilities `[m]` and the old ones."""

    def surrogate_of(
        self, log_ratio: Tensor, kl: Tensor, std: Tensor, advantages: Tensor, policy: TrainablePolicy
    ) -> PolicyLoss:
        """The policy loss where the rollout keeps means: also from the KL `[m]` to the old step and its std `[m]`.

        Default: `surrogate`.
        """
        return self.surrogate(log_ratio, torch.zeros_like(log_ratio), advantages, policy)

    def loss(self, policy: TrainablePolicy, samples: Samples, rows: Tensor, columns: Tensor) -> Loss:
        trajectory, reduction = samples.trajectory, self.logprob_reduction
        transition, target = replay(
            policy, samples.table, trajectory, rows, columns, samples.conditioning, samples.guidance_scale
        )
        log_prob, old = transition.log_prob(target, reduction), trajectory.log_prob[rows, columns]
        advantages = samples.advantages[rows]
        if trajectory.mean is None:
            result = self.surrogate(log_prob, old, advantages, policy)
        else:
            drift = gaussian_kl(transition.mean, trajectory.mean[rows, columns], transition.std, reduction)
            result = self.surrogate_of(log_prob - old, drift, transition.std.flatten(), advantages, policy)
        records = {"ratio": result.ratio, "clipped": result.clipped, "approx_kl": result.approx_kl}
        if trajectory.reference_mean is None:
            return Loss(result.loss, records)
        kl = gaussian_kl(transition.mean, trajectory.reference_mean[rows, columns], transition.std, reduction)
        return Loss(result.loss + self.kl_coef * kl.mean(), {**records, "reference_kl": kl.detach()})

    def evaluations(self, images: int, trained: int, distinct: int, pairs: int) -> dict[str, int]:
        return {"reference": images * trained if self.needs_reference else 0, "replay": pairs}


def gaussian_kl(
    mean: Tensor, reference_mean: Tensor, std: Tensor, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """`KL(N(mean, std^2) || N(reference_mean, std^2)) = ||mean - reference_mean||^2 / (2 std^2)`, one per sample.

    Args:
        mean: means `[n, ...]`.
        reference_mean: means of the reference model, of the same shape.
        std: std of both, positive: a scalar, `[n]`, or a shape that broadcasts like `[n, 1, 1, 1]`.
        reduction: reduction over the D latent dimensions, as for the log-probability. `sum` is in
            nats, `mean` divides by D.

    Returns:
        KL `[n]`.

    Raises:
        EtudeError: the shapes differ, or a std is not positive (a deterministic step has no KL). On
            a GPU the std is not checked, since that would wait for the device; there a std of 0
            gives infinity or NaN.
    """
    check_shapes(mean=mean, reference_mean=reference_mean)
    if std.device.type == "cpu" and not bool((std > 0).all()):
        raise EtudeError("std is 0 or negative, and a deterministic step has no KL: pass only the stochastic steps.")
    if std.ndim == 1:
        std = std.reshape(-1, *[1] * (mean.ndim - 1))
    nats = ((mean - reference_mean) / std).square() / 2
    flat = nats.flatten(1)
    return flat.mean(dim=1) if reduction == "mean" else flat.sum(dim=1)


def clip_advantages(advantages: Tensor, limit: float, like: Tensor) -> Tensor:
    """The advantages without gradient, in the dtype of `like`, clipped to +- limit."""
    return advantages.detach().to(like).clamp(-limit, limit)


@torch.no_grad()
def diagnostics(log_ratio: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ratio `[n]`, whether it is clipped `[n]`, and approximate KL, from the log of the ratio `[n]`."""
    log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    return ratio, (ratio - 1).abs() > clip_range, log_ratio.square().mean() / 2


def check_shapes(**tensors: Tensor) -> None:
    """Raises EtudeError unless all tensors have one shape."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise EtudeError(f"the objective needs tensors of one shape, aligned by (sample, step) pair, not {listed}.")


def _approx_kl(records: Records) -> Tensor:
    """The mean over all pairs, from the means of the micro-batches."""
    pairs = torch.tensor([len(part) for part in records["ratio"]], device=records["ratio"][0].device)
    return (joined(records["approx_kl"]) * pairs).sum() / pairs.sum()


RATIO_MEAN = Metric(
    "ratio_mean",
    "mean importance ratio",
    "The mean importance ratio p / p_old; it should stay near 1.",
    compute=mean("ratio"),
    needs=("ratio",),
)
RATIO_MAX_DEVIATION = Metric(
    "ratio_max_deviation",
    "largest deviation of a ratio from 1",
    "The largest distance of a ratio from 1, over all (sample, step) pairs of an iteration.",
    "far above the clip range: fewer updates per rollout, or a lower learning rate",
    compute=lambda records: (joined(records["ratio"]) - 1).abs().max(),
    needs=("ratio",),
    merge="max",
    from_zero=True,
)
CLIPFRAC = Metric(
    "clipfrac",
    "clipped fraction",
    "The share of (sample, step) pairs whose ratio left the clip range.",
    "near 0: the clip range does nothing; above a half: most of the update is thrown away",
    compute=mean("clipped"),
    needs=("clipped",),
    from_zero=True,
)
APPROX_KL = Metric(
    "approx_kl",
    "approximate KL to the rollout policy",
    "The mean of 0.5 (log p - log p_old)^2: how far the updates of one iteration move the policy; it should stay small.",
    "lower the learning rate if it grows from iteration to iteration",
    compute=_approx_kl,
    needs=("approx_kl", "ratio"),
    limit=1e3,  # nats: no step of a policy that still resembles the last one has such a KL
)
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
REFERENCE_KL = Metric(
    "reference_kl",
    "KL to the reference model",
    "With `objective.kl_coef`: the KL to the model before training, closed form, per step.",
    compute=mean("reference_kl"),
    needs=("reference_kl",),
)
RATIOS = (RATIO_MEAN, RATIO_MAX_DEVIATION, CLIPFRAC, APPROX_KL)

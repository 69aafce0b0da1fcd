"""Policy gradients: the common part of objectives on log-probabilities of stored steps."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.learning.metrics import Metric, Records, joined, mean
from etude.learning.objectives.objective import Loss, Objective, Samples
from etude.policies import TrainablePolicy
from etude.sampling.replay import replay


def _approx_kl(records: Records) -> Tensor:
    """The mean over all pairs, from the means of the micro-batches."""
    pairs = torch.tensor([len(part) for part in records["ratio"]], device=records["ratio"][0].device)
    return (joined(records["approx_kl"]) * pairs).sum() / pairs.sum()


RATIO_MEAN = Metric(
    "ratio_mean",
    "mean importance ratio",
    "The mean importance ratio p / p_old; it should stay near 1.",
    compute=mean("ratio"),
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
REFERENCE_KL = Metric(
    "reference_kl",
    "KL to the reference model",
    "With `objective.kl_coef`: the KL to the model before training, closed form, per step.",
    compute=mean("reference_kl"),
)
ROLLOUT_MISMATCH = Metric(
    "rollout_mismatch",
    "disagreement of rollout and replay",
    "The mean distance of a step's log-probability in the rollout from that in the replay before the first update, in "
    "nats of the whole image: precision and batch shape alone.",
    "near `objective.clip_nats`: more digits in the rollout; `objective.mismatch_limit` stops a run above a limit",
    compute=lambda records: joined(records["rollout_log_ratio"]).abs().mean(),
    needs=("rollout_log_ratio",),
    from_zero=True,
)
ROLLOUT_MISMATCH_MAX = Metric(
    "rollout_mismatch_max",
    "largest disagreement of rollout and replay",
    "The largest distance of a step's log-probability in the rollout from that in the replay before the first update, "
    "in nats of the whole image.",
    compute=lambda records: joined(records["rollout_log_ratio"]).abs().max(),
    needs=("rollout_log_ratio",),
    merge="max",
    from_zero=True,
)
RATIOS = (RATIO_MEAN, RATIO_MAX_DEVIATION, CLIPFRAC, APPROX_KL, ROLLOUT_MISMATCH, ROLLOUT_MISMATCH_MAX)


class PolicyGradient(Objective):
    """A surrogate of the log-probabilities, and the closed-form KL to the model before training.

        loss = surrogate(log p, log p_old, A) + kl_coef mean KL(N(mean, std^2) || N(reference mean, std^2))

    The reduction is "mean" over latent dimensions, or "sum", the true density; the KL is reduced
    like the log-probability. Advantages are clipped to +- adv_clip_max.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (*RATIOS, REFERENCE_KL)

    def __init__(
        self, logprob_reduction: Literal["mean", "sum"] = "mean", adv_clip_max: float = 5.0, kl_coef: float = 0.0
    ) -> None:
        self.logprob_reduction, self.adv_clip_max, self.kl_coef = logprob_reduction, adv_clip_max, kl_coef

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def at_ratio_one(self, samples: Samples, policy: TrainablePolicy) -> tuple[Loss, Tensor] | None:
        old = samples.trajectory.log_prob
        if self.needs_reference or self.keeps_means:
            return None
        log_prob = old.clone().requires_grad_()
        with torch.enable_grad():
            advantages = samples.advantages[:, None].expand_as(old).flatten()
            result = self.surrogate(log_prob.flatten(), old.flatten(), advantages, policy)
            (slope,) = torch.autograd.grad(result.value, log_prob)
        return Loss(result.value.detach(), {**result.records, "log_ratio": torch.zeros_like(advantages)}), slope

    def averaged_dimensions(self, policy: TrainablePolicy) -> int:
        return policy.dimensions if self.logprob_reduction == "mean" else 1

    @abstractmethod
    def surrogate(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, policy: TrainablePolicy) -> Loss:
        """The loss of `m` pairs (`policy_loss`), from their present log-probabilities `[m]` and the old ones."""

    def surrogate_of(
        self, log_ratio: Tensor, kl: Tensor, std: Tensor, advantages: Tensor, policy: TrainablePolicy
    ) -> Loss:
        """The loss where the rollout keeps means, also from the KL to the old step and its std, `[m]` each.

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
            moved = gaussian_kl(transition.mean, trajectory.mean[rows, columns], transition.std, reduction)
            result = self.surrogate_of(log_prob - old, moved, transition.std.flatten(), advantages, policy)
        records = {**result.records, "log_ratio": self.in_nats((log_prob - old).detach(), policy)}
        if trajectory.reference_mean is None:
            return Loss(result.value, records)
        kl = gaussian_kl(transition.mean, trajectory.reference_mean[rows, columns], transition.std, reduction)
        return Loss(result.value + self.kl_coef * kl.mean(), {**records, "reference_kl": kl.detach()})

    def in_nats(self, log_ratio: Tensor, policy: TrainablePolicy) -> Tensor:
        """A log ratio in nats of the whole image, from one that is reduced like the log-probability."""
        return log_ratio * policy.dimensions if self.logprob_reduction == "mean" else log_ratio

    def after_first_step(self, records: Records) -> Records:
        """Records the log ratios before any weight has moved."""
        return {"rollout_log_ratio": list(records.get("log_ratio", []))}

    def evaluations(self, images: int, trained: int, distinct: int, pairs: int) -> dict[str, int]:
        return {"reference": images * trained if self.needs_reference else 0, "replay": pairs}


def gaussian_kl(
    mean: Tensor, reference_mean: Tensor, std: Tensor, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """`KL(N(mean, std^2) || N(reference_mean, std^2)) = ||mean - reference_mean||^2 / (2 std^2)`, one per sample.

    Means `[n, ...]` and a std that is a scalar, `[n]`, or broadcasts like `[n, 1, 1, 1]` give
    `[n]`. The "sum" over the D latent dimensions is in nats, the "mean" divides by D. Raises
    EtudeError if the shapes differ, or a std is not positive: a deterministic step has no KL. A
    GPU, which the check would wait for, gives infinity or NaN instead.
    """
    check_shapes(mean=mean, reference_mean=reference_mean)
    if std.device.type == "cpu" and not bool((std > 0).all()):
        raise EtudeError("std is 0 or negative, and a deterministic step has no KL: pass only the stochastic steps.")
    if std.ndim == 1:
        std = std.reshape(-1, *[1] * (mean.ndim - 1))
    nats = ((mean - reference_mean) / std).square() / 2
    flat = nats.flatten(1)
    return flat.mean(dim=1) if reduction == "mean" else flat.sum(dim=1)


def clip_advantages(advantages: Tensor, limit: float, **log_probs: Tensor) -> Tensor:
    """The advantages clipped to +- limit, without gradient, in the dtype of their pairs' log-probabilities."""
    check_shapes(**log_probs, advantages=advantages)
    return advantages.detach().to(log_probs["log_prob"]).clamp(-limit, limit)


def policy_loss(terms: Tensor, log_ratio: Tensor, clip_range: float) -> Loss:
    """The mean of the pairs' terms `[n]`, with records from the log of the importance ratio `[n]`.

    A ratio is clipped if |ratio - 1| > clip_range; approx_kl is the mean of 0.5 (log_ratio)^2.
    """
    log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    clipped, approx_kl = (ratio - 1).abs() > clip_range, log_ratio.square().mean() / 2
    return Loss(terms.mean(), {"ratio": ratio, "clipped": clipped, "approx_kl": approx_kl})


def check_shapes(**tensors: Tensor) -> None:
    """Raises EtudeError unless all tensors have one shape."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise EtudeError(f"the objective needs tensors of one shape, aligned by (sample, step) pair, not {listed}.")

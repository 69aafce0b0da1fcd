"""ELBO-PG: policy gradients with the evidence lower bound of a final image as its log-likelihood (arXiv 2602.04663)."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.learning.metrics import Metric, mean
from etude.learning.objectives.matching import DISTANCES, Matching, Noised, level_weight, squared
from etude.learning.objectives.nft import SMALLEST_ERROR, Weighting


class ELBOPG(Matching):
    """The policy gradients EPG and PEPG on the evidence bound (arXiv 2602.04663): see `elbo_pg_loss`.

        loss = elbo_pg_loss(scale A) + kl_coef mean |v - v_ref|^2

    `proximal` is PEPG, which the authors recommend, otherwise EPG; without `ratio` the importance
    ratio counts as 1. The weighting is the quantity whose squared error is the bound. "self", as
    published, divides the squared error in x0 by its own mean absolute error, without gradient.

    The published advantage is 0.1 times the reward minus the mean of its group, without a division by
    the standard deviation; `scale` multiplies the advantages of the run in the same way.
    """

    label = "a policy gradient of the evidence bound of final images"
    title = "ELBO-PG"
    metrics = (
        *DISTANCES,
        Metric(
            "elbo_ratio",
            "mean ratio of evidence",
            "The mean importance ratio exp(ELBO - ELBO of the old policy); it should stay near 1.",
            compute=mean("elbo_ratio"),
        ),
    )

    def __init__(
        self,
        proximal: bool = True,
        ratio: bool = True,
        scale: float = 0.1,
        weighting: Weighting = "self",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        for name, value in (("proximal", proximal), ("ratio", ratio)):
            if not isinstance(value, bool):
                raise EtudeError(f"objective.options: {name} = {value} must be true or false.")
        if not scale > 0:
            raise EtudeError(f"objective.options: scale = {scale} must be above 0.")
        if weighting not in get_args(Weighting):
            raise EtudeError(
                f"objective.options: weighting = {weighting} must be one of {', '.join(get_args(Weighting))}."
            )
        self.proximal, self.ratio, self.scale, self.weighting = proximal, ratio, scale, weighting

    def bound(self, error: Tensor, noised: Noised) -> Tensor:
        """The evidence bound of each pair, `[m]`: minus its weighted squared error."""
        if self.weighting == "self":
            weight = 1 / error.detach().abs().flatten(1).mean(1).clamp(min=SMALLEST_ERROR)
        else:
            weight = level_weight(self.weighting, noised.a, noised.s)
        return -squared(error, weight)

    def pair_loss(self, error: Tensor, old: Tensor, advantages: Tensor, noised: Noised) -> Tensor:
        bound, before = self.bound(error, noised), self.bound(old, noised)
        return elbo_pg_loss(bound, before, self.scale * advantages, self.proximal, self.ratio)

    def records(self, error: Tensor, old: Tensor, noised: Noised) -> dict[str, Tensor]:
        return {"elbo_ratio": (self.bound(error, noised) - self.bound(old, noised)).exp()}


def elbo_pg_loss(bound: Tensor, old: Tensor, advantages: Tensor, proximal: bool = True, ratio: bool = True) -> Tensor:
    """The loss of each pair, `[m]`, from its evidence bound L and that of the old policy:

        EPG      -rho A L                              rho = exp(L - L_old)
        PEPG     -rho (A - log rho) L

    with the factors before L without gradient, and rho = 1 in the place of the first factor without
    `ratio`. EPG's gradient is that of AWM's ratio without a clip. PEPG's is that of
    `rho (A - log rho)^2 / 2`, rho without gradient, and vanishes where the bound has risen by A.
    """
    log_ratio = (bound - old).detach()
    pull = advantages - log_ratio if proximal else advantages
    importance = log_ratio.exp() if ratio else torch.ones_like(log_ratio)
    return -importance * pull * bound

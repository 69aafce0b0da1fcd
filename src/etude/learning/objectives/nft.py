"""DiffusionNFT: a contrast of good and bad images on the forward process (arXiv 2509.16117)."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from etude.errors import EtudeError
from etude.learning.objectives.matching import DISTANCES, Matching, Noised, level_weight, squared

Weighting = Literal["self", "velocity", "epsilon", "x0"]
SMALLEST_ERROR = 1e-5


class NFT(Matching):
    """DiffusionNFT (arXiv 2509.16117): see `nft_loss`.

    The advantages become `r = 1/2 + A / (2 adv_clip_max)` in [0, 1]. The loss is multiplied by
    `adv_clip_max / beta`, so that its gradient at the old policy is that of advantage-weighted
    matching, and `kl_coef` means the same for every beta.

    beta is the distance between the implicit good and bad policies and the old one; the squared
    distance to the old policy weighs `beta^2`. The weighting "self", as published, divides each
    branch by its own mean absolute error in x0, without gradient; the others are plain squared
    errors of that quantity.
    """

    label = "DiffusionNFT's contrast on noised images"
    title = "DiffusionNFT"
    metrics = DISTANCES

    def __init__(self, beta: float = 1.0, weighting: Weighting = "self", **common: Any) -> None:
        super().__init__(**common)
        if not beta > 0:
            raise EtudeError(f"objective.options: beta = {beta} must be above 0.")
        if weighting not in get_args(Weighting):
            raise EtudeError(
                f"objective.options: weighting = {weighting} must be one of {', '.join(get_args(Weighting))}."
            )
        self.beta, self.weighting = beta, weighting

    def pair_loss(self, error: Tensor, old: Tensor, advantages: Tensor, noised: Noised) -> Tensor:
        share = 0.5 + 0.5 * advantages / self.adv_clip_max
        weight = None if self.weighting == "self" else level_weight(self.weighting, noised.a, noised.s)
        return nft_loss(error, old, share, self.beta, weight) * (self.adv_clip_max / self.beta)


def nft_loss(error: Tensor, old: Tensor, share: Tensor, beta: float, weight: Tensor | None) -> Tensor:
    """The contrast of each pair, `[m]`:

        r w(e+) |e+|^2 + (1 - r) w(e-) |e-|^2,        e+- = e_old +- beta (e - e_old)

    with means over the latent dimensions. With a plain weight w it equals, `d = e_old`,
    `delta = e - e_old`, `w (|d|^2 + 2 beta (2 r - 1) d delta + beta^2 |delta|^2)`: a pull along the
    advantage within a trust region around the old policy.

    The errors `x0_hat - x0` of the trained and of the old weights are `[m, ...]`; share, r in
    [0, 1], and weight, w by level, are `[m]`. Without a weight w is `1 / mean |e+-|` of each branch,
    without gradient.
    """
    delta = beta * (error - old)

    def branch(errors: Tensor) -> Tensor:
        own = weight
        if own is None:
            own = 1 / errors.detach().abs().flatten(1).mean(1).clamp(min=SMALLEST_ERROR)
        return squared(errors, own)

    return share * branch(old + delta) + (1 - share) * branch(old - delta)

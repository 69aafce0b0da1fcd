"""Advantage-weighted matching, AWM (arXiv 2509.25050): the matching error in the place of a log-probability."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.learning.metrics import Metric, mean
from etude.learning.objectives.matching import DISTANCES, Matching, Noised, level_weight, squared

Form = Literal["ratio", "plain"]
PlainWeighting = Literal["velocity", "epsilon", "x0"]


class AWM(Matching):
    """Advantage-weighted matching (arXiv 2509.25050): see `awm_loss`.

        loss = awm_loss + old_coef mean |v - v_old|^2 + kl_coef mean |v - v_ref|^2

    For a negative advantage the weighted error alone has no minimum: it needs the ratio's clip or
    the distance to the old policy.

    The form is the clipped "ratio", or "plain", the weighted error itself; the weighting is the
    quantity whose squared error is the matching error. The defaults of clip and old_coef are the
    published ones.
    """

    label = "advantage-weighted matching of noised images"
    title = "AWM"
    metrics = (
        *DISTANCES,
        Metric(
            "awm_clipfrac",
            "clipped fraction",
            "The share of pairs whose ratio of matching errors left the clip range.",
            compute=mean("awm_clipped"),
            from_zero=True,
        ),
    )

    def __init__(
        self,
        form: Form = "ratio",
        clip: float = 1.0,
        old_coef: float = 1.0,
        weighting: PlainWeighting = "velocity",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        for name, value, choices in (
            ("form", form, get_args(Form)),
            ("weighting", weighting, get_args(PlainWeighting)),
        ):
            if value not in choices:
                raise EtudeError(f"objective.options: {name} = {value} must be one of {', '.join(choices)}.")
        if not (clip > 0 and old_coef >= 0):
            raise EtudeError(f"objective.options: clip = {clip} must be above 0, and old_coef = {old_coef} at least 0.")
        self.form, self.clip, self.old_coef, self.weighting = form, clip, old_coef, weighting

    def pair_loss(self, error: Tensor, old: Tensor, advantages: Tensor, noised: Noised) -> Tensor:
        weight = level_weight(self.weighting, noised.a, noised.s)
        clip = self.clip if self.form == "ratio" else None
        loss = awm_loss(squared(error, weight), squared(old, weight), advantages, clip)
        return loss + self.old_coef * squared(error - old, noised.s**-2)

    def records(self, error: Tensor, old: Tensor, noised: Noised) -> dict[str, Tensor]:
        if self.form == "plain":
            return {}
        weight = level_weight(self.weighting, noised.a, noised.s)
        return {"awm_clipped": ((squared(old, weight) - squared(error, weight)).exp() - 1).abs() > self.clip}


def awm_loss(matching: Tensor, old: Tensor, advantages: Tensor, clip: float | None) -> Tensor:
    """The loss of each pair, `[m]`, from its matching error `l` and that of the old policy:

        max(-A rho, -A clip(rho, 1 - c, 1 + c)),        rho = exp(l_old - l)

    or plainly `A l` where the clip c is None. On the old policy both have the gradient `A grad l`.
    """
    if clip is None:
        return advantages * matching
    ratio = (old.detach() - matching).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))

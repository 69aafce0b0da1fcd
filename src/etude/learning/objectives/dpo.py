"""Diffusion-DPO: preferences between two images of a prompt (arXiv 2311.12908), on any path."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from etude.errors import EtudeError
from etude.learning.metrics import Metric, mean
from etude.learning.objectives.matching import Matching, level_weight, squared
from etude.learning.objectives.objective import Loss, Samples
from etude.policies import TrainablePolicy

DPOWeighting = Literal["network", "velocity", "epsilon", "x0"]


class DPO(Matching):
    """Diffusion-DPO (arXiv 2311.12908): see `dpo_loss`. A row is a group of images of one prompt.

    Online, the best image of a group by its advantage is preferred to the worst; a group of equal
    advantages teaches nothing. Offline, the pairs come from a file and no image is drawn. Both
    images of a pair get the same level and the same noise.

    The published beta, 5000 (2000 for SDXL), belongs to a mean over the latent dimensions. The
    weighting is the quantity whose squared error is the matching error; "network", as published, is
    the one that the network predicts (the velocity for flow). `pairs` is the file of
    `etude.prompts.preference_pairs`. At `old_rate` 0 the present policy draws.
    """

    label = "Diffusion-DPO's preference for the better image"
    title = "Diffusion-DPO"
    by_group: ClassVar[bool] = True
    asks_old: ClassVar[bool] = False
    metrics = (
        Metric(
            "dpo_accuracy",
            "implicit-reward accuracy",
            "The share of pairs in which the implicit reward of the preferred image is the higher one; a half before training.",
            compute=mean("dpo_accuracy"),
        ),
        Metric(
            "dpo_margin",
            "implicit-reward margin",
            "The mean implicit reward of the preferred image minus that of the other one.",
            compute=mean("dpo_margin"),
        ),
        Metric(
            "matching_growth",
            "growth of the matching errors",
            "The mean matching error of both images divided by that of the reference model, minus 1.",
            "above a tenth: the pictures of both sides are being lost; lower the learning rate, or raise beta",
            compute=mean("matching_growth"),
        ),
    )

    def __init__(
        self,
        beta: float = 5000.0,
        weighting: DPOWeighting = "network",
        pairs: str | None = None,
        old_rate: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(old_rate=old_rate, **common)
        if not beta > 0:
            raise EtudeError(f"objective.options: beta = {beta} must be above 0.")
        if weighting not in get_args(DPOWeighting):
            raise EtudeError(
                f"objective.options: weighting = {weighting} must be one of {', '.join(get_args(DPOWeighting))}."
            )
        if self.kl_coef:
            raise EtudeError(
                f"objective.kl_coef = {self.kl_coef}: dpo holds to the reference model by its beta; set kl_coef to 0."
            )
        self.beta, self.weighting, self.pairs = beta, weighting, pairs

    @property
    def needs_reference(self) -> bool:
        return True

    def loss(self, policy: TrainablePolicy, samples: Samples, rows: Tensor, columns: Tensor) -> Loss:
        size = samples.images_per_prompt
        advantages = samples.advantages.reshape(-1, size)[rows]
        first = rows * size
        better, worse = first + advantages.argmax(1), first + advantages.argmin(1)
        # Level and noise of a pair are those of the first image of its group.
        noised = self.noised(policy, samples, torch.cat([better, worse]), columns.repeat(2), torch.cat([first, first]))
        with torch.no_grad(), policy.reference():
            reference = noised.error(policy)
        of = noised.own if self.weighting == "network" else self.weighting
        weight = level_weight(of, noised.a, noised.s)
        good, bad = squared(noised.error(policy), weight).chunk(2)
        good_before, bad_before = squared(reference, weight).chunk(2)
        margin = -self.beta / 2 * ((good - good_before) - (bad - bad_before))
        informative = (advantages.amax(1) > advantages.amin(1)).to(margin)
        found, before = (good + bad).detach(), good_before + bad_before
        records = {
            "dpo_accuracy": torch.where(margin > 0, 1.0, torch.where(margin == 0, 0.5, 0.0)),
            "dpo_margin": margin.detach(),
            "matching_growth": found / before - 1,
        }
        return Loss((informative * dpo_loss(margin)).mean(), records)

    def pair_loss(self, *arguments: Any) -> Tensor:
        raise NotImplementedError("the loss of a pair needs both of its images")

    def evaluations(self, images: int, trained: int, distinct: int, pairs: int) -> dict[str, int]:
        return {"reference": 2 * pairs, "replay": 2 * pairs}


def dpo_loss(margin: Tensor) -> Tensor:
    """`-log sigmoid(margin)` of each pair, `[m]`, with the margin of the implicit rewards

        margin = -beta / 2 ((l - l_ref)(preferred) - (l - l_ref)(other))

    and `l` the matching error. If people prefer by `sigmoid(r(preferred) - r(other))`, the margin
    that minimises the mean loss is that difference of their rewards r.
    """
    return -logsigmoid(margin)

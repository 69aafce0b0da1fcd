"""Variances of clustered votes: the votes of one prompt, or of one rater, are not independent.

For scores u_i (`[n, k]`, the terms of an estimating equation) and one set of clusters,

    V = G / (G - 1) sum_g U_g U_g',   U_g = sum of the scores in cluster g

and for prompts and raters together V = V_prompt + V_rater - V_both, where "both" clusters by the
pair of them (Cameron, Gelbach and Miller 2011, doi 10.1198/jbes.2010.07136).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from etude.errors import EtudeError

Floats = NDArray[np.float64]
FEW_RATERS = 6
"""With fewer raters an interval speaks of these raters alone and is clustered by prompt only."""


@dataclass(frozen=True)
class Clusters:
    """The prompt and the rater of each vote, as numbers from 0.

    Attributes:
        prompt: `[n]`.
        rater: `[n]`.
        prompts: number of distinct prompts.
        raters: number of distinct raters.
    """

    prompt: NDArray[np.intp]
    rater: NDArray[np.intp]
    prompts: int
    raters: int

    @classmethod
    def of(cls, prompts: Sequence[Any] | NDArray[Any], raters: Sequence[Any] | NDArray[Any] | None = None) -> Clusters:
        """Number the clusters of n votes.

        Args:
            prompts: the prompt of each vote, as integers or strings.
            raters: the rater of each vote. Default: one rater.

        Raises:
            EtudeError: there is another number of raters than of prompts.
        """
        names, prompt = np.unique(np.asarray(prompts), return_inverse=True)
        people, rater = np.unique(
            np.zeros(len(prompt), int) if raters is None else np.asarray(raters), return_inverse=True
        )
        if len(rater) != len(prompt):
            raise EtudeError(f"votes need one rater each, not {len(rater)} raters for {len(prompt)} votes.")
        return cls(prompt, rater, len(names), len(people))

    @property
    def by_rater(self) -> bool:
        """Whether the raters are enough to speak of people like them."""
        return self.raters >= FEW_RATERS

    @property
    def degrees(self) -> int:
        """Degrees of freedom of Student's t: the smaller number of clusters, less 1."""
        if self.prompts < 2:
            return max(1, len(self.prompt) - 1)
        return min(self.prompts, self.raters if self.by_rater else self.prompts) - 1

    @property
    def words(self) -> str:
        """The basis of an interval: `64 prompts, clustered by prompt; speaks of these 2 raters`."""
        prompts = f"{self.prompts} prompt{'s' * (self.prompts != 1)}"
        if self.prompts < 2:
            return f"{prompts}, votes taken as independent"
        if self.by_rater:
            return f"{prompts} and {self.raters} raters, clustered by both"
        return f"{prompts}, clustered by prompt; speaks of {'this rater' if self.raters == 1 else f'these {self.raters} raters'}"

    def take(self, rows: NDArray[Any]) -> Clusters:
        """The clusters of some votes."""
        return Clusters.of(self.prompt[rows], self.rater[rows])

    def covariance(self, scores: ArrayLike) -> Floats:
        """The covariance of the sum of scores `[n, k]`, `[k, k]`, robust to the clusters.

        One prompt alone gives no clusters: the votes then count as independent. A two-way sum that
        is not positive definite is replaced by the larger one-way covariance.
        """
        u = np.asarray(scores, np.float64).reshape(len(self.prompt), -1)
        if self.prompts < 2:
            return _meat(u, np.arange(len(u)))
        by_prompt = _meat(u, self.prompt)
        if not self.by_rater:
            return by_prompt
        by_rater = _meat(u, self.rater)
        total = by_prompt + by_rater - _meat(u, self.prompt * self.raters + self.rater)
        if np.linalg.eigvalsh(total)[0] > 0:
            return total
        return max(by_prompt, by_rater, key=lambda each: float(np.trace(each)))


def _meat(u: Floats, labels: NDArray[np.intp]) -> Floats:
    labels = np.unique(labels, return_inverse=True)[1]
    count = int(labels.max()) + 1
    sums = np.zeros((count, u.shape[1]))
    np.add.at(sums, labels, u)
    return count / max(1, count - 1) * sums.T @ sums

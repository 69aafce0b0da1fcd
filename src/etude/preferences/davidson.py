"""Bradley-Terry with ties, after Davidson (1970, doi 10.1080/01621459.1970.10481082).

With d the utility of the left image minus that of the right one, and eta = log nu,

    P(left) = exp(d / 2) / Z,   P(tie) = exp(eta) / Z,   P(right) = exp(-d / 2) / Z
    Z = exp(d / 2) + exp(eta) + exp(-d / 2)

Given a decision, P(left) / P(right) = exp(d): one unit of utility is odds of e to 1. eta = -inf
forbids ties and leaves Bradley and Terry's model. The log-likelihood is concave in (d, eta), so
any linear model d = x . theta has one maximum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from etude.errors import EtudeError
from etude.preferences.clustering import Clusters, Floats

LEFT, TIE, RIGHT = 1, 0, -1
"""Outcomes of a vote."""
_STEPS, _LARGEST = 60, 25.0


def probabilities(d: ArrayLike, eta: ArrayLike = -np.inf) -> Floats:
    """P(left), P(tie), P(right) for differences `[n]`, as `[n, 3]`."""
    half = np.asarray(d, np.float64) / 2
    logits = np.stack([half, np.broadcast_to(np.asarray(eta, np.float64), half.shape), -half], axis=-1)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def simulate(d: ArrayLike, eta: ArrayLike, rng: np.random.Generator) -> NDArray[np.int8]:
    """Draw an outcome, 1, 0 or -1, for each difference."""
    p = probabilities(d, eta)
    u = rng.random(len(p))
    return ((u < p[:, 0]).astype(np.int8) - (u >= p[:, 0] + p[:, 1])).astype(np.int8)


def log_likelihood(d: Floats, eta: Floats | float, outcomes: NDArray[np.int8]) -> tuple[Floats, Floats, Floats]:
    """The log-likelihood of each vote `[n]`, and its derivatives in d and in eta."""
    p = probabilities(d, eta)
    chosen = p[np.arange(len(p)), 1 - outcomes]
    return np.log(np.maximum(chosen, 1e-300)), (outcomes - (p[:, 0] - p[:, 2])) / 2, (outcomes == TIE) - p[:, 1]


def information(d: ArrayLike, eta: ArrayLike = -np.inf) -> Floats:
    """Fisher's information of one vote, `[n, 2, 2]` in (d, eta)."""
    p = probabilities(d, eta)
    lean, tie = p[:, 0] - p[:, 2], p[:, 1]
    across = -tie * lean / 2
    return np.stack([np.stack([(1 - tie - lean**2) / 4, across], -1), np.stack([across, tie * (1 - tie)], -1)], axis=-2)


@dataclass(frozen=True)
class Fit:
    """The maximum of a linear Davidson model.

    Attributes:
        theta: coefficients `[k]`.
        eta: log nu; -inf where no vote is a tie.
        covariance: of (theta, eta), or of theta alone without ties; robust to clusters.
        degrees: degrees of freedom of the intervals.
    """

    theta: Floats
    eta: float
    covariance: Floats
    degrees: int

    def interval(self, contrast: ArrayLike) -> tuple[float, float, float]:
        """The value and the 95 % interval of contrast . theta."""
        from scipy.stats import t

        c = np.zeros(len(self.covariance))
        c[: len(self.theta)] = contrast
        value = float(c[: len(self.theta)] @ self.theta)
        half = float(t.ppf(0.975, self.degrees)) * math.sqrt(max(0.0, float(c @ self.covariance @ c)))
        return value, value - half, value + half


def fit(design: ArrayLike, outcomes: ArrayLike, clusters: Clusters) -> Fit:
    """Maximise the likelihood of d = design @ theta by Newton's method.

    Args:
        design: `[n, k]`; for strengths of items, +1 for the left item and -1 for the right one, one
            item left out; a column of ones is the side bias.
        outcomes: `[n]` of 1 (left), 0 (tie), -1 (right).
        clusters: prompts and raters, for the covariance.

    Raises:
        EtudeError: the maximum is not finite, as where one item wins every vote, or columns of the
            design depend on one another.
    """
    x, y = np.asarray(design, np.float64), np.asarray(outcomes, np.int8)
    ties = bool((y == TIE).any())
    k = x.shape[1]
    parameters = np.zeros(k + ties)
    if ties:  # nu that gives the ties of equal strengths
        parameters[k] = np.log(2 * np.mean(y == TIE) / max(np.mean(y != TIE), 1e-9))

    def split(values: Floats) -> tuple[Floats, float]:
        return x @ values[:k], float(values[k]) if ties else -np.inf

    def terms(values: Floats) -> tuple[float, Floats, Floats]:
        d, eta = split(values)
        ell, by_d, by_eta = log_likelihood(d, eta, y)
        scores = np.column_stack([x * by_d[:, None], by_eta]) if ties else x * by_d[:, None]
        h = information(d, eta)
        hessian = np.empty((len(values), len(values)))
        hessian[:k, :k] = x.T @ (x * h[:, 0, 0, None])
        if ties:
            hessian[:k, k] = hessian[k, :k] = x.T @ h[:, 0, 1]
            hessian[k, k] = h[:, 1, 1].sum()
        return float(ell.sum()), scores, hessian

    value, scores, hessian = terms(parameters)
    for _ in range(_STEPS):
        try:
            step = np.linalg.solve(hessian, scores.sum(axis=0))
        except np.linalg.LinAlgError:
            break
        size = 1.0
        while size > 1e-6:
            new = terms(parameters + size * step)
            if new[0] >= value - 1e-12 * abs(value):
                break
            size /= 2
        parameters = parameters + size * step
        value, scores, hessian = new
        if np.abs(size * step).max() < 1e-9:
            bread = np.linalg.inv(hessian)
            robust = bread @ clusters.covariance(scores) @ bread
            return Fit(parameters[:k], float(parameters[k]) if ties else -np.inf, robust, clusters.degrees)
        if np.abs(parameters).max() > _LARGEST:
            break
    raise EtudeError(
        f"{len(y)} votes do not determine {k} strengths: one side may have won or lost every vote; collect more votes."
    )

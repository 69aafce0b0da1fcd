"""The KL-regularised optimum `p*(x) ∝ p_ref(x) exp(r(x) / beta)`.

It maximises `E_p r - beta KL(p || p_ref)` over all laws p. For p_ref = N(m, C) and
r(x) = -(x - c)^T Q (x - c) + b^T x, with g = b + 2 Q (c - m) the gradient of r at m,

    C* = C^(1/2) (I + 2/beta C^(1/2) Q C^(1/2))^(-1) C^(1/2),      m* = m + C* g / beta,
    log Z = r(m)/beta - 1/2 log det(I + 2/beta C^(1/2) Q C^(1/2)) + g^T C* g / (2 beta^2).

It exists if and only if beta > -2 lambda_min(C^(1/2) Q C^(1/2)), so always for a positive
semidefinite Q. A mixture stays a mixture: its components are tilted one by one, and w_k* ∝ w_k Z_k.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from scipy.special import logsumexp

from etude.errors import EtudeError
from etude.theory.arrays import Array, number, positive
from etude.theory.reward_functions import QuadraticReward
from etude.theory.targets import Gaussian, GaussianMixture


class TiltedGaussian(Gaussian):
    """A Gaussian optimum, with `log_normalizer = log E_ref exp(r / beta)`."""

    log_normalizer: float


class TiltedMixture(GaussianMixture):
    """A mixture optimum, with `log_normalizer = log E_ref exp(r / beta)`."""

    log_normalizer: float


def critical_beta(target: Gaussian | GaussianMixture, reward: QuadraticReward) -> float:
    """Compute the beta above which the optimum exists, `max(0, -2 lambda_min(C^(1/2) Q C^(1/2)))`.

    For a mixture it is the largest over the components.
    """
    _check_target(target)
    if isinstance(target, GaussianMixture):
        return max(critical_beta(part, reward) for part in target.components)
    return max(0.0, -2.0 * float(np.linalg.eigvalsh(_curvature(target, reward)).min()))


@overload
def tilt(target: Gaussian, reward: QuadraticReward, beta: float) -> TiltedGaussian: ...


@overload
def tilt(target: GaussianMixture, reward: QuadraticReward, beta: float) -> TiltedMixture: ...


def tilt(target: Gaussian | GaussianMixture, reward: QuadraticReward, beta: float) -> TiltedGaussian | TiltedMixture:
    """Compute the law proportional to target(x) exp(reward(x) / beta), with its `.log_normalizer`.

    Raises:
        EtudeError: the law does not exist, because the reward rises faster than the target falls;
            the error names the eigenvalue and the betas for which the law exists.
    """
    strength = float(positive(number(beta, "beta"), "beta"))
    _check_target(target)
    if not isinstance(reward, QuadraticReward):
        raise EtudeError(
            f"tilt needs a QuadraticReward, got {type(reward).__name__}: the optimum is closed form only there."
        )
    if isinstance(target, GaussianMixture):
        return _tilt_mixture(target, reward, strength)
    return _tilt_gaussian(target, reward, strength)


def _check_target(target: Any) -> None:
    if not isinstance(target, (Gaussian, GaussianMixture)):
        raise EtudeError(
            f"the law to tilt is a {type(target).__name__}: pass a Gaussian(mean, cov) or a GaussianMixture."
        )


def _curvature(target: Gaussian, reward: QuadraticReward) -> Array:
    target.single("tilt")
    root = target.power(0.5)
    return np.asarray(root @ reward.parts(target.d)[0] @ root)


def _tilt_gaussian(target: Gaussian, reward: QuadraticReward, beta: float) -> TiltedGaussian:
    shape, root = _curvature(target, reward), target.power(0.5)
    lowest = float(np.linalg.eigvalsh(shape).min())
    if beta <= -2.0 * lowest:
        raise EtudeError(
            f"the optimum p_ref exp(r / beta) does not exist at beta = {beta:g}: the reward's curvature weighted by the "
            f"covariance has the eigenvalue {lowest:g}, so use a beta above {-2.0 * lowest:g}."
        )
    inner = np.eye(target.d) + (2.0 / beta) * shape
    cov = root @ np.linalg.solve(inner, root)
    cov = 0.5 * (cov + cov.T)
    g = reward.gradient(target.mu)
    mean = target.mu + cov @ g / beta
    at_mean = float(reward.value(target.mu))
    diagonal = target.basis is None and not np.any(cov - np.diag(np.diagonal(cov)))
    law = TiltedGaussian.__new__(TiltedGaussian)
    if target.on_line:
        TiltedGaussian.__init__(law, mean[0], cov[0, 0])
    else:
        TiltedGaussian.__init__(law, mean, np.diagonal(cov) if diagonal else cov)
    law.log_normalizer = (
        at_mean / beta - 0.5 * float(np.linalg.slogdet(inner)[1]) + float(g @ cov @ g) / (2.0 * beta**2)
    )
    return law


def _tilt_mixture(target: GaussianMixture, reward: QuadraticReward, beta: float) -> TiltedMixture:
    parts = [_tilt_gaussian(part, reward, beta) for part in target.components]
    logs = np.log(target.weights) + np.array([part.log_normalizer for part in parts])
    law = TiltedMixture.__new__(TiltedMixture)
    law.log_normalizer = float(logsumexp(logs))
    law.weights, law.components = np.exp(logs - law.log_normalizer), list(parts)
    return law

"""Optima of reinforcement learning with a KL penalty: over all laws (the tilt p*), and over paths.

The latter tend to p* as the sampler forgets its start (Phi_eta -> 0); at eta = 0 nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from scipy.special import logsumexp

from etude.errors import EtudeError
from etude.theory.arrays import Array, array, number, positive
from etude.theory.laws import contraction, transfer
from etude.theory.reward_functions import QuadraticReward
from etude.theory.sampler_steps import KernelChoice, Limit, sampler_of, sampler_steps
from etude.theory.targets import Gaussian, GaussianMixture, Law, gaussian


class TiltedGaussian(Gaussian):
    """A Gaussian optimum, with `log_normalizer = log E_ref exp(r / beta)`."""

    log_normalizer: float


class TiltedMixture(GaussianMixture):
    """A mixture optimum, with `log_normalizer = log E_ref exp(r / beta)`."""

    log_normalizer: float


def critical_beta(target: Law, reward: QuadraticReward) -> float:
    """Compute `max(0, -2 lambda_min(C^(1/2) Q C^(1/2)))`, the beta above which the optimum exists.

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


def tilt(target: Law, reward: QuadraticReward, beta: float) -> TiltedGaussian | TiltedMixture:
    """Compute the law p* ∝ target(x) exp(reward(x) / beta), with its `.log_normalizer`.

    It maximises `E_p r - beta KL(p || target)` over all laws p. For the target N(m, C) and
    r(x) = -(x - c)^T Q (x - c) + b^T x, with g = b + 2 Q (c - m) the gradient of r at m,

        C* = C^(1/2) (I + 2/beta C^(1/2) Q C^(1/2))^(-1) C^(1/2),      m* = m + C* g / beta,
        log Z = r(m)/beta - 1/2 log det(I + 2/beta C^(1/2) Q C^(1/2)) + g^T C* g / (2 beta^2).

    A mixture stays a mixture: its components are tilted one by one, and w_k* ∝ w_k Z_k. EtudeError
    if the reward rises faster than the target falls, so that there is none; it names the betas for
    which there is.
    """
    strength = float(positive(number(beta, "beta"), "beta"))
    _check_target(target)
    if not isinstance(reward, QuadraticReward):
        raise EtudeError(f"tilt needs a QuadraticReward, got {type(reward).__name__}: it is closed form only there.")
    if isinstance(target, Gaussian):
        return _tilt_gaussian(target, reward, strength)
    parts = [_tilt_gaussian(part, reward, strength) for part in target.components]
    logs = np.log(target.weights) + np.array([part.log_normalizer for part in parts])
    law = TiltedMixture.__new__(TiltedMixture)
    law.log_normalizer = float(logsumexp(logs))
    law.compose(np.exp(logs - law.log_normalizer), list(parts))
    return law


def _check_target(target: Any) -> None:
    if not isinstance(target, (Gaussian, GaussianMixture)):
        raise EtudeError(f"the law to tilt is a {type(target).__name__}: pass a Gaussian or a GaussianMixture.")


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
    diagonal = target.basis is None and not np.any(cov - np.diag(np.diagonal(cov)))
    if target.on_line:
        law = TiltedGaussian(mean[0], cov[0, 0])
    else:
        law = TiltedGaussian(mean, np.diagonal(cov) if diagonal else cov)
    at_mean, log_det = float(reward.value(target.mu)), float(np.linalg.slogdet(inner)[1])
    law.log_normalizer = at_mean / beta - 0.5 * log_det + float(g @ cov @ g) / (2.0 * beta**2)
    return law


def path_kl_optimum(
    target: Gaussian,
    path: Any,
    reward: QuadraticReward,
    beta: float,
    eta: float | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: KernelChoice = "gddim",
) -> Gaussian:
    """Compute the terminal law of the trajectories that maximise `E r - beta KL`.

    KL is that of the trajectories to those of the reference `target`, N(m, C), whose kernel is
    `x_0 | start ~ N(mu(start), S)`. With `Lam = S^-1 + 2Q/beta` the optimum's kernel is
    `N(Lam^-1 [S^-1 mu(start) + (2 Q c + b)/beta], Lam^-1)`, averaged over the fixed prior. In
    continuous time `S = C (1 - Phi_0^(2 eta^2))` and `mu = m + Phi_eta (y - m)`, and a change of
    drift reaches the optimum; with N steps they are those of the exact recursion. The other
    arguments and the errors are those of `reward_gap`; EtudeError also if no optimum exists.
    """
    target, strength = gaussian(target, "path_kl_optimum"), float(positive(beta, "beta"))
    sampler, c = sampler_of(path, eta, steps, spacing, kernel), target.spectrum
    if isinstance(sampler, Limit):
        start, noise_level = sampler.start, number(sampler.eta, "eta")
        phi, S = contraction(target, start, noise_level), np.zeros_like(c)
        if noise_level:
            with np.errstate(divide="ignore"):
                S = np.asarray(-c * np.expm1(-(noise_level**2) * np.log1p(start.V / c)))
        offset = target.to_eigen(target.mu) * (1.0 - phi)
        with np.errstate(invalid="ignore"):
            spread = np.where(phi > 0, phi**2 * (start.V + start.excess), 0.0)
    else:
        grid = sampler.levels
        A, _, noise = transfer(target, sampler)
        phi, S = np.ones_like(A[0]), np.zeros_like(A[0])
        for each, added in zip(A, noise, strict=True):
            phi, S = each * phi, each**2 * S + added
        offset = target.to_eigen(target.mu) * (float(grid.a[-1]) - float(grid.a[0]) * phi)
        spread = phi**2 * float(grid.prior_variance)
    # Tilt N(offset + xi, S) by exp(r/beta) and average over xi ~ N(0, spread), in the eigenbasis.
    U, (Q, center, linear), root = target.axes, reward.parts(target.d), np.sqrt(S)
    Q, pull = U.T @ Q @ U, U.T @ (2.0 * Q @ center + linear)
    inner = np.eye(target.d) + (2.0 / strength) * root[:, None] * Q * root
    lowest = float(np.linalg.eigvalsh(inner).min())
    if lowest <= 0.0:
        limit = strength * (1.0 - lowest)
        raise EtudeError(f"the path-space optimum does not exist at beta = {strength:g}: use a beta above {limit:g}.")
    cov = root[:, None] * np.linalg.solve(inner, np.diag(root))
    gain = np.eye(target.d) - (2.0 / strength) * cov @ Q
    mean = gain @ offset + cov @ pull / strength
    return _law(target, U @ mean, cov + (gain * spread) @ gain.T)


def _law(target: Gaussian, mean: Array, cov: Array) -> Gaussian:
    """Make a law in the form of `target` from its covariance in the eigenbasis of `target`."""
    matrix = target.axes @ (0.5 * (cov + cov.T)) @ target.axes.T
    return Gaussian(mean[0], matrix[0, 0]) if target.on_line else Gaussian(mean, matrix)


@dataclass(frozen=True)
class MeanPolicy:
    """The best policy that changes the means of noisy steps:

        mean_u = A x + k + F_i (x - a_i m) + f_i        in step i

    Attributes:
        law: its terminal law.
        reward: its E r.
        kl: its KL to the reference's trajectories.
        value: reward - beta kl.
        feedback: F [N, d, d] in the original coordinates; zero at noiseless steps.
        feedforward: f [N, d], likewise.
    """

    law: Gaussian
    reward: float
    kl: float
    value: float
    feedback: Array
    feedforward: Array


def mean_policy_optimum(
    target: Gaussian,
    schedule: Any,
    reward: QuadraticReward,
    beta: float,
    eta: float | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: KernelChoice = "gddim",
) -> MeanPolicy:
    """Compute the policy that maximises `E r - beta KL` by shifts of the noisy steps' means.

    Policy gradients with a fixed sampler reach it at N steps; it tends to `path_kl_optimum` as N
    grows. It is a linear-quadratic regulator: the value function `-x^T P x + p^T x` goes backwards
    through the exact steps, a shift of a mean by u costs `beta |u|^2 / (2 std^2)`, and the optimal
    shift is linear in the state. The other arguments are those of `finite_step_law`. EtudeError
    also if no optimum exists at this beta.
    """
    target, strength = gaussian(target, "mean_policy_optimum"), float(positive(beta, "beta"))
    sampler = sampler_steps(schedule, eta, steps, spacing, kernel)
    grid, U, (Q, c, b) = sampler.levels, target.axes, reward.parts(target.d)
    A, _, noise = transfer(target, sampler)
    variances = [float(each.max()) for each in noise]
    end = float(grid.a[-1]) * target.mu
    P, p = U.T @ Q @ U, U.T @ (b - 2.0 * Q @ (end - c))
    feedback, feedforward = np.zeros((grid.steps, target.d, target.d)), np.zeros((grid.steps, target.d))
    for i in range(grid.steps - 1, -1, -1):
        feedback[i], feedforward[i], P, p = _regulate(A[i], variances[i], strength, P, p)
    mean, cov, kl = -float(grid.a[0]) * target.to_eigen(target.mu), float(grid.prior_variance) * np.eye(target.d), 0.0
    for free, F, f, variance in zip(A, feedback, feedforward, variances, strict=True):
        if variance > 0:
            shift = F @ mean + f
            kl += float(shift @ shift + np.trace(F @ cov @ F.T)) / (2.0 * variance)
        gain = np.diag(free) + F
        mean, cov = gain @ mean + f, gain @ cov @ gain.T + variance * np.eye(target.d)
    law = _law(target, end + U @ mean, cov)
    gained = float(array(reward.expected(law), "the reward"))
    return MeanPolicy(law, gained, kl, gained - strength * kl, U @ feedback @ U.T, feedforward @ U.T)


def _regulate(A: Array, variance: float, beta: float, P: Array, p: Array) -> tuple[Array, Array, Array, Array]:
    """Return F, f of a step's best shift `F e + f`, e = x - a m, and P, p of the value before."""
    if variance == 0.0:
        return np.zeros_like(P), np.zeros_like(p), A[:, None] * P * A, A * p
    weight = 2.0 * variance / beta
    inner = np.eye(p.size) + weight * P
    if float(np.linalg.eigvalsh(inner).min()) <= 0.0:
        raise EtudeError(f"no mean-policy optimum exists at beta = {beta:g}: the reward outgrows the KL, raise beta.")
    closed: Array = np.linalg.inv(inner).astype(np.float64)
    F, f, pulled = -weight * closed @ (P * A), 0.5 * weight * closed @ p, P @ closed
    return F, f, A[:, None] * (0.5 * (pulled + pulled.T)) * A, A * (closed.T @ p)

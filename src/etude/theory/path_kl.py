"""Optima of reinforcement learning with a KL penalty on trajectories, other than the tilt p*.

DDPO with KL penalises the KL divergence between the two samplers' whole trajectories, with the
initial noise fixed. There are three optima, from the freest policy to the most constrained:

    kernel optimum   any change of the trajectory given its start: x_0's kernel times exp(r/beta),
                     normalised per start (`path_kl_optimum`). A change of drift reaches it in
                     continuous time.
    mean optimum     every step's mean is free and its noise is not (`mean_policy_optimum`). A
                     network trained by policy gradients with a fixed sampler reaches it at N
                     steps. It tends to the kernel optimum as N grows.
    p*               the tilt. Both tend to it as the sampler forgets its start (Phi_eta -> 0).

At eta = 0 the kernel has no noise and the optimum changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import Array, array, number, positive
from etude.theory.continuous_paths import as_path
from etude.theory.exact_gap import is_path
from etude.theory.finite_step import transfer
from etude.theory.levels import Levels
from etude.theory.reward_functions import QuadraticReward
from etude.theory.sampler_steps import KernelChoice, path_eta, sampler_steps
from etude.theory.targets import Gaussian
from etude.theory.terminal_law import contraction, gaussian


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

    KL is that of the trajectories to the reference's. The start's law is fixed, and `target` is the reference N(m, C). The reference's kernel is
    `x_0 | start ~ N(mu(start), S)`; with `Lam = S^-1 + 2Q/beta` the optimum's is
    `x_0 | start ~ N(Lam^-1 [S^-1 mu(start) + (2 Q c + b)/beta], Lam^-1)`, averaged over the prior.
    In continuous time `S = C (1 - Phi_0^(2 eta^2))` and `mu = m + Phi_eta (y - m)`; with N steps S
    and Phi are those of the exact recursion. The other arguments are those of `reward_gap`.

    Raises:
        EtudeError: as `reward_gap`; the optimum does not exist at this beta.
    """
    target, strength = gaussian(target, "path_kl_optimum"), float(positive(beta, "beta"))
    if steps is None and is_path(path):
        start, noise_level = as_path(path).start(), number(path_eta(kernel, eta, as_path(path)), "eta")
        phi, S = contraction(target, start, noise_level), _kernel_variance(target, start, noise_level)
        offset = target.to_eigen(target.mu) * (1.0 - phi)
        with np.errstate(invalid="ignore"):
            spread = np.where(phi > 0, phi**2 * (start.V + start.excess), 0.0)
    else:
        sampler = sampler_steps(path, eta, steps, spacing, kernel)
        grid = sampler.levels
        A, _, noise = transfer(target, sampler)
        phi, S = _compose(A, noise)
        offset = target.to_eigen(target.mu) * (float(grid.a[-1]) - float(grid.a[0]) * phi)
        spread = phi**2 * float(grid.prior_variance)
    return _average_of_tilts(target, reward, strength, offset, S, spread)


def _kernel_variance(target: Gaussian, start: Any, eta: float) -> Array:
    """Compute `C (1 - Phi_0^(2 eta^2))`."""
    if eta == 0.0:
        return np.zeros_like(target.spectrum)
    with np.errstate(divide="ignore"):
        return np.asarray(-target.spectrum * np.expm1(-(eta**2) * np.log1p(start.V / target.spectrum)))


def _compose(A: Array, noise: Array) -> tuple[Array, Array]:
    """Compute the gain and the noise variance of all steps together."""
    phi, S = np.ones_like(A[0]), np.zeros_like(A[0])
    for gain, added in zip(A, noise, strict=True):
        phi, S = gain * phi, gain**2 * S + added
    return phi, S


def _average_of_tilts(
    target: Gaussian, reward: QuadraticReward, beta: float, offset: Array, S: Array, spread: Array
) -> Gaussian:
    """Tilt N(offset + xi, S) by exp(r/beta), average over xi ~ N(0, spread); in the eigenbasis."""
    U = np.eye(target.d) if target.basis is None else target.basis
    Q, c, b = reward.parts(target.d)
    Q, pull = U.T @ Q @ U, U.T @ (2.0 * Q @ c + b)
    root = np.sqrt(S)
    inner = np.eye(target.d) + (2.0 / beta) * root[:, None] * Q * root
    lowest = float(np.linalg.eigvalsh(inner).min())
    if lowest <= 0.0:
        limit = beta * (1.0 - lowest)
        raise EtudeError(f"the path-space optimum does not exist at beta = {beta:g}: use a beta above {limit:g}.")
    cov = root[:, None] * np.linalg.solve(inner, np.diag(root))
    gain = np.eye(target.d) - (2.0 / beta) * cov @ Q
    mean = gain @ offset + cov @ pull / beta
    total = cov + (gain * spread) @ gain.T
    mean, total = U @ mean, U @ (0.5 * (total + total.T)) @ U.T
    return Gaussian(mean[0], total[0, 0]) if target.on_line else Gaussian(mean, total)


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

    The shift may be any function of the step's state; noiseless steps cannot be changed. The
    optimum is a linear-quadratic regulator: the value function `-x^T P x + p^T x` goes backwards
    through the exact steps, and a shift of a mean by u costs `beta |u|^2 / (2 std^2)`. The optimal
    shift is linear in the state. The other arguments are those of `finite_step_law`.

    Raises:
        EtudeError: as `finite_step_law`; the optimum does not exist at this beta.
    """
    target, strength = gaussian(target, "mean_policy_optimum"), float(positive(beta, "beta"))
    sampler = sampler_steps(schedule, eta, steps, spacing, kernel)
    grid = sampler.levels
    A, _, noise = transfer(target, sampler)
    U = np.eye(target.d) if target.basis is None else target.basis
    Q, c, b = reward.parts(target.d)
    end = float(grid.a[-1]) * target.mu
    P, p = U.T @ Q @ U, U.T @ (b - 2.0 * Q @ (end - c))
    feedback, feedforward = np.zeros((grid.steps, target.d, target.d)), np.zeros((grid.steps, target.d))
    for i in range(grid.steps - 1, -1, -1):
        feedback[i], feedforward[i], P, p = _regulate(A[i], float(noise[i].max()), strength, P, p)
    return _run_policy(target, grid, reward, strength, A, noise, feedback, feedforward, U)


def _regulate(A: Array, variance: float, beta: float, P: Array, p: Array) -> tuple[Array, Array, Array, Array]:
    """Take one step backwards in deviations e = x - a m.

    It returns F and f of the best shift `F e + f`, and P and p of the value function before the
    step.
    """
    if variance == 0.0:
        return np.zeros_like(P), np.zeros_like(p), A[:, None] * P * A, A * p
    weight = 2.0 * variance / beta
    inner = np.eye(p.size) + weight * P
    if float(np.linalg.eigvalsh(inner).min()) <= 0.0:
        raise EtudeError(
            f"the mean-policy optimum does not exist at beta = {beta:g}: the reward outgrows the penalty, raise beta."
        )
    closed: Array = np.linalg.inv(inner).astype(np.float64)
    F, f, pulled = -weight * closed @ (P * A), 0.5 * weight * closed @ p, P @ closed
    return F, f, A[:, None] * (0.5 * (pulled + pulled.T)) * A, A * (closed.T @ p)


def _run_policy(
    target: Gaussian,
    grid: Levels,
    reward: QuadraticReward,
    beta: float,
    A: Array,
    noise: Array,
    feedback: Array,
    feedforward: Array,
    U: Array,
) -> MeanPolicy:
    """Run the policy forward on moments and add up its KL."""
    mean = -float(grid.a[0]) * target.to_eigen(target.mu)
    cov, kl = float(grid.prior_variance) * np.eye(target.d), 0.0
    for i in range(grid.steps):
        F, f = feedback[i], feedforward[i]
        variance = float(noise[i].max())
        if variance > 0:
            shift = F @ mean + f
            kl += float(shift @ shift + np.trace(F @ cov @ F.T)) / (2.0 * variance)
        gain = np.diag(A[i]) + F
        mean, cov = gain @ mean + f, gain @ cov @ gain.T + variance * np.eye(target.d)
    mu, matrix = float(grid.a[-1]) * target.mu + U @ mean, U @ (0.5 * (cov + cov.T)) @ U.T
    law = Gaussian(mu[0], matrix[0, 0]) if target.on_line else Gaussian(mu, matrix)
    gained = float(array(reward.expected(law), "the reward"))
    return MeanPolicy(law, gained, kl, gained - beta * kl, U @ feedback @ U.T, feedforward @ U.T)

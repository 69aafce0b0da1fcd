"""A network with affine corrections in every step: the laws, gradients and fixed points of training.

In the eigenbasis of N(m, C), with e = x - a m and w = (a^2 C + s^2)^(-1/2) e, the network of step i
predicts

    x0_hat = E[x0 | x] (and the score error) + unit_i (F_i w + f_i)

with weights F [d, d] and f [d]. Every sampler's step is then affine in e:

    e <- M e + n + noise,      M = A + k F W,      n = shift + k f,      k = unit (c_x0 - c_eps a / s)

so the law of its last state is a Gaussian, and E r of a quadratic reward and the gradient of E r are
exact. All arrays have an axis for the etas, [N, etas, ...]: each eta has weights of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from etude.errors import EtudeError, unknown
from etude.theory.arrays import Array, positive
from etude.theory.laws import ScoreError, transfer
from etude.theory.levels import Levels
from etude.theory.reward_functions import QuadraticReward
from etude.theory.sampler_steps import SamplerSteps
from etude.theory.targets import Gaussian

Mask: TypeAlias = npt.NDArray[np.bool_]
PREDICTIONS = ("sample", "noise", "velocity")


@dataclass(frozen=True)
class Weights:
    """The weights of all steps: feedback F [N, etas, d, d] and feedforward f [N, etas, d]."""

    F: Array
    f: Array

    @classmethod
    def zeros(cls, steps: int, etas: int, d: int) -> Weights:
        """Make the weights of the network before training."""
        return cls(np.zeros((steps, etas, d, d)), np.zeros((steps, etas, d)))

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.F + other.F, self.f + other.f)

    def scaled(self, factor: Array | Mask | float) -> Weights:
        """Multiply by a number, or by one for each step and eta, [N, etas]."""
        return Weights(self.F * np.asarray(factor)[..., None, None], self.f * np.asarray(factor)[..., None])

    def summed(self) -> Weights:
        """Give every step the sum over all steps, the gradient of weights that all steps share."""
        return Weights(*(np.broadcast_to(each.sum(0), each.shape) for each in (self.F, self.f)))

    def dot(self, other: Weights) -> Array:
        """Compute the inner product over all steps, [etas]."""
        return np.asarray((self.F * other.F).sum((0, 2, 3)) + (self.f * other.f).sum((0, 2)))


@dataclass(frozen=True)
class End:
    """The reward of the last deviation e, `constant - e^T P e + p^T e`, in the eigenbasis."""

    P: Array
    p: Array
    constant: float

    @classmethod
    def of(cls, target: Gaussian, reward: QuadraticReward, a: float) -> End:
        """Write r(a m + U e) in terms of e."""
        U, (Q, _, _), end = target.axes, reward.parts(target.d), a * target.mu
        return cls(U.T @ Q @ U, U.T @ reward.gradient(end), float(reward.value(end)))

    def scaled(self, factor: Array) -> End:
        """Multiply the reward by a factor for each eta; for gradients alone."""
        return End(self.P * factor[:, None, None], self.p * factor[:, None], self.constant)


@dataclass(frozen=True)
class Course:
    """The Gaussian of every state under some weights: means [N + 1, etas, d] and covariances."""

    M: Array
    n: Array
    mean: Array
    cov: Array

    def reward(self, end: End) -> Array:
        """Compute E r of the last state, [etas]."""
        mean, cov = self.mean[-1], self.cov[-1]
        quadratic = np.einsum("eij,ij->e", cov + mean[:, :, None] * mean[:, None, :], end.P)
        return np.asarray(end.constant - quadratic + mean @ end.p)

    def spread(self, end: End) -> Array:
        """Compute sd r = (2 tr(P S P S) + g^T S g)^(1/2) of the last state, [etas]."""
        PS, g = end.P @ self.cov[-1], end.p - 2.0 * self.mean[-1] @ end.P
        return np.asarray(
            np.sqrt(2.0 * np.einsum("eij,eji->e", PS, PS) + np.einsum("ei,eij,ej->e", g, self.cov[-1], g))
        )


@dataclass(frozen=True)
class AffineSampler:
    """A sampler of such a network.

    Attributes:
        A: factor of the deviation in each step without corrections, [N, etas, d].
        shift: what the score error adds to the deviation, likewise.
        noise: variance that the step adds, likewise.
        lever: k, the move of the next state for a unit of the weights' output, [N, etas].
        whiten: diagonal of W, [N, 1, d].
        penalty: the KL of a step is `|k (F w + f)|^2 penalty / 2`, 1 / std^2; 0 without noise.
        start: variance of the first state, and its mean -a m.
    """

    A: Array
    shift: Array
    noise: Array
    lever: Array
    whiten: Array
    penalty: Array
    start: tuple[float, Array]

    @classmethod
    def of(cls, target: Gaussian, sampler: SamplerSteps, unit: Array, score_error: ScoreError | None) -> AffineSampler:
        """Compute the steps of a sampler with coefficients [N, etas]; `unit` is [N]."""
        grid = sampler.levels
        A, shift, noise = transfer(target, sampler, score_error)
        a, s = grid.a[:-1, None], grid.s[:-1, None]
        whiten = 1.0 / np.sqrt(a[..., None] ** 2 * target.spectrum + s[..., None] ** 2)
        with np.errstate(divide="ignore"):
            penalty = np.where(sampler.variance > 0, 1.0 / sampler.variance, 0.0)
        start = float(grid.prior_variance), -float(grid.a[0]) * target.to_eigen(target.mu)
        return cls(A, shift, noise, unit[:, None] * (sampler.x0 - sampler.eps * a / s), whiten, penalty, start)

    def course(self, weights: Weights) -> Course:
        """Compute the law of every state."""
        steps, etas, d = self.A.shape
        M = self.lever[..., None, None] * weights.F * self.whiten[..., None, :]
        M[..., range(d), range(d)] += self.A
        n = self.shift + self.lever[..., None] * weights.f
        mean, cov = np.zeros((steps + 1, etas, d)), np.zeros((steps + 1, etas, d, d))
        mean[0], cov[0] = self.start[1], self.start[0] * np.eye(d)
        for i in range(steps):
            mean[i + 1] = (M[i] @ mean[i][..., None])[..., 0] + n[i]
            cov[i + 1] = M[i] @ cov[i] @ M[i].swapaxes(-1, -2)
            cov[i + 1][:, range(d), range(d)] += self.noise[i]
        return Course(M, n, mean, cov)

    def ascent(self, weights: Weights, course: Course, end: End, path_kl: float = 0.0) -> Weights:
        """Compute the gradient of E r - path_kl KL in the weights of every step.

        KL is that of the whole trajectory to the one without corrections. Backwards, the value of a
        state is `-e^T P e + p^T e` with P' = M^T P M and p' = M^T (p - 2 P n) (and a step's own
        penalty), and g = p - 2 P E e is its mean slope:

            d/dn = g,      d/dM = g (E e)^T - 2 P M Cov e
        """
        steps, etas, d = self.A.shape
        P, p = np.broadcast_to(end.P, (etas, d, d)), np.broadcast_to(end.p, (etas, d))
        out, kl = Weights.zeros(steps, etas, d), self.penalty_slope(weights, course).scaled(-path_kl)
        for i in range(steps - 1, -1, -1):
            M, n, mean = course.M[i], course.n[i], course.mean[i]
            g = p - 2.0 * (P @ course.mean[i + 1][..., None])[..., 0]
            slope = g[:, :, None] * mean[:, None, :] - 2.0 * P @ M @ course.cov[i]
            k = self.lever[i][:, None]
            out.f[i], out.F[i] = k * g, k[..., None] * slope * self.whiten[i][..., None, :]
            back = M.swapaxes(-1, -2)
            p, P = (back @ (p - 2.0 * (P @ n[..., None])[..., 0])[..., None])[..., 0], back @ P @ M
            if path_kl:
                own, f = k[..., None] * weights.F[i] * self.whiten[i][..., None, :], k * weights.f[i]
                weight = path_kl * self.penalty[i][:, None, None]
                P = P + 0.5 * weight * own.swapaxes(-1, -2) @ own
                p = p - (weight * own.swapaxes(-1, -2) @ f[..., None])[..., 0]
        return out + kl if path_kl else out

    def penalty_slope(self, weights: Weights, course: Course) -> Weights:
        """Compute the gradient of the sum of KL_i = E |k (F w + f)|^2 / (2 std^2) at fixed states."""
        steps = len(self.A)
        mean, second = self._whitened(course.mean[:steps], course.cov[:steps])
        scale = self.lever**2 * self.penalty
        return square_slope(weights, mean, second).scaled(scale)

    def kl(self, weights: Weights, course: Course) -> Array:
        """Compute the KL of the trajectories to those without corrections, [etas]."""
        return 0.5 * weights.dot(self.penalty_slope(weights, course))

    def _whitened(self, mean: Array, cov: Array) -> tuple[Array, Array]:
        """Compute E w and E w w^T of deviations with these means and covariances."""
        W = self.whiten
        return W * mean, W[..., None] * (cov + mean[..., :, None] * mean[..., None, :]) * W[..., None, :]

    def fixed_point(self, end: End, beta: float, path_kl: bool, trained: Mask) -> Weights:
        """Compute the weights at which E r - beta KL is stationary; EtudeError if there are none.

        With k = std^2 / beta a trained step moves the mean by `(1 + 2 k P)^-1 k (p - 2 P (A e +
        shift))`; other steps keep their weights of 0.
        """
        steps, etas, d = self.A.shape
        P, p, out = (
            np.broadcast_to(end.P, (etas, d, d)),
            np.broadcast_to(end.p, (etas, d)),
            Weights.zeros(steps, etas, d),
        )
        for i in range(steps - 1, -1, -1):
            A, n = self.A[i][..., None] * np.eye(d), self.shift[i]
            F, f = np.zeros_like(A), np.zeros_like(n)
            k = np.where(trained[i], 1.0 / (beta * np.where(trained[i], self.penalty[i], 1.0)), 0.0)[:, None, None]
            inner = np.eye(d) + 2.0 * k * P
            if np.linalg.eigvalsh(inner).min() <= 0:
                raise EtudeError(f"training has no limit at beta = {beta:g}: the reward outgrows the KL, raise beta.")
            F = -2.0 * np.linalg.solve(inner, k * P @ A)
            f = np.linalg.solve(inner, k * (p - 2.0 * (P @ n[..., None])[..., 0])[..., None])[..., 0]
            lever = np.where(trained[i], self.lever[i], 1.0)[:, None]
            out.F[i], out.f[i] = F / lever[..., None] / self.whiten[i][..., None, :], f / lever
            M, n, back = A + F, n + f, (A + F).swapaxes(-1, -2)
            p, P = (back @ (p - 2.0 * (P @ n[..., None])[..., 0])[..., None])[..., 0], back @ P @ M
            if path_kl:
                weight = beta * (trained[i] * self.penalty[i])[:, None, None]
                P = P + 0.5 * weight * F.swapaxes(-1, -2) @ F
                p = p - (weight * F.swapaxes(-1, -2) @ f[..., None])[..., 0]
        return out


def square_slope(weights: Weights, mean: Array, second: Array) -> Weights:
    """Compute the gradient of `E |F w + f|^2 / 2` from E w and E w w^T."""
    F = weights.F @ second + weights.f[..., :, None] * mean[..., None, :]
    return Weights(F, (weights.F @ mean[..., None])[..., 0] + weights.f)


def output_unit(grid: Levels, prediction: Any) -> Array:
    """Return |d x0_hat / d output| of each step, [N]: 1, s/a or s by the network's prediction.

    `prediction` is "sample", "noise" or "velocity", or the units themselves, [N].
    """
    a, s = grid.a[:-1], grid.s[:-1]
    if not isinstance(prediction, str):
        unit = positive(prediction, "the unit of the prediction")
        if unit.shape != a.shape:
            raise EtudeError(
                f"the prediction's units are {unit.shape}, but the sampler has {len(a)} steps: give one a step."
            )
        return unit
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    if prediction == "noise" and np.any(a == 0):
        raise EtudeError("a network that predicts noise says nothing of x0 at a = 0: use prediction 'velocity'.")
    with np.errstate(divide="ignore"):
        return np.asarray({"sample": np.ones_like(a), "noise": s / a, "velocity": s}[prediction])

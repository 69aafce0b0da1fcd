"""The exact N-step gap of a mixture on the line, by quadrature, with its numerical error.

One step is `x_u = mean(x_t) + std z`, `mean = c0 x0_hat + c1 eps_hat` with the mixture's exact
denoiser. The ODE composes the maps and integrates the result over the prior adaptively, because the
map is nearly a step between far modes. The SDE goes backwards through
`u_i(x) = E_z u_(i+1)(mean_i(x) + std_i z)`, with cubic splines in x and the trapezoid rule in z,
which converges faster than any power. The error is the change when both meshes are halved.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.interpolate import CubicSpline

from etude.errors import EtudeError
from etude.theory.approximation import NUMERICAL, Approximation
from etude.theory.arrays import Array
from etude.theory.line_flow import REACH, Components
from etude.theory.reward_functions import Reward
from etude.theory.sampler_steps import SamplerSteps
from etude.theory.targets import GaussianMixture


def line_step_values(
    target: GaussianMixture, sampler: SamplerSteps, reward: Reward
) -> tuple[Approximation, Approximation]:
    """Compute (E r of the ODE, E r of the sampler) with N steps on the same levels."""
    ode = _LineSampler(target, sampler.ode()).deterministic(reward)
    return ode, _LineSampler(target, sampler).stochastic(reward) if np.any(sampler.variance > 0) else ode


class _LineSampler:
    """The N-step sampler of a mixture on the line."""

    def __init__(self, target: GaussianMixture, sampler: SamplerSteps):
        if sampler.x0.ndim > 1:
            raise EtudeError("a mixture takes one horizon at a time: pass a path whose T is a number.")
        self.parts, self.steps, self.grid = Components(target), sampler, sampler.levels
        self.prior_std = float(np.sqrt(self.grid.prior_variance))

    def mean(self, step: int, x: Array) -> Array:
        """Compute the mean of the next state at the states `x` of this step."""
        a, s, c, m = float(self.grid.a[step]), float(self.grid.s[step]), self.parts.c, self.parts.m
        spread = a**2 * c + s**2
        off = x[..., None] - a * m
        logs = np.log(self.parts.w) - 0.5 * np.log(spread) - 0.5 * off**2 / spread
        weight = np.exp(logs - logs.max(axis=-1, keepdims=True))
        weight /= weight.sum(axis=-1, keepdims=True)
        x0 = np.sum(weight * (m + a * c / spread * off), axis=-1)
        return np.asarray(self.steps.x0[step] * x0 + self.steps.eps[step] * (x - a * x0) / s)

    def deterministic(self, reward: Reward) -> Approximation:
        """Compute E r of steps that add no noise."""

        def integrand(z: Array) -> Array:
            x = self.prior_std * z
            for step in range(self.grid.steps):
                x = self.mean(step, x)
            return np.asarray(reward(x) * np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi))

        return adaptive_integral(integrand, -REACH, REACH)

    def stochastic(self, reward: Reward, points: int = 2000, nodes: int = 200) -> Approximation:
        """Compute E r by the backward recursion, on this mesh and on half of it."""
        fine = self._backward(reward, points, nodes)
        change = abs(fine - self._backward(reward, points // 2, nodes // 2))
        return Approximation(fine, change + 1e-13 * abs(fine), NUMERICAL)

    def _backward(self, reward: Reward, points: int, nodes: int) -> float:
        z = np.linspace(-REACH, REACH, nodes + 1)
        w = np.exp(-0.5 * z**2)
        w /= w.sum()
        value: Callable[[Array], Array] = reward
        for step in range(self.grid.steps - 1, -1, -1):
            x, std = self._mesh(step, points), float(np.sqrt(self.steps.variance[step]))
            mean = self.mean(step, x)
            u = value(mean) if std == 0.0 else value((mean[:, None] + std * z).ravel()).reshape(-1, z.size) @ w
            value = _spline(x, u)
        x = self.prior_std * np.linspace(-REACH, REACH, 4 * points + 1)
        weight = np.exp(-0.5 * (x / self.prior_std) ** 2)
        return float(value(x) @ (weight / weight.sum()))

    def _mesh(self, step: int, points: int) -> Array:
        """Return an even mesh over all states of this level but for a weight of about 1e-19."""
        a, s, parts = float(self.grid.a[step]), float(self.grid.s[step]), self.parts
        width = REACH * np.sqrt(a**2 * parts.c.max() + max(s, self.prior_std if step == 0 else 0.0) ** 2)
        low, high = a * parts.m.min(), a * parts.m.max()
        return np.linspace(min(low, 0.0) - width, max(high, 0.0) + width, points + 1)


def _spline(x: Array, u: Array) -> Callable[[Array], Array]:
    """Interpolate by a cubic spline; outside the mesh, without weight, return the edge value."""
    spline, low, high = CubicSpline(x, u), x[0], x[-1]
    return lambda at: np.asarray(spline(np.clip(at, low, high)))


def adaptive_integral(
    function: Callable[[Array], Array], low: float, high: float, tolerance: float = 1e-10, rounds: int = 40
) -> Approximation:
    """Integrate by 8-point Gauss-Legendre on cells.

    A cell whose halves disagree with the whole is halved.

    All open cells are evaluated in one call. The error is the sum of the disagreements.
    """
    nodes, weights = np.polynomial.legendre.leggauss(8)

    def cells(left: Array, right: Array) -> Array:
        half = 0.5 * (right - left)
        x = 0.5 * (left + right)[:, None] + half[:, None] * nodes
        return np.asarray(half * (function(x.ravel()).reshape(x.shape) @ weights))

    edges = np.linspace(low, high, 129)
    left, right = edges[:-1], edges[1:]
    whole, total, error = cells(left, right), 0.0, 0.0
    for _ in range(rounds):
        middle = 0.5 * (left + right)
        first, second = cells(left, middle), cells(middle, right)
        gap = np.abs(first + second - whole)
        open_ = gap > tolerance * (right - left) / (high - low)
        total += float((first + second)[~open_].sum())
        error += float(gap[~open_].sum())
        left, right = np.concatenate([left[open_], middle[open_]]), np.concatenate([middle[open_], right[open_]])
        whole = np.concatenate([first[open_], second[open_]])
        if not left.size or np.all(right - left < 1e-10 * (high - low)):
            break
    remaining = float(np.abs(whole).sum()) * bool(left.size)
    return Approximation(total + float(whole.sum()), error + remaining, NUMERICAL)

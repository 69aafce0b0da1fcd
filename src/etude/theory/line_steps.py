"""The exact N-step gap of a mixture on the line, by quadrature, with its numerical error.

One step is `x_u = mean(x_t) + std z`, `mean = c0 x0_hat + c1 eps_hat` with the mixture's exact denoiser. The ODE composes the
maps and integrates the result over the prior adaptively (the map is nearly a step between far modes). The SDE goes backwards
through `u_i(x) = E_z u_(i+1)(mean_i(x) + std_i z)` with cubic splines in x and the trapezoid rule in z, which converges faster
than any power; the error is the change on halving both meshes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.interpolate import CubicSpline

from etude.errors import EtudeError
from etude.theory.arrays import Array
from etude.theory.estimate import Estimate
from etude.theory.finite_step import Coefficients, coefficients
from etude.theory.gap_types import Reward
from etude.theory.levels import Levels
from etude.theory.line_flow import REACH, Components
from etude.theory.targets import GaussianMixture

KIND = "numerical error"


class LineSampler:
    """The N-step sampler of a mixture on the line."""

    def __init__(self, target: GaussianMixture, grid: Levels, eta: float, kernel: str):
        self.parts, self.grid = Components(target), grid
        self.k: Coefficients = coefficients(grid, eta, kernel)
        self.prior_std = float(np.sqrt(grid.prior_variance))

    def mean(self, step: int, x: Array) -> Array:
        """The mean of the next state given the state `x` of this step."""
        a, s, c, m = float(self.grid.a[step]), float(self.grid.s[step]), self.parts.c, self.parts.m
        spread = a**2 * c + s**2
        off = x[..., None] - a * m
        logs = np.log(self.parts.w) - 0.5 * np.log(spread) - 0.5 * off**2 / spread
        weight = np.exp(logs - logs.max(axis=-1, keepdims=True))
        weight /= weight.sum(axis=-1, keepdims=True)
        x0 = np.sum(weight * (m + a * c / spread * off), axis=-1)
        return np.asarray(self.k.x0[step] * x0 + self.k.eps[step] * (x - a * x0) / s)

    def deterministic(self, reward: Reward) -> Estimate:
        """E r when no step adds noise."""

        def integrand(z: Array) -> Array:
            x = self.prior_std * z
            for step in range(self.grid.steps):
                x = self.mean(step, x)
            return np.asarray(reward(x) * np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi))

        return adaptive_integral(integrand, -REACH, REACH)

    def stochastic(self, reward: Reward, points: int = 2000, nodes: int = 200) -> Estimate:
        """E r by the backward recursion, on this mesh and on half of it."""
        fine = self._backward(reward, points, nodes)
        change = abs(fine - self._backward(reward, points // 2, nodes // 2))
        return Estimate(fine, change + 1e-13 * abs(fine), KIND)

    def _backward(self, reward: Reward, points: int, nodes: int) -> float:
        z = np.linspace(-REACH, REACH, nodes + 1)
        w = np.exp(-0.5 * z**2)
        w /= w.sum()
        value: Callable[[Array], Array] = reward
        for step in range(self.grid.steps - 1, -1, -1):
            x, std = self._mesh(step, points), float(np.sqrt(self.k.variance[step]))
            mean = self.mean(step, x)
            u = value(mean) if std == 0.0 else value((mean[:, None] + std * z).ravel()).reshape(-1, z.size) @ w
            value = _clipped(x, u)
        x = self.prior_std * np.linspace(-REACH, REACH, 4 * points + 1)
        weight = np.exp(-0.5 * (x / self.prior_std) ** 2)
        return float(value(x) @ (weight / weight.sum()))

    def _mesh(self, step: int, points: int) -> Array:
        """Evenly spaced over everything the sampler reaches at this level but for a weight of about 1e-19."""
        a, s, parts = float(self.grid.a[step]), float(self.grid.s[step]), self.parts
        width = REACH * np.sqrt(a**2 * parts.c.max() + max(s, self.prior_std if step == 0 else 0.0) ** 2)
        low, high = a * parts.m.min(), a * parts.m.max()
        return np.linspace(min(low, 0.0) - width, max(high, 0.0) + width, points + 1)


def _clipped(x: Array, u: Array) -> Callable[[Array], Array]:
    """A spline that stays at its edge value outside the mesh, where there is no weight."""
    spline, low, high = CubicSpline(x, u), x[0], x[-1]
    return lambda at: np.asarray(spline(np.clip(at, low, high)))


def adaptive_integral(
    function: Callable[[Array], Array], low: float, high: float, tolerance: float = 1e-10, rounds: int = 40
) -> Estimate:
    """The integral by 8-point Gauss-Legendre on cells, halving those whose two halves disagree with the whole.

    All open cells are evaluated in one call; the error is the sum of the disagreements.
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
    return Estimate(total + float(whole.sum()), error + float(np.abs(whole).sum()) * bool(left.size), KIND)


def line_step_gap(
    target: GaussianMixture, grid: Levels, reward: Reward, eta: float, kernel: str
) -> tuple[Estimate, Estimate]:
    """(E r of the ODE, E r of the SDE) with N steps."""
    if grid.a.ndim > 1:
        raise EtudeError("a mixture takes one horizon at a time: pass a path whose T is a number.")
    ode = LineSampler(target, grid, 0.0, kernel).deterministic(reward)
    return ode, ode if eta == 0 else LineSampler(target, grid, eta, kernel).stochastic(reward)

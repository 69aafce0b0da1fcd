"""The gap of a mixture on the line, in continuous time and with N steps, and its error."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline
from scipy.linalg.lapack import dgtsv
from scipy.special import ndtr

from etude.errors import EtudeError
from etude.theory.arrays import NUMERICAL, Approximation, Array
from etude.theory.continuous_paths import Start
from etude.theory.reward_functions import Reward
from etude.theory.sampler_steps import SamplerSteps
from etude.theory.targets import GaussianMixture

REACH = 9.0  # the prior's tail beyond 9 deviations weighs 2e-19
EMPTY = 1e-60  # least mass of a cell: it weighs nothing and keeps quotients of masses finite
STIFFEST = 1e7  # largest conductance (a bulk cell has about 40): above, rounding outweighs masses
REFINEMENTS = (4, 2, 1)
STAGE = 1.0 - 0.5 * 2.0**0.5  # of Alexander's two-stage, second-order, L-stable method


class Components:
    """Weights, means and variances [K] of a mixture on the line."""

    def __init__(self, target: GaussianMixture):
        if target.d != 1:
            raise EtudeError(f"this mixture has {target.d} dimensions: the line's methods take one, simulate instead.")
        self.w = target.weights
        self.m = target.means[:, 0]
        self.c = np.array([part.spectrum[0] for part in target.components])

    def _logs(self, y: Array, q: float) -> tuple[Array, Array]:
        k = self.c + q
        gap = self.m - y[..., None]
        return np.log(self.w) - 0.5 * np.log(2.0 * np.pi * k) - 0.5 * gap**2 / k, gap / k

    def density(self, y: Array, q: float) -> Array:
        """Compute the density p_q at the points `y`."""
        return np.asarray(np.exp(self._logs(y, q)[0]).sum(axis=-1))

    def score(self, y: Array, q: float) -> Array:
        """Compute the score (log p_q)' at the points `y`."""
        logs, pull = self._logs(y, q)
        part = np.exp(logs - logs.max(axis=-1, keepdims=True))
        return np.asarray((part * pull).sum(axis=-1) / part.sum(axis=-1))

    def mass(self, low: Array, high: Array) -> Array:
        """Compute the mass between points in the nearer tail; far cells then keep their digits."""
        root = np.sqrt(self.c)
        a, b = ((x[..., None] - self.m) / root for x in (low, high))
        right = a > 0
        return np.asarray((self.w * (ndtr(np.where(right, -a, b)) - ndtr(np.where(right, -b, a)))).sum(axis=-1))


def line_values(
    target: GaussianMixture, start: Start, reward: Reward, etas: Array, cells: int = 1000, time_steps: int = 240
) -> list[Approximation]:
    """Compute [E r of the ODE sampler, gap at each of `etas`] in continuous time.

    The samplers' value function u(q, y) = E[r(end) | y at level q] solves
    `du/dq = (1 + eta^2)/2 (log p_q)' u' + eta^2/2 u''`. The probability flow Y_q(x), which carries
    the mass m = p_0(x) dx along unchanged, removes the drift:

        du/dq at fixed x = eta^2/2 d/dm (p_q(Y)^2 du/dm),        u(0) = r

    Finite volumes on moving cells of fixed mass solve it, with an L-stable Runge-Kutta method in
    the clock log(c + q), c the smallest variance. A cell's mass is exact, so a barrier between
    modes may have any height. Space and time are refined together and extrapolated; the error is
    three times the change of the extrapolation.
    """
    tau, clock = float(start.V + start.excess), _Clock(Components(target), float(start.V), time_steps)
    points = _labels(clock, tau, 2 * cells)
    # Y at every stage time of every refinement, by the time's share of the whole
    shares = np.unique(np.concatenate([clock.stages(stride).ravel() for stride in REFINEMENTS]))
    flow = dict(zip(shares.tolist(), clock.carry(points, at=clock.theta(shares)).T, strict=True))
    results = [_at(clock, points, flow, reward, etas, stride, tau) for stride in REFINEMENTS]
    coarse, fine = ((4.0 * b - a) / 3.0 for a, b in pairwise(results))
    # Two extrapolations may agree by chance, so a share of the last refinement stays in the error.
    error = 3.0 * np.abs(fine - coarse) + 0.02 * np.abs(results[-1] - results[-2]) + 1e-13 * np.abs(fine[0])
    return [Approximation(value, bound, NUMERICAL) for value, bound in zip(fine, error, strict=True)]


class _Clock:
    """The clock theta = log(c + q) from q = 0 to V in uniform steps, and the flow in it."""

    def __init__(self, parts: Components, V: float, steps: int):
        self.parts, self.c, self.steps = parts, float(parts.c.min()), steps
        self.low, self.high = float(np.log(self.c)), float(np.log(self.c + V))

    def q(self, theta: float) -> float:
        return max(float(np.exp(theta)) - self.c, 0.0)

    def theta(self, share: float | Array) -> Array:
        return np.asarray(np.clip(self.low + share * (self.high - self.low), self.low, self.high), dtype=np.float64)

    def stages(self, stride: int) -> Array:
        """Return each step's stage times as rounded shares of the whole, [steps / stride, 2]."""
        h = stride / self.steps
        begin = h * np.arange(self.steps // stride)
        return np.asarray(np.round(np.stack([begin + STAGE * h, begin + h], axis=1), 12), dtype=np.float64)

    def carry(self, y: Array, back: bool = False, at: Array | None = None) -> Array:
        """Integrate dY/dq = -score/2 from q = 0, or `back` to it; columns are the times `at`."""

        def speed(theta: float, z: Array) -> Array:
            return -0.5 * np.exp(theta) * self.parts.score(z, self.q(theta))

        times = (self.high, self.low) if back else (self.low, self.high)
        out = solve_ivp(speed, times, y, method="DOP853", rtol=1e-9, atol=1e-10, t_eval=at)
        return np.asarray(out.y[:, -1] if at is None else out.y)


def _labels(clock: _Clock, tau: float, count: int) -> Array:
    """Return labels x, [count + 1], even in x and in the flow's start Y_V(x) at once."""
    low, high = clock.carry(REACH * tau**0.5 * np.array([-1.0, 1.0]), back=True)
    x = np.linspace(low, high, 4001)
    y = clock.carry(x)
    monitor = (x - low) / (high - low) + (y - y[0]) / (y[-1] - y[0])
    return np.asarray(np.interp(np.linspace(0.0, monitor[-1], count + 1), monitor, x))


def _at(
    clock: _Clock, points: Array, flow: dict[float, Array], reward: Reward, etas: Array, stride: int, tau: float
) -> Array:
    """Compute [ODE value, gap at each eta] on every `stride`-th cell and time step."""
    parts, node, face = clock.parts, points[:: 2 * stride], points[stride :: 2 * stride]
    walls = np.concatenate([node[:1], face, node[-1:]])
    mass, between = (np.maximum(parts.mass(x[:-1], x[1:]), EMPTY) for x in (walls, node))
    r = reward(node)

    def conductance(share: float) -> Array:
        """Compute `exp(theta) p_q(Y_face)^2 / (mass between the neighbours)`."""
        y, theta = flow[share][stride :: 2 * stride], float(clock.theta(share))
        return np.asarray(np.exp(theta) * np.minimum(parts.density(y, clock.q(theta)) ** 2 / between, STIFFEST))

    conductances = [[conductance(float(share)) for share in pair] for pair in clock.stages(stride)]
    top = flow[1.0][:: 2 * stride]
    prior = np.exp(-0.5 * top**2 / tau) / np.sqrt(2.0 * np.pi * tau)
    weight = mass * prior / parts.density(top, clock.q(clock.high))
    h = (clock.high - clock.low) * stride / clock.steps
    gaps = [weight @ (r - _diffuse(r, conductances, mass, 0.5 * eta**2 * h)) for eta in etas]
    return np.array([weight @ r, *gaps])


def _diffuse(u: Array, conductances: list[list[Array]], mass: Array, rate: float) -> Array:
    """Take implicit steps of `mass du = rate div(conductance grad u)`."""
    if rate == 0.0:
        return u
    for first, second in conductances:
        middle = _solve(u, first, mass, STAGE * rate)
        u = _solve(u + (1.0 - STAGE) / STAGE * (middle - u), second, mass, STAGE * rate)
    return u


def _solve(u: Array, conductance: Array, mass: Array, rate: float) -> Array:
    """Solve `(mass + rate K) x = mass u`, with K the graph Laplacian of the conductances."""
    link, diagonal = rate * conductance, mass.copy()
    diagonal[:-1] += link
    diagonal[1:] += link
    *_, x, _ = dgtsv(-link, diagonal, -link, mass * u)
    return np.asarray(x)


def line_step_values(
    target: GaussianMixture, sampler: SamplerSteps, reward: Reward
) -> tuple[Approximation, Approximation]:
    """Compute (E r of the ODE, E r of the sampler) with N steps on the same levels.

    The ODE composes the steps' maps and integrates over the prior adaptively, because the map is
    nearly a step between far modes. The SDE goes backwards through
    `u_i(x) = E_z u_(i+1)(mean_i(x) + std_i z)`, with cubic splines in x and the trapezoid rule in
    z, which converges faster than any power; the error is the change when both meshes are halved.
    """
    ode = _LineSampler(target, sampler.ode()).deterministic(reward)
    if not np.any(sampler.variance > 0):
        return ode, ode
    backward = _LineSampler(target, sampler).backward
    fine = backward(reward, points=2000, nodes=200)
    change = abs(fine - backward(reward, points=1000, nodes=100))
    return ode, Approximation(fine, change + 1e-13 * abs(fine), NUMERICAL)


class _LineSampler:
    """The N-step sampler of a mixture on the line."""

    def __init__(self, target: GaussianMixture, sampler: SamplerSteps):
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

    def backward(self, reward: Reward, points: int, nodes: int) -> float:
        """Compute E r by the backward recursion."""
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
    """Integrate by 8-point Gauss-Legendre; a cell whose halves disagree with the whole is halved.

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

"""The continuous-time gap of a mixture on the line, for every eta, with its numerical error.

The samplers' value function u(q, y) = E[r(end) | y at level q] solves
`du/dq = (1 + eta^2)/2 (log p_q)' u' + eta^2/2 u''`. The probability flow Y_q(x), the ODE's own map
with end point x, removes the drift. With m = p_0(x) dx the mass, which the flow carries along
unchanged,

    du/dq at fixed x = eta^2/2 (1/p_q) d/dy (p_q du/dy) = eta^2/2 d/dm (p_q(Y)^2 du/dm),        u(0) = r,

a symmetric diffusion. Finite volumes on moving cells of fixed mass solve it, with an L-stable
Runge-Kutta method in the clock log(c + q), c the smallest variance. At eta = 0, u stays r. The mass
of a cell is exact, so the method is accurate for a barrier of any height between modes. Space and
time are refined together and extrapolated; the error is three times the change of the
extrapolation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.integrate import solve_ivp
from scipy.linalg.lapack import dgtsv
from scipy.special import ndtr

from etude.errors import EtudeError
from etude.theory.arrays import Array
from etude.theory.continuous_paths import Start
from etude.theory.reward_functions import Reward
from etude.theory.targets import GaussianMixture

REACH = 9.0  # the prior's tail beyond 9 deviations weighs 2e-19
EMPTY = 1e-60  # least mass of a cell: it weighs nothing and keeps quotients of masses finite
STIFFEST = 1e7  # largest conductance (a bulk cell has about 40): above, rounding outweighs masses
REFINEMENTS = (4, 2, 1)
STAGE = 1.0 - 0.5 * 2.0**0.5  # of Alexander's two-stage, second-order, L-stable method


@dataclass(frozen=True)
class LineValues:
    """E r of the ODE and the gap at each eta, extrapolated, with their numerical errors."""

    ode: float
    ode_error: float
    gaps: Array
    gap_errors: Array


class Components:
    """Weights, means and variances [K] of a mixture on the line."""

    def __init__(self, target: GaussianMixture):
        if target.d != 1:
            raise EtudeError(
                f"this mixture has {target.d} dimensions: the line's methods take one, use simulation instead."
            )
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
) -> LineValues:
    """Compute E r of the ODE sampler and the gap at each of `etas` [E], from N(0, V + excess)."""
    parts, V = Components(target), float(start.V)
    points = _labels(parts, V, float(V + start.excess), 2 * cells)
    clock = _Clock(parts, V, time_steps)
    flow = _flow(parts, points, clock)
    results = [_at(parts, points, flow, clock, reward, etas, stride, V + float(start.excess)) for stride in REFINEMENTS]
    coarse, fine = ((4.0 * b - a) / 3.0 for a, b in pairwise(results))
    # Two extrapolations may agree by chance, so a share of the last refinement stays in the error.
    error = 3.0 * np.abs(fine - coarse) + 0.02 * np.abs(results[-1] - results[-2]) + 1e-13 * np.abs(fine[0])
    return LineValues(float(fine[0]), float(error[0]), fine[1:], error[1:])


class _Clock:
    """The clock theta = log(c + q) from q = 0 to V, in uniform steps."""

    def __init__(self, parts: Components, V: float, steps: int):
        self.c, self.steps = float(parts.c.min()), steps
        self.low, self.high = float(np.log(self.c)), float(np.log(self.c + V))

    def q(self, theta: float) -> float:
        return max(float(np.exp(theta)) - self.c, 0.0)

    def theta(self, share: Array) -> Array:
        return np.asarray(np.clip(self.low + share * (self.high - self.low), self.low, self.high), dtype=np.float64)

    def stages(self, stride: int) -> Array:
        """Return each step's stage times as rounded shares of the whole, [steps / stride, 2]."""
        h = stride / self.steps
        begin = h * np.arange(self.steps // stride)
        return np.asarray(np.round(np.stack([begin + STAGE * h, begin + h], axis=1), 12), dtype=np.float64)


def _integrate(
    parts: Components, y: Array, clock: _Clock, times: tuple[float, float], at: Array | None = None
) -> Array:
    """Integrate dY/dq = -score/2 in the clock; columns are the times `at`. Default: the end."""
    out = solve_ivp(
        lambda theta, z: -0.5 * np.exp(theta) * parts.score(z, clock.q(theta)),
        times,
        y,
        method="DOP853",
        rtol=1e-9,
        atol=1e-10,
        t_eval=None if at is None else at,
    )
    return np.asarray(out.y[:, -1] if at is None else out.y)


def _labels(parts: Components, V: float, tau: float, count: int) -> Array:
    """Return labels x, [count + 1], even in x and in the flow's start Y_V(x) at once."""
    clock = _Clock(parts, V, 1)
    edges = REACH * tau**0.5 * np.array([-1.0, 1.0])
    low, high = _integrate(parts, edges, clock, (clock.high, clock.low))
    x = np.linspace(low, high, 4001)
    y = _integrate(parts, x, clock, (clock.low, clock.high))
    monitor = (x - low) / (high - low) + (y - y[0]) / (y[-1] - y[0])
    return np.asarray(np.interp(np.linspace(0.0, monitor[-1], count + 1), monitor, x))


def _flow(parts: Components, points: Array, clock: _Clock) -> dict[float, Array]:
    """Compute Y at every stage time of every refinement, by the time's share of the whole."""
    shares = np.unique(np.concatenate([clock.stages(stride).ravel() for stride in REFINEMENTS]))
    columns = _integrate(parts, points, clock, (clock.low, clock.high), at=clock.theta(shares))
    return dict(zip(shares.tolist(), columns.T, strict=True))


def _at(
    parts: Components,
    points: Array,
    flow: dict[float, Array],
    clock: _Clock,
    reward: Reward,
    etas: Array,
    stride: int,
    tau: float,
) -> Array:
    """Compute [ODE value, gap at each eta] on every `stride`-th cell and time step."""
    node, face = points[:: 2 * stride], points[stride :: 2 * stride]
    walls = np.concatenate([node[:1], face, node[-1:]])
    mass, between = (np.maximum(parts.mass(x[:-1], x[1:]), EMPTY) for x in (walls, node))
    r = reward(node)
    conductances = [
        [_conductance(parts, flow, clock, float(share), stride, between) for share in pair]
        for pair in clock.stages(stride)
    ]
    top = flow[1.0][:: 2 * stride]
    prior = np.exp(-0.5 * top**2 / tau) / np.sqrt(2.0 * np.pi * tau)
    weight = mass * prior / parts.density(top, clock.q(clock.high))
    h = (clock.high - clock.low) * stride / clock.steps
    gaps = [weight @ (r - _diffuse(r, conductances, mass, 0.5 * eta**2 * h)) for eta in etas]
    return np.array([weight @ r, *gaps])


def _conductance(
    parts: Components, flow: dict[float, Array], clock: _Clock, share: float, stride: int, between: Array
) -> Array:
    """Compute `exp(theta) p_q(Y_face)^2 / (mass between the neighbours)`, per unit of the clock."""
    y, theta = flow[share][stride :: 2 * stride], float(clock.theta(np.asarray(share)))
    return np.asarray(np.exp(theta) * np.minimum(parts.density(y, clock.q(theta)) ** 2 / between, STIFFEST))


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

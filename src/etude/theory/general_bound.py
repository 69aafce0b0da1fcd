"""The general bound of arXiv 2510.10767 (Theorem 4.1), with its dimension and its conditions explicit.

Synchronous coupling of the ODE Z and the SDE Y from one start, in reverse time:

    dY = [-f(Y) + (1 + eta^2)/2 g^2 score(Y)] dt + eta g dB,        dZ = [-f(Z) + 1/2 g^2 score(Z)] dt

With `<f(x) - f(y), x - y> >= m |x - y|^2`, a score of Lipschitz constant L that vanishes at 0, and
`eta^2 <u, v> <= eta^2 (|u|^2 / 4 + |v|^2)`,

    d E|Y - Z|^2 / dt <= -kappa E|Y - Z|^2 + eta^2 g^2 (L^2 A + d),        kappa = 2 m - (L + eta^2 / 4) g^2

where A bounds E|Y|^2. If kappa > 0 then for a reward of Lipschitz constant C

    |gap| <= eta C g sqrt((L^2 A + d) (1 - exp(-kappa T)) / kappa).

The theorem as published has 1 in the place of d. The condition kappa > 0 needs a forward drift that
expands, m > 0: VE has m = 0 and VP m = -beta/2, so that neither has this bound at any eta. A path
that has it is the contractive one of arXiv 2401.13115, up to a largest eta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import Array, Numbers, nonnegative, positive
from etude.theory.bounds import INFINITE, gap_bounds
from etude.theory.continuous_paths import VE, VP, ContinuousPath, Start
from etude.theory.laws import law_in_y
from etude.theory.reward_functions import QuadraticReward
from etude.theory.targets import Gaussian

LEVELS = 400


class Contractive(ContinuousPath):
    """A forward drift that expands: `f = theta`, `a = exp(theta t)`, `s^2 = g^2 (a^2 - 1) / (2 theta)`.

    Its backward samplers contract (arXiv 2401.13115). They start from N(0, s(T)^2).
    """

    def __init__(self, theta: float = 1.0, T: float = 2.0, g: float = 1.0) -> None:
        self.theta, self.g = (float(positive(x, f"Contractive's {n}")) for x, n in ((theta, "theta"), (g, "g")))
        self.T = positive(T, "Contractive's T")
        self.prior_variance = self.s(self.T) ** 2

    def a(self, t: Numbers) -> Array:
        return np.asarray(np.exp(self.theta * self.time(t)))

    def s(self, t: Numbers) -> Array:
        return np.asarray(self.g * np.sqrt(np.expm1(2 * self.theta * self.time(t)) / (2 * self.theta)))

    def start(self) -> Start:
        V = np.asarray(self.v(self.T) ** 2)
        return Start(V=V, excess=np.zeros_like(V))

    def at_level(self, v: Numbers) -> tuple[Array, Array]:
        v = nonnegative(v, "v")
        rest = 1 - 2 * self.theta * v**2 / self.g**2  # a^-2
        if np.any(rest <= 0):
            raise EtudeError(
                f"level {float(np.max(v)):g} is beyond this path's end: its v stays below g / sqrt(2 theta)."
            )
        a = rest**-0.5
        return a, v * a


def forward_equation(path: ContinuousPath, t: Numbers) -> tuple[Array, Array]:
    """Compute `f = a'/a` and `g^2 = a^2 d(s^2/a^2)/dt` of dX = f X dt + g dB at times t of VE, VP or `Contractive`."""
    t = path.time(t)
    if isinstance(path, Contractive):
        return np.full_like(t, path.theta), np.full_like(t, path.g**2)
    if isinstance(path, VP):
        return -0.5 * path.beta(t), path.beta(t)
    if not isinstance(path, VE):
        raise EtudeError(f"{type(path).__name__} has no general bound: pass VE(...), VP(...) or Contractive(...).")
    if path.sigma == "geometric":
        growth = 2.0 * np.log(path.sigma_max / path.sigma_min) / path.T
        return np.zeros_like(t), np.asarray(growth * path.sigma_min**2 * np.exp(growth * t))
    return np.zeros_like(t), 2.0 * t if path.sigma == "t" else np.ones_like(t)


@dataclass(frozen=True)
class Dissipative:
    """Constants of the bound."""

    m: float  # dissipativity of the forward drift; 0 or less where it does not expand
    g: float  # largest diffusion
    L: float  # largest Lipschitz constant of the score
    A: float  # largest second moment of the SDE's states
    T: float
    d: int

    @classmethod
    def of(cls, target: Gaussian, path: ContinuousPath, eta: float) -> Dissipative:
        """Compute the constants of a Gaussian target, in coordinates centred at the mean of the path."""
        t = np.linspace(0.0, float(path.T), LEVELS)
        a, s, (drift, diffusion) = path.a(t), path.s(t), forward_equation(path, t)
        with np.errstate(divide="ignore"):  # a target without variance has no score at the data
            score = 1 / (a**2 * target.spectrum.min() + s**2)
        law = law_in_y(target, path.start(), eta, (s / a) ** 2)
        moment = a**2 * (((law.mu - target.mu) ** 2).sum(-1) + law.spectrum.sum(-1))
        g, L, A = (float(values.max()) for values in (diffusion**0.5, score, moment))
        return cls(float(drift.min()), g, L, A, float(path.T), target.d)

    def kappa(self, eta: float) -> float:
        """Compute the rate of contraction that is left at an eta."""
        return 2 * self.m - (self.L + eta**2 / 4) * self.g**2

    @property
    def largest_eta(self) -> float:
        """Eta up to which the bound exists, `2 sqrt(2 m / g^2 - L)`; 0 if there is none."""
        return 2 * max(0.0, 2 * self.m / self.g**2 - self.L) ** 0.5


def general_bound(k: Dissipative, lipschitz: float, eta: float, noise: float | None = None) -> float:
    """Compute the bound of a reward of Lipschitz constant `lipschitz`; infinite where `kappa <= 0`.

    `noise` stands in the place of d: 1 is the theorem as published.
    """
    kappa = k.kappa(eta)
    if kappa <= 0:
        return INFINITE if eta > 0 else 0.0
    spread = k.L**2 * k.A + (k.d if noise is None else noise)
    return float(eta * lipschitz * k.g * (spread * -np.expm1(-kappa * k.T) / kappa) ** 0.5)


def general_bound_rows(target: Gaussian, etas: list[float]) -> list[dict[str, Any]]:
    """Compute the bound for a linear reward of slope 1, beside the gap and the best of `gap_bounds`.

    The slope points along the target's mean, or the first axis at mean 0. The contractive paths are
    scaled to c, the least variance of the target, so that they have the bound at small eta.
    """
    axis = np.eye(target.d)[0] if not target.mu.any() else target.mu / np.linalg.norm(target.mu)
    reward = QuadraticReward(0.0, linear=axis if target.d > 1 else float(axis[0]))
    narrow = float(target.spectrum.min())
    paths: dict[str, ContinuousPath] = {"VE, T = 4": VE(T=4.0, sigma="sqrt"), "VP, T = 4": VP(T=4.0)}
    if narrow > 0:
        paths |= {f"contractive, theta = {n} / c": Contractive(n / narrow, 2 * narrow / n) for n in (1, 2)}
    rows = []
    for name, path in paths.items():
        for eta in (eta for eta in etas if eta > 0):
            k, found = Dissipative.of(target, path, eta), gap_bounds(target, path, reward, eta)
            row: dict[str, Any] = {"path": name, "eta": eta, "largest_eta": k.largest_eta, "gap": abs(found.gap)}
            row |= {"published": general_bound(k, 1.0, eta, 1.0), "bound": general_bound(k, 1.0, eta)}
            rows.append(row | {"ours": found.best})
    return rows

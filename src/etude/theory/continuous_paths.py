"""Gaussian paths in continuous time, `x_t = a(t) x0 + s(t) eps`: VP, VE and rectified flow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
from scipy.integrate import quad_vec

from etude.errors import EtudeError, unknown
from etude.theory.arrays import Array, Numbers, array, nonnegative, positive, require


@dataclass(frozen=True)
class Start:
    """Start of a sampler in `y = x/a`: `V = (s/a)^2`, and `excess = tau - V` in closed form."""

    V: Array
    excess: Array


class ContinuousPath(ABC):
    """A Gaussian path on [0, T], started from N(0, prior_variance I) at t = T.

    In `y = x/a` and `q = (s/a)^2` every backward sampler of the eta-family is the same equation,

        dy = (1 + eta^2)/2 grad log p_q(y) |dq| + eta sqrt(|dq|) dW,   y_V ~ N(0, tau I),

    so a path enters the theory only through its `start` and the level where it stops. `T` may be an
    array: every method then broadcasts, and so does everything computed from the path.
    """

    T: Array
    prior_variance: Array

    @abstractmethod
    def a(self, t: Numbers) -> Array:
        """Signal scale a(t)."""

    @abstractmethod
    def s(self, t: Numbers) -> Array:
        """Noise scale s(t)."""

    @abstractmethod
    def start(self) -> Start:
        """Return V and its excess at t = T."""

    @abstractmethod
    def at_level(self, v: Numbers) -> tuple[Array, Array]:
        """Return (a, s) at the noise-to-signal ratio v = s/a."""

    def v(self, t: Numbers) -> Array:
        """Noise-to-signal ratio s(t)/a(t); infinite where a(t) = 0."""
        with np.errstate(divide="ignore"):
            return self.s(t) / self.a(t)

    def time(self, t: Numbers) -> Array:
        """Convert `t` to an array of times on the path; an error quotes a time that is not."""
        return require(t, "t", lambda x: x >= 0, "zero or more")


class VE(ContinuousPath):
    """Variance exploding: `a = 1`, `s = sigma(t)`, started from N(0, sigma(T)^2).

    sigma="t"          sigma(t) = t                                   (EDM, arXiv 2206.00364)
    sigma="sqrt"       sigma(t) = sqrt(t)                             (Brownian motion)
    sigma="geometric"  sigma(t)^2 = m^2 [(M/m)^(2t/T) - 1]            (arXiv 2011.13456, eq. 30)

    with m = sigma_min and M = sigma_max, which only "geometric" reads. Default of `sigma_max`: T.
    """

    shapes: ClassVar[tuple[str, ...]] = ("t", "sqrt", "geometric")

    def __init__(self, T: Numbers = 10.0, sigma: str = "t", sigma_min: float = 0.01, sigma_max: Numbers | None = None):
        if sigma not in self.shapes:
            raise unknown("VE noise scale sigma", str(sigma), self.shapes)
        self.T = positive(T, "VE's T")
        self.sigma = sigma
        self.sigma_min = positive(sigma_min, "VE's sigma_min")
        self.sigma_max = positive(self.T if sigma_max is None else sigma_max, "VE's sigma_max")
        if sigma == "geometric" and np.any(self.sigma_max <= self.sigma_min):
            raise EtudeError(
                f"VE's sigma_max is {self.sigma_max.min():g}, but a geometric scale needs it above sigma_min = "
                f"{float(self.sigma_min):g}: raise sigma_max (it defaults to T)."
            )
        self.prior_variance = self.s(self.T) ** 2

    def __repr__(self) -> str:
        return f"VE(T={_show(self.T)}, sigma={self.sigma!r})"

    def a(self, t: Numbers) -> Array:
        return np.ones_like(self.time(t))

    def s(self, t: Numbers) -> Array:
        t = self.time(t)
        if self.sigma == "t":
            return t
        if self.sigma == "sqrt":
            return np.sqrt(t)
        growth = 2.0 * np.log(self.sigma_max / self.sigma_min) / self.T
        return np.asarray(self.sigma_min * np.sqrt(np.expm1(growth * t)))

    def start(self) -> Start:
        V = self.prior_variance
        return Start(V=V, excess=np.zeros_like(V))

    def at_level(self, v: Numbers) -> tuple[Array, Array]:
        v = nonnegative(v, "v")
        return np.ones_like(v), v


class VP(ContinuousPath):
    """Variance preserving: `a = exp(-B/2)`, `s = sqrt(1 - exp(-B))`, started from N(0, 1).

    `B(t) = int_0^t beta`, with beta in one of these forms:

    VP(beta=1.0, T=4.0)                       constant beta
    VP(beta_min=0.1, beta_max=12.0, T=1.0)    linear in t on [0, T] (arXiv 2011.13456)
    VP(beta=function, T=1.0)                  any beta(t) >= 0, integrated numerically to 1e-12
    VP.discrete(alphas_cumprod)               a trained table [K]; t = k/K is entry k - 1
    VP.stable_diffusion(), VP.ddpm()          the tables of SD1.x/SDXL and of DDPM, 1000 levels
    """

    def __init__(
        self,
        beta: float | Callable[[Array], Array] | None = None,
        T: Numbers = 1.0,
        *,
        beta_min: float | None = None,
        beta_max: float | None = None,
    ):
        linear = (beta_min is not None, beta_max is not None)
        if any(linear) and (beta is not None or not all(linear)):
            raise EtudeError("VP takes either beta, or both beta_min and beta_max: pass one of the two forms.")
        self.T = positive(T, "VP's T")
        self.prior_variance = np.ones_like(self.T)
        self.kind = "linear" if any(linear) else "function" if callable(beta) else "constant"
        self._beta = beta if callable(beta) else None
        if any(linear):
            self.beta_min, self.beta_max = (
                nonnegative(beta_min, "VP's beta_min"),
                nonnegative(beta_max, "VP's beta_max"),
            )
        elif self._beta is None:
            self.beta_min = self.beta_max = nonnegative(1.0 if beta is None else beta, "VP's beta")
        if self._beta is None and np.any(self.beta_min + self.beta_max <= 0):
            raise EtudeError("VP's beta is 0 everywhere, so no noise is ever added: make it positive.")
        self._knots: tuple[Array, Array] | None = None
        self.alphas_cumprod: Array | None = None

    @classmethod
    def discrete(cls, alphas_cumprod: Numbers, label: str = "discrete") -> VP:
        """Make a table's path, T = 1: `B(k/K) = -log alphas_cumprod[k-1]`, linear in between."""
        table = array(alphas_cumprod, "alphas_cumprod")
        if table.ndim != 1 or not np.all((table > 0) & (table < 1)) or not np.all(np.diff(table) < 0):
            raise EtudeError("alphas_cumprod must be one decreasing list of numbers between 0 and 1: check the table.")
        path = cls(beta=1.0, T=1.0)
        path.kind, path.alphas_cumprod = label, table
        path._knots = (np.linspace(0.0, 1.0, table.size + 1), -np.log(np.concatenate([[1.0], table])))
        return path

    @classmethod
    def stable_diffusion(cls) -> VP:
        """Make the path of SD1.x, SD2.x, SDXL: sqrt(beta) from sqrt(0.00085) to sqrt(0.012)."""
        beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        return cls.discrete(np.cumprod(1.0 - beta), label="sd")

    @classmethod
    def ddpm(cls) -> VP:
        """Make the path of DDPM (arXiv 2006.11239): beta linear from 1e-4 to 0.02, 1000 levels."""
        return cls.discrete(np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000)), label="ddpm")

    def __repr__(self) -> str:
        if self._knots is not None:
            return f"VP.{self.kind}"
        if self.kind == "linear":
            return f"VP(beta_min={_show(self.beta_min)}, beta_max={_show(self.beta_max)}, T={_show(self.T)})"
        return f"VP(beta={'function' if self._beta else _show(self.beta_min)}, T={_show(self.T)})"

    def beta(self, t: Numbers) -> Array:
        """Return the rate beta(t) = dB/dt."""
        t = self.time(t)
        if self._knots is not None:
            knots, B = self._knots
            cell = np.clip(np.searchsorted(knots, t, side="right") - 1, 0, knots.size - 2)
            return np.asarray((B[cell + 1] - B[cell]) / (knots[cell + 1] - knots[cell]))
        if self._beta is not None:
            return nonnegative(self._beta(t), "VP's beta(t)")
        return np.asarray(self.beta_min + (self.beta_max - self.beta_min) * t / self.T)

    def integral(self, t: Numbers) -> Array:
        """Integrate beta from 0 to t."""
        t = self.time(t)
        if self._knots is not None:
            return np.interp(t, *self._knots)
        if self._beta is not None:  # t int_0^1 beta(t u) du, for every entry of t at once
            value, _ = quad_vec(lambda u: self.beta(t * u) * t, 0.0, 1.0, epsabs=1e-13, epsrel=1e-12)
            return np.asarray(value, dtype=np.float64)
        return np.asarray(self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2 / self.T)

    @cached_property
    def total(self) -> Array:
        """Integral of beta over [0, T]; the continuous-time laws depend on it alone."""
        return self.integral(self.T)

    def a(self, t: Numbers) -> Array:
        return np.asarray(np.exp(-0.5 * self.integral(t)))

    def s(self, t: Numbers) -> Array:
        return np.asarray(np.sqrt(-np.expm1(-self.integral(t))))

    def start(self) -> Start:
        return Start(V=np.expm1(self.total), excess=np.ones_like(self.total))

    def at_level(self, v: Numbers) -> tuple[Array, Array]:
        v = nonnegative(v, "v")
        a = 1.0 / np.sqrt(1.0 + v**2)
        return a, v * a


class RectifiedFlow(ContinuousPath):
    """Rectified flow: `a = 1 - sigma`, `s = sigma`, started at sigma = 1 - delta from N(0, 1).

    delta = 0 starts from pure noise, where the prior is exact. `shift` is the time change of SD3
    (arXiv 2403.03206), sigma(t) = shift t / (1 + (shift - 1) t); it moves the steps of a sampler.
    """

    def __init__(self, delta: Numbers = 0.02, shift: float = 1.0):
        self.delta = require(delta, "RectifiedFlow's delta", lambda x: (x >= 0) & (x < 1), "at least 0 and below 1")
        self.prior_variance = np.ones_like(self.delta)
        self.shift = float(positive(shift, "RectifiedFlow's shift"))
        top = 1.0 - self.delta
        self.T = np.asarray(top / (self.shift - (self.shift - 1.0) * top))

    def __repr__(self) -> str:
        return f"RectifiedFlow(delta={_show(self.delta)}, shift={self.shift:g})"

    def time(self, t: Numbers) -> Array:
        return require(t, "t", lambda x: (x >= 0) & (x <= 1), "between 0 and 1 on a rectified flow")

    def a(self, t: Numbers) -> Array:
        t = self.time(t)
        return np.asarray((1.0 - t) / (1.0 + (self.shift - 1.0) * t))

    def s(self, t: Numbers) -> Array:
        t = self.time(t)
        return np.asarray(self.shift * t / (1.0 + (self.shift - 1.0) * t))

    def start(self) -> Start:
        with np.errstate(divide="ignore"):
            V, excess = ((1.0 - self.delta) / self.delta) ** 2, 2.0 / self.delta - 1.0
        return Start(V=np.asarray(V), excess=np.asarray(excess))

    def at_level(self, v: Numbers) -> tuple[Array, Array]:
        v = nonnegative(v, "v")
        return 1.0 / (1.0 + v), v / (1.0 + v)


PATHS_BY_NAME: dict[str, Callable[[], ContinuousPath]] = {
    "sd": cache(VP.stable_diffusion),
    "ddpm": cache(VP.ddpm),
    "flow": cache(lambda: RectifiedFlow(delta=0.0)),
}


def is_path(schedule: Any) -> bool:
    """Return whether the schedule is a path or its name, which has a limit in continuous time."""
    return isinstance(schedule, (str, ContinuousPath))


def as_path(path: Any) -> ContinuousPath:
    """Return a path, or the one of a name ("flow" is rectified flow from pure noise)."""
    if isinstance(path, ContinuousPath):
        return path
    if not isinstance(path, str):
        raise EtudeError(
            f"{type(path).__name__} is not a path: pass VP(...), VE(...), RectifiedFlow(...) or one of "
            f"{', '.join(sorted(PATHS_BY_NAME))}."
        )
    if path not in PATHS_BY_NAME:
        raise unknown("schedule", path, PATHS_BY_NAME)
    return PATHS_BY_NAME[path]()


def _show(value: Array) -> str:
    return f"{float(value):g}" if value.ndim == 0 else f"<{value.size} values>"

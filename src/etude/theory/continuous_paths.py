"""Gaussian paths in continuous time, `x_t = a(t) x0 + s(t) eps`: VP, VE and rectified flow.

The forward equation is `dX = f X dt + g dB` with `f = a'/a` and `g^2 = a^2 d(s^2/a^2)/dt`. In the
variables `y = x/a` and `q = (s/a)^2` every backward sampler of the eta-family is the same equation,

    dy = (1 + eta^2)/2 grad log p_q(y) |dq| + eta sqrt(|dq|) dW,   q from V down to q0,   y_V ~ N(0, tau I).

A path therefore enters the theory only through `V = (s(T)/a(T))^2`, `tau = prior variance / a(T)^2`
and the level where it stops. Each path has `excess = tau - V` in closed form, because the
subtraction would lose every digit for long paths.

`T` may be an array: every method then broadcasts, and so does everything computed from the path.
"""

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
    """Start of a sampler in `y = x/a`: `V = (s/a)^2`, `excess = tau - V`, and the scale `a`."""

    V: Array
    excess: Array
    a: Array


class ContinuousPath(ABC):
    """A Gaussian path on [0, T], started from N(0, prior_variance I) at t = T."""

    name: ClassVar[str]
    T: Array

    @abstractmethod
    def a(self, t: Numbers) -> Array:
        """Signal scale a(t)."""

    @abstractmethod
    def s(self, t: Numbers) -> Array:
        """Noise scale s(t)."""

    @abstractmethod
    def f(self, t: Numbers) -> Array:
        """Drift `f = a'/a` of the forward equation dX = f X dt + g dB."""

    @abstractmethod
    def g2(self, t: Numbers) -> Array:
        """Squared diffusion `g^2 = a^2 d(s^2/a^2)/dt` of the forward equation."""

    @property
    @abstractmethod
    def prior_variance(self) -> Array:
        """Variance of each coordinate of the prior, the law that the sampler starts from."""

    @abstractmethod
    def start(self) -> Start:
        """Return V, excess and a at t = T."""

    @abstractmethod
    def at_level(self, v: Numbers) -> tuple[Array, Array]:
        """Return (a, s) at the noise-to-signal ratio v = s/a."""

    def v(self, t: Numbers) -> Array:
        """Noise-to-signal ratio s(t)/a(t); infinite where a(t) = 0."""
        with np.errstate(divide="ignore"):
            return self.s(t) / self.a(t)

    @property
    def end(self) -> Array:
        """Time that the sampler starts from."""
        return self.T

    def time(self, t: Numbers) -> Array:
        """Convert `t` to an array of times on the path; an error quotes a time that is not."""
        return require(t, "t", lambda x: x >= 0, "zero or more")


class VE(ContinuousPath):
    """Variance exploding: `a = 1`, `s = sigma(t)`, started from N(0, sigma(T)^2).

    sigma="t"          sigma(t) = t                                   (EDM, arXiv 2206.00364)
    sigma="sqrt"       sigma(t) = sqrt(t)                             (Brownian motion)
    sigma="geometric"  sigma(t)^2 = m^2 [(M/m)^(2t/T) - 1]            (arXiv 2011.13456, eq. 30)

    with m = sigma_min and M = sigma_max. Only "geometric" reads them. Default of `sigma_max`: T, so
    that `VE(T, "t")` and `VE(T, "geometric")` end near the same noise level.
    """

    name = "ve"
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

    def __repr__(self) -> str:
        return f"VE(T={_show(self.T)}, sigma={self.sigma!r})"

    @property
    def _growth(self) -> Array:
        return np.asarray(2.0 * np.log(self.sigma_max / self.sigma_min) / self.T)

    def a(self, t: Numbers) -> Array:
        return np.ones_like(self.time(t))

    def s(self, t: Numbers) -> Array:
        t = self.time(t)
        if self.sigma == "t":
            return t
        if self.sigma == "sqrt":
            return np.sqrt(t)
        return np.asarray(self.sigma_min * np.sqrt(np.expm1(self._growth * t)))

    def f(self, t: Numbers) -> Array:
        return np.zeros_like(self.time(t))

    def g2(self, t: Numbers) -> Array:
        t = self.time(t)
        if self.sigma == "t":
            return 2.0 * t
        if self.sigma == "sqrt":
            return np.ones_like(t)
        return np.asarray(self.sigma_min**2 * self._growth * np.exp(self._growth * t))

    @property
    def prior_variance(self) -> Array:
        return self.s(self.T) ** 2

    def start(self) -> Start:
        V = self.prior_variance
        return Start(V=V, excess=np.zeros_like(V), a=np.ones_like(V))

    def at_level(self, v: Numbers) -> tuple[Array, Array]:
        v = nonnegative(v, "v")
        return np.ones_like(v), v


class VP(ContinuousPath):
    """Variance preserving: `a = exp(-B/2)`, `s = sqrt(1 - exp(-B))`, started from N(0, 1).

    `B(t) = int_0^t beta`, with beta in one of these forms:

    VP(beta=1.0, T=4.0)                       constant beta
    VP(beta_min=0.1, beta_max=12.0, T=1.0)    linear from beta_min at t = 0 to beta_max at t = T
                                              (arXiv 2011.13456)
    VP(beta=function, T=1.0)                  any beta(t) >= 0, integrated numerically to 1e-12
    VP.discrete(alphas_cumprod)               a trained table, B linear in between;
                                              t = k/K is entry k - 1
    VP.stable_diffusion(), VP.ddpm()          the tables of SD1.x/SDXL and of DDPM (linear),
                                              1000 levels
    """

    name = "vp"

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
        self.kind = "linear" if any(linear) else "function" if callable(beta) else "constant"
        self._beta = beta if callable(beta) else None
        constant = 1.0 if beta is None else beta
        lo, hi = (beta_min, beta_max) if any(linear) else (constant, constant)
        if self._beta is None:
            self.beta_min = nonnegative(lo, "VP's beta_min" if any(linear) else "VP's beta")
            self.beta_max = nonnegative(hi, "VP's beta_max" if any(linear) else "VP's beta")
            if np.any(self.beta_min + self.beta_max <= 0):
                raise EtudeError("VP's beta is 0 everywhere, so no noise is ever added: make it positive.")
        self._knots: tuple[Array, Array] | None = None
        self.alphas_cumprod: Array | None = None

    @classmethod
    def discrete(cls, alphas_cumprod: Numbers, label: str = "discrete") -> VP:
        """Make the path of a trained table [K], with T = 1.

        `B(k/K) = -log alphas_cumprod[k-1]` for k = 1..K, and linear in between.
        """
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
        if self._beta is not None:
            return self._quadrature(t)
        return np.asarray(self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2 / self.T)

    def _quadrature(self, t: Array) -> Array:
        """Compute int_0^t beta = t int_0^1 beta(t u) du for every entry of t at once."""
        value, _ = quad_vec(lambda u: self.beta(t * u) * t, 0.0, 1.0, epsabs=1e-13, epsrel=1e-12)
        return np.asarray(value, dtype=np.float64)

    @cached_property
    def total(self) -> Array:
        """Integral of beta over [0, T]; a continuous-time law of VP depends on it alone."""
        return self.integral(self.T)

    def a(self, t: Numbers) -> Array:
        return np.asarray(np.exp(-0.5 * self.integral(t)))

    def s(self, t: Numbers) -> Array:
        return np.asarray(np.sqrt(-np.expm1(-self.integral(t))))

    def f(self, t: Numbers) -> Array:
        return -0.5 * self.beta(t)

    def g2(self, t: Numbers) -> Array:
        return self.beta(t)

    @property
    def prior_variance(self) -> Array:
        return np.ones_like(self.T)

    def start(self) -> Start:
        return Start(V=np.expm1(self.total), excess=np.ones_like(self.total), a=np.exp(-0.5 * self.total))

    def at_level(self, v: Numbers) -> tuple[Array, Array]:
        v = nonnegative(v, "v")
        a = 1.0 / np.sqrt(1.0 + v**2)
        return a, v * a


class RectifiedFlow(ContinuousPath):
    """Rectified flow: `a = 1 - sigma`, `s = sigma`, started at sigma = 1 - delta from N(0, 1).

    delta = 0 starts from pure noise, where the prior is exact. `shift` is the time change of SD3
    (arXiv 2403.03206), sigma(t) = shift t / (1 + (shift - 1) t). It moves the steps of a sampler
    and leaves the continuous-time law as it is.
    """

    name = "flow"

    def __init__(self, delta: Numbers = 0.02, shift: float = 1.0):
        self.delta = require(delta, "RectifiedFlow's delta", lambda x: (x >= 0) & (x < 1), "at least 0 and below 1")
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

    def _speed(self, t: Array) -> Array:
        return np.asarray(self.shift / (1.0 + (self.shift - 1.0) * t) ** 2)

    def f(self, t: Numbers) -> Array:
        return -self._speed(self.time(t)) / self.a(t)

    def g2(self, t: Numbers) -> Array:
        return 2.0 * self.s(t) * self._speed(self.time(t)) / self.a(t)

    @property
    def prior_variance(self) -> Array:
        return np.ones_like(self.delta)

    def start(self) -> Start:
        with np.errstate(divide="ignore"):
            V = ((1.0 - self.delta) / self.delta) ** 2
            excess = 2.0 / self.delta - 1.0
        return Start(V=np.asarray(V), excess=np.asarray(excess), a=np.asarray(self.delta))

    def at_level(self, v: Numbers) -> tuple[Array, Array]:
        v = nonnegative(v, "v")
        return 1.0 / (1.0 + v), v / (1.0 + v)


PATHS_BY_NAME: dict[str, Callable[[], ContinuousPath]] = {
    "sd": cache(VP.stable_diffusion),
    "ddpm": cache(VP.ddpm),
    "flow": cache(lambda: RectifiedFlow(delta=0.0)),
}


def as_path(path: Any) -> ContinuousPath:
    """Return a path, or the one of a name ("flow" is rectified flow from pure noise)."""
    if isinstance(path, ContinuousPath):
        return path
    if isinstance(path, str):
        if path not in PATHS_BY_NAME:
            raise unknown("schedule", path, PATHS_BY_NAME)
        return PATHS_BY_NAME[path]()
    raise EtudeError(
        f"{type(path).__name__} is not a path: pass VP(...), VE(...), RectifiedFlow(...) or one of "
        f"{', '.join(sorted(PATHS_BY_NAME))}."
    )


def _show(value: Array) -> str:
    return f"{float(value):g}" if value.ndim == 0 else f"<{value.size} values>"

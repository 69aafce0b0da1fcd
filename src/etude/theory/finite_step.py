"""The exact law of an N-step sampler of a Gaussian target, for the kernels gDDIM, DDIM-eta and Euler-Maruyama.

A kernel is linear in the two predictions, `x_u = c0 x0_hat + c1 eps_hat + std z`, and for a Gaussian target N(m, C) so are
the predictions in x_t: `x0_hat = m + G (x_t - a m)` with `G = a c / (a^2 c + s^2)`, `eps_hat = s (x_t - a m) / (a^2 c + s^2)`.
Each eigen-direction is then a scalar recursion

    A = (c0 a c + c1 s) / (a^2 c + s^2),     E x_u = c0 m + A (E x_t - a m),     Var x_u = A^2 Var x_t + std^2,

exact at every step size and at a = 0.

    gDDIM            c0 = a_u   c1 = s_u rho                 std^2 = s_u^2 (1 - rho^2),  rho = (v_u/v_t)^(eta^2), v = s/a
    DDIM-eta         c0 = a_u   c1 = sqrt(s_u^2 - std^2)     std^2 = eta^2 s_u^2 (1 - (v_u/v_t)^2)      (arXiv 2010.02502)
    Euler-Maruyama   c0 = a_u   c1 = a_u (v_t - (1 + eta^2)(v_t - v_u))   std^2 = a_u^2 eta^2 (v_t^2 - v_u^2)

gDDIM (arXiv 2206.05564) is the exact integrator of the eta-family with x0_hat frozen over the step. Euler-Maruyama in the
noise level v freezes eps_hat instead: the same at eta = 0, over-dispersed otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.errors import EtudeError, unknown
from etude.theory.arrays import Array, Numbers, array, nonnegative, number
from etude.theory.levels import Levels, levels
from etude.theory.targets import Gaussian
from etude.theory.terminal_law import gaussian

KERNELS = ("gddim", "ddim", "euler-maruyama")


@dataclass(frozen=True)
class ScoreError:
    """What a trained network gets wrong, in units of its noise prediction.

    `eps_hat = (1 + gain) eps + bias + white xi`: a constant bias (a number or [d]), a gain (positive = over-confident
    score, as with guidance), and an error of standard deviation `white`, independent at every step.
    """

    bias: Numbers = 0.0
    gain: float = 0.0
    white: float = 0.0

    def __post_init__(self) -> None:
        shape = array(self.bias, "the score error's bias").shape
        if len(shape) > 1:
            raise EtudeError(f"the score error's bias has shape {shape}: pass a number or [d].")
        number(self.gain, "the score error's gain")
        nonnegative(number(self.white, "the score error's white part"), "the score error's white part")

    def __bool__(self) -> bool:
        return bool(np.any(np.asarray(self.bias) != 0) or self.gain != 0 or self.white != 0)

    def bias_in(self, d: int) -> Array:
        """The bias in d dimensions, [d]."""
        bias = array(self.bias, "the score error's bias")
        if bias.size not in (1, d):
            raise EtudeError(
                f"the score error's bias has {bias.size} entries but the law has {d} dimensions: pass a number or {d} of them."
            )
        return np.broadcast_to(bias, (d,))


def as_score_error(value: Any) -> ScoreError:
    """None as no error."""
    if value is None:
        return ScoreError()
    if not isinstance(value, ScoreError):
        raise EtudeError(
            f"score_error must be a ScoreError, got {type(value).__name__}: pass ScoreError(bias=..., gain=...)."
        )
    return value


@dataclass(frozen=True)
class Coefficients:
    """`x_u = x0 x0_hat + eps eps_hat + sqrt(variance) z` at every step: arrays [N, ...], trailing axes of eta and the grid."""

    x0: Array
    eps: Array
    variance: Array


def coefficients(grid: Levels, eta: Numbers, kernel: str = "gddim") -> Coefficients:
    """The kernel's coefficients on every step of the grid."""
    if kernel not in KERNELS:
        raise unknown("kernel", str(kernel), KERNELS)
    eta = nonnegative(eta, "eta")
    a, s = (x.reshape((x.shape[0],) + (1,) * max(0, eta.ndim - (x.ndim - 1)) + x.shape[1:]) for x in (grid.a, grid.s))
    a_t, s_t, a_u, s_u = a[:-1], s[:-1], a[1:], s[1:]
    theta = np.asarray(s_u * a_t / (s_t * a_u))
    x0 = np.broadcast_to(a_u, np.broadcast_shapes(a_u.shape, eta.shape))
    if kernel == "gddim":
        eps, variance = _gddim(s_u, theta, eta)
    elif kernel == "ddim":
        eps, variance = _ddim(s_u, theta, eta)
    else:
        eps, variance = _euler_maruyama(a_t, s_t, a_u, theta, eta)
    return Coefficients(*np.broadcast_arrays(x0, eps, variance))


def _gddim(s_u: Array, theta: Array, eta: Array) -> tuple[Array, Array]:
    with np.errstate(divide="ignore", invalid="ignore"):
        log_rho = np.where(eta > 0, eta**2 * np.log(theta), 0.0)
    return s_u * np.exp(log_rho), -(s_u**2) * np.expm1(2.0 * log_rho)


def largest_ddim_eta(grid: Levels) -> float:
    """The largest eta for which DDIM exists on every step of the grid; infinite for one step to the data."""
    return _largest(grid.s[1:], np.asarray(grid.s[1:] * grid.a[:-1] / (grid.s[:-1] * grid.a[1:])))


def _largest(s_u: Array, theta: Array) -> float:
    steepest = float(np.max(np.where(s_u > 0, 1.0 - theta**2, 0.0)))
    return steepest**-0.5 if steepest > 0 else float("inf")


def _ddim(s_u: Array, theta: Array, eta: Array) -> tuple[Array, Array]:
    share = eta**2 * (1.0 - theta**2)
    if np.any((share > 1.0 + 1e-12) & (s_u > 0)):
        raise EtudeError(
            f"DDIM takes the root of a negative number at eta = {float(np.max(eta)):g} on this grid: use an eta of at most "
            f"{_largest(s_u, theta):.4f}, or the kernel 'gddim', which takes any eta."
        )
    share = np.minimum(share, 1.0)
    return s_u * np.sqrt(1.0 - share), s_u**2 * share


def _euler_maruyama(a_t: Array, s_t: Array, a_u: Array, theta: Array, eta: Array) -> tuple[Array, Array]:
    if np.any(a_t == 0):
        raise EtudeError(
            "Euler-Maruyama cannot step from a = 0 (infinite noise level): start the grid at an a above 0."
        )
    v_t = s_t / a_t
    return a_u * v_t * (1.0 - (1.0 + eta**2) * (1.0 - theta)), (a_u * eta * v_t) ** 2 * (1.0 - theta**2)


def finite_step_law(
    target: Gaussian,
    schedule: Any,
    eta: Numbers,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: str = "gddim",
    *,
    start: str = "prior",
    score_error: ScoreError | None = None,
    prior_variance: Numbers | None = None,
) -> Gaussian:
    """The exact law of the sampler's last state, in x units: a `Gaussian`, a batch of them where eta (or T) is an array.

    `schedule`, `steps`, `spacing`, `prior_variance` as in `levels`; `kernel` one of KERNELS; `start="exact"` starts from the
    law of x_T itself instead of from the prior. Raises EtudeError for a target that is not one Gaussian, a DDIM eta without
    a real root (naming the largest that has one), and a score error on a grid that starts at a = 0.
    """
    target = gaussian(target, "finite_step_law")
    return _law(target, levels(schedule, steps, spacing, prior_variance), eta, kernel, start, score_error)


def transfer(
    target: Gaussian, grid: Levels, eta: Numbers, kernel: str = "gddim", score_error: ScoreError | None = None
) -> tuple[Array, Array, Array]:
    """(A, shift, noise) of every step in the eigenbasis, each [N, ..., d].

    `e <- A e + shift`, `Var <- A^2 Var + noise` for the deviation `e = x - a m` of a step's state from the path's mean.
    """
    k = coefficients(grid, eta, kernel)
    x0, eps, noise = (x[..., None] for x in (k.x0, k.eps, k.variance))
    extra = (1,) * (x0.ndim - 1 - grid.a.ndim)
    a, s = (x[:-1].reshape((x.shape[0] - 1, *extra, *x.shape[1:], 1)) for x in (grid.a, grid.s))
    spread = a**2 * target.spectrum + s**2
    A = (x0 * a * target.spectrum + eps * s) / spread
    score_error = as_score_error(score_error)
    if not score_error:
        return A, np.zeros_like(A), np.broadcast_to(noise, A.shape)
    if np.any(a == 0):
        raise EtudeError(
            "a noise-prediction error is not defined at a = 0, where x0_hat = (x - s eps_hat)/a: start above it."
        )
    lever = eps - x0 * s / a
    bias = target.to_eigen(score_error.bias_in(target.d))
    return (
        A + lever * score_error.gain * s / spread,
        np.broadcast_to(lever * bias, A.shape),
        np.broadcast_to(noise + (lever * score_error.white) ** 2, A.shape),
    )


def _law(
    target: Gaussian, grid: Levels, eta: Numbers, kernel: str, start: str, score_error: ScoreError | None
) -> Gaussian:
    if start not in ("prior", "exact"):
        raise unknown("start", str(start), ("prior", "exact"))
    A, shift, noise = transfer(target, grid, eta, kernel, score_error)
    m = target.to_eigen(target.mu)
    a, s = grid.a[0][..., None], grid.s[0][..., None]
    if start == "prior":
        error, variance = -a * m, np.asarray(grid.prior_variance)[..., None]
    else:
        error, variance = np.zeros_like(m), a**2 * target.spectrum + s**2
    squared = A * A
    for i in range(grid.steps):
        error, variance = A[i] * error + shift[i], squared[i] * variance + noise[i]
    mean = grid.a[-1][..., None] * target.mu + target.from_eigen(error)
    return Gaussian.from_spectrum(mean, variance, target)

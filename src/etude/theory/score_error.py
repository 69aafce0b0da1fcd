"""Errors of the score, and the continuous-time laws of a Gaussian target under them.

With `eps_hat = (1 + gain) eps + bias`, in an eigen-direction c and with kappa = 1 + eta^2,
`2K = kappa (1 + gain)`, x = c/(c + V) and U = asinh(sqrt(V/c)):

    E y   = m (1 - x^K) - kappa sqrt(c) bias int_0^U cosh(u)^(1 - 2K) du
    Var y = x^(2K) tau + eta^2 c (1 - x^(2K - 1)) / (2K - 1)

At gain 0 the bias shifts the ODE's mean by `-sqrt(c) U bias`, which grows like log V, and the SDE's
mean (eta = 1) by `-2 sqrt(c) arctan(sqrt(V/c)) bias`, which does not grow: stochasticity corrects
score errors. A gain a > 0 shrinks the ODE's variance by the factor x^a, which tends to 0, and the
SDE's variance to `c eta^2 / (eta^2 + a kappa)` only. A score that is exact for another law makes no
error of this kind: the sampler is then exact for that law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import Array, Numbers, array, nonnegative, number
from etude.theory.continuous_paths import ContinuousPath, Start, as_path
from etude.theory.targets import Gaussian
from etude.theory.terminal_law import gaussian

NODES, WEIGHTS = np.polynomial.legendre.leggauss(120)


@dataclass(frozen=True)
class ScoreError:
    """Error of a trained network in units of its noise prediction:

        eps_hat = (1 + gain) eps + bias + white xi

    Args:
        bias: a constant error, a number or [d].
        gain: a relative error; a positive gain is an over-confident score, as with guidance.
        white: the standard deviation of an error that is independent at every step.

    Raises:
        EtudeError: a shape does not fit, an entry is not finite, or `white` is negative.
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
        """Return the bias in d dimensions, [d]; EtudeError if it has another number of entries."""
        bias = array(self.bias, "the score error's bias")
        if bias.size not in (1, d):
            raise EtudeError(
                f"the score error's bias has {bias.size} entries but the law has {d} dimensions: pass a number or {d} of them."
            )
        return np.broadcast_to(bias, (d,))


def as_score_error(value: Any) -> ScoreError:
    """Return a score error as it is, and None as no error; EtudeError for any other value."""
    if value is None:
        return ScoreError()
    if not isinstance(value, ScoreError):
        raise EtudeError(
            f"score_error must be a ScoreError, got {type(value).__name__}: pass ScoreError(bias=..., gain=...)."
        )
    return value


def terminal_law_with_error(target: Gaussian, path: ContinuousPath | str, eta: Numbers, error: ScoreError) -> Gaussian:
    """Compute the law at t = 0 of the continuous-time sampler with a bias and a gain.

    Raises:
        EtudeError: the error has a white part, which has no continuous-time limit (its effect is
            proportional to the step: `white_variance`); the path starts at a = 0, or the target has
            a direction without variance.
    """
    target = gaussian(target, "terminal_law_with_error")
    return law_in_y_with_error(target, as_path(path).start(), eta, error)


def law_in_y_with_error(target: Gaussian, start: Start, eta: Numbers, error: ScoreError) -> Gaussian:
    """Compute the law of `terminal_law_with_error` from any start, in y = x/a at level 0."""
    error = as_score_error(error)
    if error.white:
        raise EtudeError(f"a white error of {error.white:g} vanishes in continuous time: give a number of steps.")
    if not np.all(np.isfinite(start.V)) or np.any(target.spectrum <= 0):
        raise EtudeError("score errors need a start at an a above 0 and a target with variance in every direction.")
    kappa = 1.0 + nonnegative(eta, "eta")[..., None] ** 2
    c, V = target.spectrum, start.V[..., None]
    K = 0.5 * kappa * (1.0 + error.gain)
    log_x = -np.log1p(V / c)
    bias = target.to_eigen(error.bias_in(target.d))
    shift = -kappa * np.sqrt(c) * bias * _cosh_integral(np.arcsinh(np.sqrt(V / c)), 1.0 - 2.0 * K)
    mean = target.mu - target.from_eigen(np.exp(K * log_x) * target.to_eigen(target.mu) - shift)
    variance = np.exp(2.0 * K * log_x) * (V + start.excess[..., None]) + (kappa - 1.0) * c * _geometric(
        2.0 * K - 1.0, log_x
    )
    return Gaussian.from_spectrum(mean, variance, target)


def _cosh_integral(U: Array, power: Array) -> Array:
    """Integrate cosh(u)^power over [0, U] by Gauss-Legendre (120 points: 1e-13 up to U = 20)."""
    u = 0.5 * U[..., None] * (1.0 + NODES)
    return np.asarray(0.5 * U * (np.cosh(u) ** power[..., None] @ WEIGHTS))


def _geometric(power: Array, log_x: Array) -> Array:
    """Compute (1 - x^power)/power, which is log(1/x) at power 0."""
    power, log_x = np.broadcast_arrays(power, log_x)
    small = np.abs(power) < 1e-9
    safe = np.where(small, 1.0, power)
    return np.asarray(np.where(small, -log_x, -np.expm1(safe * log_x) / safe))


def score_bias_shift(target: Gaussian, path: ContinuousPath | str, eta: Numbers, bias: Numbers) -> Array:
    """Compute the shift of the mean, [..., d], for a score that is off by a constant in x units.

    The shift is `kappa/2 int_0^V (c/(c + q))^(kappa/2) a(q) dq bias`; on VE it is
    `kappa/2 c (1 - x^(kappa/2 - 1))/(kappa/2 - 1) bias`. `bias` is a number or [d].

    Raises:
        EtudeError: the path starts at a = 0, or the target has a direction without variance.
    """
    path, target = as_path(path), gaussian(target, "score_bias_shift")
    kappa = 1.0 + nonnegative(eta, "eta")[..., None] ** 2
    c, V = target.spectrum, path.start().V[..., None]
    if not np.all(np.isfinite(V)) or np.any(c <= 0):
        raise EtudeError("score errors need a start at an a above 0 and a target with variance in every direction.")
    u = 0.5 * np.log1p(V / c)[..., None] * (1.0 + NODES)
    q = c[..., None] * np.expm1(u)
    a, _ = path.at_level(np.sqrt(q))
    inside = np.exp((1.0 - 0.5 * kappa[..., None]) * u) * a
    area = 0.5 * np.log1p(V / c) * (inside @ WEIGHTS) * c
    along = target.to_eigen(ScoreError(bias=bias).bias_in(target.d))
    shift = target.from_eigen(0.5 * kappa * area * along)
    return np.asarray(shift[..., 0] if target.on_line else shift)


def white_variance(target: Gaussian, start: Start, eta: Numbers, h: Numbers, white: float) -> Array:
    """Compute the variance, [..., d], that a white error adds to leading order in the step.

    With h the step of the log-SNR, and an independent noise-prediction error of standard deviation
    `white` at every step, it is `(1 + eta^2)^2/(2 eta^2) c h white^2 (1 - Phi_0^(2 eta^2))`. It is
    smallest at eta = 1 for V -> infinity. At eta = 0 it is its limit, `c h white^2 log(1/Phi_0)`.
    """
    power = nonnegative(eta, "eta")[..., None] ** 2
    c, V = target.spectrum, start.V[..., None]
    step = nonnegative(h, "h")[..., None]
    return np.asarray(0.5 * (1.0 + power) ** 2 * c * step * white**2 * _geometric(power, -np.log1p(V / c)))

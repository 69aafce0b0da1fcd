"""What score errors do to the continuous-time laws of the samplers of a Gaussian target, in closed form.

With `eps_hat = (1 + gain) eps + bias`, in an eigen-direction c and with kappa = 1 + eta^2, 2K = kappa (1 + gain),
x = c/(c + V), U = asinh(sqrt(V/c)):

    E y   = m (1 - x^K) - kappa sqrt(c) bias int_0^U cosh(u)^(1 - 2K) du
    Var y = x^(2K) tau + eta^2 c (1 - x^(2K - 1)) / (2K - 1)

At gain 0 the bias shifts the ODE's mean by `-sqrt(c) U bias`, which grows like log V, and the SDE's (eta = 1) by
`-2 sqrt(c) arctan(sqrt(V/c)) bias`, which does not: stochasticity corrects score errors. A gain a > 0 shrinks the ODE's variance
by the factor x^a, which tends to 0, and the SDE's to `c eta^2 / (eta^2 + a kappa)` only.
A score that is exact for another law makes no error of this kind: the sampler is then exact for that law.
"""

from __future__ import annotations

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import Array, Numbers, nonnegative
from etude.theory.continuous_paths import Path, Start, as_path
from etude.theory.finite_step import ScoreError, as_score_error
from etude.theory.targets import Gaussian
from etude.theory.terminal_law import gaussian

NODES, WEIGHTS = np.polynomial.legendre.leggauss(120)


def terminal_law_with_error(target: Gaussian, path: Path | str, eta: Numbers, error: ScoreError) -> Gaussian:
    """The law at t = 0 of the continuous-time sampler whose noise prediction has this bias and gain.

    A white error has no continuous-time limit (its effect is proportional to the step: see `white_variance`) and is refused.
    """
    target = gaussian(target, "terminal_law_with_error")
    return law_in_y_with_error(target, as_path(path).start(), eta, error)


def law_in_y_with_error(target: Gaussian, start: Start, eta: Numbers, error: ScoreError) -> Gaussian:
    """The same from any start with finite V and positive variances."""
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
    """int_0^U cosh(u)^power du by Gauss-Legendre (120 points: 1e-13 up to U = 20)."""
    u = 0.5 * U[..., None] * (1.0 + NODES)
    return np.asarray(0.5 * U * (np.cosh(u) ** power[..., None] @ WEIGHTS))


def _geometric(power: Array, log_x: Array) -> Array:
    """(1 - x^power)/power, and log(1/x) at power 0."""
    power, log_x = np.broadcast_arrays(power, log_x)
    small = np.abs(power) < 1e-9
    safe = np.where(small, 1.0, power)
    return np.asarray(np.where(small, -log_x, -np.expm1(safe * log_x) / safe))


def score_bias_shift(target: Gaussian, path: Path | str, eta: Numbers, bias: Numbers) -> Array:
    """Shift of the mean when the score itself (in x units) is off by the constant `bias` (a number or [d]): [..., d].

    `kappa/2 int_0^V (c/(c + q))^(kappa/2) a(q) dq bias`; VE: `kappa/2 c (1 - x^(kappa/2 - 1))/(kappa/2 - 1) bias`.
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
    """Leading-order variance added by an independent noise-prediction error of std `white` at every log-SNR step h, [..., d].

    `(1 + eta^2)^2/(2 eta^2) c h white^2 (1 - Phi_0^(2 eta^2))`, smallest at eta = 1 for V -> infinity (eta = 0: its limit,
    `c h white^2 log(1/Phi_0)`).
    """
    power = nonnegative(eta, "eta")[..., None] ** 2
    c, V = target.spectrum, start.V[..., None]
    step = nonnegative(h, "h")[..., None]
    return np.asarray(0.5 * (1.0 + power) ** 2 * c * step * white**2 * _geometric(power, -np.log1p(V / c)))

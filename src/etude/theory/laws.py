"""Exact laws of the samplers of a Gaussian target, in continuous time and with N steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.errors import EtudeError, unknown
from etude.theory.arrays import Array, Numbers, array, nonnegative, number
from etude.theory.continuous_paths import ContinuousPath, Start, as_path
from etude.theory.sampler_steps import KernelChoice, Limit, SamplerSteps, sampler_steps
from etude.theory.targets import Gaussian, gaussian


def contraction(target: Gaussian, start: Start, eta: Numbers, q_stop: Numbers = 0.0) -> Array:
    """Compute `Phi_eta`, [..., d] by eigen-direction; the axes of all arguments broadcast."""
    kappa = 1.0 + nonnegative(eta, "eta")[..., None] ** 2
    q = np.asarray(q_stop, dtype=np.float64)[..., None]
    floor = target.spectrum + q
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (start.V[..., None] - q) / floor
        return np.asarray(np.where(floor > 0, np.exp(-0.5 * kappa * np.log1p(ratio)), 0.0))


def law_in_y(target: Gaussian, start: Start, eta: Numbers, q_stop: Numbers = 0.0) -> Gaussian:
    """Compute the law of y = x/a at level `q_stop`, for a sampler that starts at `start`."""
    phi = contraction(target, start, eta, q_stop)
    q = np.asarray(q_stop, dtype=np.float64)[..., None]
    with np.errstate(invalid="ignore"):
        error = np.where(phi > 0, phi**2 * (start.excess[..., None] - target.spectrum), 0.0)
    mean = target.mu - target.from_eigen(phi * target.to_eigen(target.mu))
    return Gaussian.from_spectrum(mean, target.spectrum + q + error, target)


def terminal_law(target: Gaussian, path: ContinuousPath | str, eta: Numbers, t_stop: Numbers = 0.0) -> Gaussian:
    """Compute the law of the eta-sampler at time `t_stop`, in x units; a batch for array arguments.

    In an eigen-direction c, from level q = V down to q0,

        Phi_eta = ((c + q0) / (c + V))^((1 + eta^2) / 2),   E y = m - Phi_eta m,
        Var y = c + q0 + Phi_eta^2 (tau - V - c),           x = a y

    EtudeError if the target is a mixture, whose terminal law has no closed form (`reward_gap` gives
    its reward gap), or `t_stop` is not below the time that the path starts from.
    """
    target, path = gaussian(target, "terminal_law"), as_path(path)
    stop = np.asarray(path.time(t_stop))
    if np.any(stop >= path.T):
        raise EtudeError(f"t_stop is {stop.max():g}, but the path starts at {path.T.min():g}: stop below it.")
    a, s = path.a(stop), path.s(stop)
    law = law_in_y(target, path.start(), eta, (s / a) ** 2)
    return Gaussian.from_spectrum(law.mu * a[..., None], law.spectrum * a[..., None] ** 2, target)


NODES, WEIGHTS = np.polynomial.legendre.leggauss(120)  # 1e-13 for cosh(u)^power on [0, 20]


@dataclass(frozen=True)
class ScoreError:
    """Error of a trained network in units of its noise prediction:

        eps_hat = (1 + gain) eps + bias + white xi

    Args:
        bias: a constant error, a number or [d].
        gain: a relative error; a positive gain is an over-confident score, as with guidance.
        white: the standard deviation of an error xi that is independent at every step.

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
        raise EtudeError(f"score_error must be a ScoreError, got {type(value).__name__}: pass ScoreError(bias=...).")
    return value


def terminal_law_with_error(target: Gaussian, path: ContinuousPath | str, eta: Numbers, error: ScoreError) -> Gaussian:
    """Compute the law at t = 0 of the continuous-time sampler with a bias and a gain.

    In an eigen-direction c, with kappa = 1 + eta^2, `2K = kappa (1 + gain)`, x = c/(c + V) and
    U = asinh(sqrt(V/c)),

        E y   = m (1 - x^K) - kappa sqrt(c) bias int_0^U cosh(u)^(1 - 2K) du
        Var y = x^(2K) tau + eta^2 c (1 - x^(2K - 1)) / (2K - 1)

    The bias shifts the ODE's mean by `-sqrt(c) U bias`, which grows like log V, and the SDE's mean
    (eta = 1) by `-2 sqrt(c) arctan(sqrt(V/c)) bias`, which does not grow. A gain a > 0 shrinks the
    ODE's variance to 0, and the SDE's to `c eta^2 / (eta^2 + a kappa)` only. EtudeError if the
    error has a white part, whose effect is proportional to the step (`white_variance`), the path
    starts at a = 0, or the target has a direction without variance.
    """
    target = gaussian(target, "terminal_law_with_error")
    return law_in_y_with_error(target, as_path(path).start(), eta, error)


def law_in_y_with_error(target: Gaussian, start: Start, eta: Numbers, error: ScoreError) -> Gaussian:
    """Compute the law of `terminal_law_with_error` from any start, in y = x/a at level 0."""
    error = as_score_error(error)
    if error.white:
        raise EtudeError(f"a white error of {error.white:g} vanishes in continuous time: give a number of steps.")
    c, V = _spectrum_and_level(target, start)
    kappa = 1.0 + nonnegative(eta, "eta")[..., None] ** 2
    K = 0.5 * kappa * (1.0 + error.gain)
    log_x = -np.log1p(V / c)
    bias = target.to_eigen(error.bias_in(target.d))
    U = np.arcsinh(np.sqrt(V / c))
    u = 0.5 * U[..., None] * (1.0 + NODES)
    shift = -kappa * np.sqrt(c) * bias * (0.5 * U * (np.cosh(u) ** (1.0 - 2.0 * K)[..., None] @ WEIGHTS))
    mean = target.mu - target.from_eigen(np.exp(K * log_x) * target.to_eigen(target.mu) - shift)
    own = (kappa - 1.0) * c * _geometric(2.0 * K - 1.0, log_x)
    variance = np.exp(2.0 * K * log_x) * (V + start.excess[..., None]) + own
    return Gaussian.from_spectrum(mean, variance, target)


def _spectrum_and_level(target: Gaussian, start: Start) -> tuple[Array, Array]:
    """Return c [d] and V [..., 1]; EtudeError where a score error has no law."""
    if not np.all(np.isfinite(start.V)) or np.any(target.spectrum <= 0):
        raise EtudeError("score errors need a start at an a above 0 and a target with variance in every direction.")
    return target.spectrum, start.V[..., None]


def _geometric(power: Array, log_x: Array) -> Array:
    """Compute (1 - x^power)/power, which is log(1/x) at power 0."""
    power, log_x = np.broadcast_arrays(power, log_x)
    small = np.abs(power) < 1e-9
    safe = np.where(small, 1.0, power)
    return np.asarray(np.where(small, -log_x, -np.expm1(safe * log_x) / safe))


def score_bias_shift(target: Gaussian, path: ContinuousPath | str, eta: Numbers, bias: Numbers) -> Array:
    """Compute the shift of the mean, [..., d], for a score that is off by a constant in x units.

    The shift is `kappa/2 int_0^V (c/(c + q))^(kappa/2) a(q) dq bias`, with `bias` a number or [d].
    EtudeError if the path starts at a = 0, or the target has a direction without variance.
    """
    path, target = as_path(path), gaussian(target, "score_bias_shift")
    kappa = 1.0 + nonnegative(eta, "eta")[..., None] ** 2
    c, V = _spectrum_and_level(target, path.start())
    u = 0.5 * np.log1p(V / c)[..., None] * (1.0 + NODES)
    q = c[..., None] * np.expm1(u)
    a, _ = path.at_level(np.sqrt(q))
    inside = np.exp((1.0 - 0.5 * kappa[..., None]) * u) * a
    area = 0.5 * np.log1p(V / c) * (inside @ WEIGHTS) * c
    shift = target.from_eigen(0.5 * kappa * area * target.to_eigen(ScoreError(bias=bias).bias_in(target.d)))
    return np.asarray(shift[..., 0] if target.on_line else shift)


def white_variance(target: Gaussian, start: Start, eta: Numbers, h: Numbers, white: float) -> Array:
    """Compute the variance, [..., d], that a white error adds to leading order in the step.

    With h the step of the log-SNR, `(1 + eta^2)^2/(2 eta^2) c h white^2 (1 - Phi_0^(2 eta^2))`, and
    at eta = 0 its limit `c h white^2 log(1/Phi_0)`. It is smallest at eta = 1 for V -> infinity.
    """
    power = nonnegative(eta, "eta")[..., None] ** 2
    c, V = target.spectrum, start.V[..., None]
    step = nonnegative(h, "h")[..., None]
    return np.asarray(0.5 * (1.0 + power) ** 2 * c * step * white**2 * _geometric(power, -np.log1p(V / c)))


def finite_step_law(
    target: Gaussian,
    schedule: Any,
    eta: Numbers | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: KernelChoice = "gddim",
    *,
    start: str = "prior",
    score_error: ScoreError | None = None,
    prior_variance: Numbers | None = None,
) -> Gaussian:
    """Compute the exact law of the sampler's last state, in x units; a batch for array arguments.

    Each eigen-direction c of N(m, C) is a scalar recursion, exact at every step size:

        A = (c0 a c + c1 s) / (a^2 c + s^2),
        E x_u = c0 m + A (E x_t - a m),     Var x_u = A^2 Var x_t + std^2

    `schedule`, `steps`, `spacing` and `prior_variance` are those of `levels`.

    Args:
        eta: the stochasticity in the kernel's unit. Default: that of the kernel or of the table.
        kernel: a name of `etude.registry.KERNELS`, "euler-maruyama", an import path, or a `Kernel`.
        start: "prior", or "exact" for the law of x_T itself.
        score_error: error of the noise prediction. Default: none.

    Raises:
        EtudeError: as `levels`; the target is not one Gaussian, the start is unknown, a score error
            meets a grid that starts at a = 0, eta is missing, or the kernel is unknown, has no such
            eta on these levels (the error names the largest) or is not defined on them.
    """
    target = gaussian(target, "finite_step_law")
    sampler = sampler_steps(schedule, eta, steps, spacing, kernel, prior_variance)
    return law_of_steps(target, sampler, start, score_error)


def transfer(
    target: Gaussian, sampler: SamplerSteps, score_error: ScoreError | None = None
) -> tuple[Array, Array, Array]:
    """Compute (A, shift, noise) of every step in the eigenbasis, each [N, ..., d].

    The deviation `e = x - a m` of a state from the path's mean goes by `e <- A e + shift` in the
    mean and `Var <- A^2 Var + noise` in the variance.
    """
    grid = sampler.levels
    x0, eps, noise = (x[..., None] for x in (sampler.x0, sampler.eps, sampler.variance))
    extra = (1,) * (x0.ndim - 1 - grid.a.ndim)
    a, s = (x[:-1].reshape((x.shape[0] - 1, *extra, *x.shape[1:], 1)) for x in (grid.a, grid.s))
    spread = a**2 * target.spectrum + s**2
    A = (x0 * a * target.spectrum + eps * s) / spread
    score_error = as_score_error(score_error)
    if not score_error:
        return A, np.zeros_like(A), np.broadcast_to(noise, A.shape)
    if np.any(a == 0):
        raise EtudeError("a score error is not defined at a = 0, where x0_hat = (x - s eps_hat)/a: start above it.")
    lever = eps - x0 * s / a
    shift = np.broadcast_to(lever * target.to_eigen(score_error.bias_in(target.d)), A.shape)
    noise = np.broadcast_to(noise + (lever * score_error.white) ** 2, A.shape)
    return A + lever * score_error.gain * s / spread, shift, noise


def sampler_law(target: Gaussian, sampler: SamplerSteps | Limit, score_error: ScoreError | None = None) -> Gaussian:
    """Compute the law of a sampler from the prior, with N steps or in continuous time."""
    if isinstance(sampler, SamplerSteps):
        return law_of_steps(target, sampler, "prior", score_error)
    if error := as_score_error(score_error):
        return law_in_y_with_error(target, sampler.start, sampler.eta, error)
    return law_in_y(target, sampler.start, sampler.eta)


def law_of_steps(
    target: Gaussian, sampler: SamplerSteps, start: str = "prior", score_error: ScoreError | None = None
) -> Gaussian:
    """Compute the law after the sampler's steps, as `finite_step_law`."""
    if start not in ("prior", "exact"):
        raise unknown("start", str(start), ("prior", "exact"))
    grid, m = sampler.levels, target.to_eigen(target.mu)
    A, shift, noise = transfer(target, sampler, score_error)
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

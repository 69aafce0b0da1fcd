"""The few constants of a target, a reward and the start of a path that the general bounds need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from etude.errors import EtudeError
from etude.theory.arrays import Array
from etude.theory.continuous_paths import Start
from etude.theory.line_flow import Components
from etude.theory.reward_functions import QuadraticReward, Reward, as_reward
from etude.theory.targets import Gaussian, GaussianMixture

INFINITE = float("inf")
NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclass(frozen=True)
class Constants:
    """Constants of a target and of a reward under it.

    The target's class is p = N(0, C) * mu with c_min <= C <= c_max and mu in a ball of radius R. At
    R = 0 the class is that of every 1/c_max-strongly log-concave law; R is infinite for a target
    outside the class.

    Attributes:
        d: number of dimensions.
        mean_squared: |m|^2.
        second_moment: E|x0|^2.
        trace: tr Cov.
        c_min, c_max, R: the class.
        sd: the reward's standard deviation, or an upper bound of it.
        gradient: (E|grad r|^2)^(1/2), or an upper bound of it.
        lipschitz: the Lipschitz constant of r; infinite where there is none.
        gradient_lipschitz: the Lipschitz constant of grad r; infinite where there is none.
    """

    d: int
    mean_squared: float
    second_moment: float
    trace: float
    c_min: float
    c_max: float
    R: float
    sd: float
    gradient: float
    lipschitz: float
    gradient_lipschitz: float


def constants_of(target: Gaussian | GaussianMixture, reward: Reward) -> Constants:
    """Compute the constants; a Lipschitz reward's sd is bounded by L (tr Cov)^(1/2)."""
    reward = as_reward(reward)
    m, trace = target.mu, float(np.trace(target.matrix))
    c_min, c_max, R = _class(target)
    if isinstance(reward, QuadraticReward):
        sd, gradient = reward.variance(target) ** 0.5, reward.squared_gradient(target) ** 0.5
        curvature = 2.0 * float(np.abs(np.linalg.eigvalsh(reward.parts(target.d)[0])).max())
        lipschitz = INFINITE if curvature else gradient
    else:
        lipschitz = gradient = reward.lipschitz
        sd, curvature = lipschitz * trace**0.5, INFINITE
    square = float(m @ m)
    return Constants(target.d, square, square + trace, trace, c_min, c_max, R, sd, gradient, lipschitz, curvature)


def _class(target: Gaussian | GaussianMixture) -> tuple[float, float, float]:
    """Return (c_min, c_max, R); R is infinite for a mixture of different covariances."""
    if isinstance(target, Gaussian):
        return float(target.spectrum.min()), float(target.spectrum.max()), 0.0
    first = target.components[0]
    c_min, c_max = float(first.spectrum.min()), float(first.spectrum.max())
    same = all(np.allclose(part.matrix, first.matrix, rtol=1e-10, atol=1e-12) for part in target.components)
    low, high = target.means.min(axis=0), target.means.max(axis=0)
    radius = float(np.linalg.norm(target.means - 0.5 * (low + high), axis=1).max())
    return c_min, c_max, radius if same else INFINITE


def chi2_exact(target: Gaussian | GaussianMixture, start: Start) -> float:
    """Compute `chi^2(N(0, tau) || p_V)`; infinite if it diverges.

    A Gaussian has a closed form. For a mixture on the line it is a quadrature plus its error
    estimate, so an upper bound, and infinite where it would overflow.

    Raises:
        EtudeError: the target is a mixture in d > 1, which has `chi2_jensen` and `chi2_sharp` only.
    """
    V, excess = float(start.V), float(start.excess)
    if isinstance(target, Gaussian):
        K, D = target.spectrum + V, excess - target.spectrum
        if np.any(D >= K):
            return INFINITE
        m = target.to_eigen(target.mu)
        return float(np.expm1(np.sum(-0.5 * np.log1p(-((D / K) ** 2)) + m**2 / (K - D))))
    if target.d > 1:
        raise EtudeError(
            f"chi^2 has no closed form for a mixture in {target.d} dimensions: use chi2_jensen or chi2_sharp."
        )
    return _chi2_line(Components(target), V, excess)


def _chi2_line(parts: Components, V: float, excess: float) -> float:
    """Integrate (prior - p_V)^2 / p_V and add the quadrature's error estimate.

    The result is infinite from just before the integrand's tails diverge. The integrand is computed
    in logarithms, because it is at its largest where p_V underflows. Panels are doubled until the
    change is below 1e-9 of the integral; that change is the error estimate.
    """
    tau, k = V + excess, V + parts.c
    if tau >= 1.9 * k.max():
        return INFINITE
    reach, last, panels = _reach(parts, tau, k), -INFINITE, 250
    while True:
        half = reach / panels
        y = (np.linspace(half - reach, reach - half, panels)[:, None] + half * NODES).ravel()
        logs = _log_chi2(y, parts, tau, k, excess) + np.log(half * np.tile(WEIGHTS, panels))
        log = float(logsumexp(logs))
        if log >= 700.0:
            return INFINITE
        error = abs(float(np.expm1(min(last - log, 700.0)))) if log > -INFINITE else 0.0
        if error < 1e-9 or panels > 60_000:
            break
        last, panels = log, 2 * panels
    log += float(np.log1p(error + 1e-12))
    return float(np.exp(log)) if log < 700 else INFINITE


def _reach(parts: Components, tau: float, k: Array) -> float:
    """Return half the range that holds the integrand.

    `p_V >= w N(m, k)` for the widest component, and prior^2 / N(m, k) is a Gaussian with mean
    `-m tau/(2k - tau)` and variance `k tau/(2k - tau)`. Nothing is left beyond 40 deviations of
    this Gaussian and of p_V.
    """
    widest = int(np.argmax(k))
    room = float(2.0 * k[widest] - tau)
    tilted = abs(float(parts.m[widest])) * tau / room + 40.0 * float(k[widest] * tau / room) ** 0.5
    return max(tilted, float(np.abs(parts.m).max() + 40.0 * k.max() ** 0.5))


def _log_chi2(y: Array, parts: Components, tau: float, k: Array, excess: float) -> Array:
    """Compute log of `prior R^2 / (1 + R)` with `R = p_V / prior - 1 = sum_k w_k (e^(e_k) - 1)`.

    Small R is free of cancellation.
    """
    y = y[..., None]
    exponents = 0.5 * np.log1p((excess - parts.c) / k) + 0.5 * (
        y**2 * (parts.c - excess) + 2.0 * y * parts.m * tau - parts.m**2 * tau
    ) / (tau * k)
    total = logsumexp(exponents, b=parts.w, axis=-1)
    near = np.abs(exponents).max(axis=-1) < 1.0
    small = np.sum(parts.w * np.expm1(np.where(near[..., None], exponents, 0.0)), axis=-1)
    with np.errstate(divide="ignore"):
        far = np.maximum(total, 0.0) + np.log(-np.expm1(-np.abs(total)))
        log_r = np.where(near, np.log(np.abs(small)), far)
    return np.asarray(-0.5 * y[..., 0] ** 2 / tau - 0.5 * np.log(2.0 * np.pi * tau) + 2.0 * log_r - total)


def chi2_jensen(k: Constants, start: Start) -> float:
    """Compute an upper bound of chi^2 from |m|^2, E|x0|^2 and d alone.

    Jensen gives `p_V >= N(0, V) exp(y.m/V - E|x0|^2/(2V))`, so with e = tau - V
    `1 + chi^2 <= (1 - e^2/V^2)^(-d/2) exp(tau |m|^2 / (2 V (V - e)) + E|x0|^2 / (2 V))` for e < V
    (VE always; VP if abar_T < 1/2), and the bound is infinite otherwise.
    """
    V, e = float(start.V), float(start.excess)
    if e >= V:
        return INFINITE
    log = (
        -0.5 * k.d * np.log1p(-((e / V) ** 2))
        + (V + e) * k.mean_squared / (2.0 * V * (V - e))
        + k.second_moment / (2.0 * V)
    )
    return float(np.expm1(max(log, 0.0))) if log < 700 else INFINITE


def chi2_sharp(target: Gaussian | GaussianMixture, k: Constants, start: Start) -> float:
    """Compute an upper bound of chi^2 by hypercontractivity, for VE and VP starts.

    It has the right order V^-2 for centred targets. With x' an independent copy of x and M Mehler's
    kernel,

        VE                             (E exp(3 x.x'/V) - 1) exp(|m|^2/V + E|x0|^2/(2V))
        VP (a^2 = 1/(1 + V) < 1/3)     (E M_(3a^2)(x, x') - 1) [(1 - a^2)^d (1 - 2/V)^(-d/2) exp(...)]^(1/2)

    The bound is infinite for other starts and where an expectation diverges.
    """
    V, e = float(start.V), float(start.excess)
    if e == 0.0:
        pairs = pair_expectation(target, 3.0 / V, 0.0)
        log = k.mean_squared / V + k.second_moment / (2.0 * V)
    elif abs(e - 1.0) < 1e-9 and V > 2.0:
        a2 = 1.0 / (1.0 + V)
        rho = 3.0 * a2
        norm = -0.5 * k.d * np.log1p(-(rho**2))
        pairs = pair_expectation(target, rho / (1.0 - rho**2), -(rho**2) / (2.0 * (1.0 - rho**2)), norm)
        tilted = 2.0 * a2 * k.mean_squared / ((1.0 - a2) ** 2 * (1.0 - 2.0 / V)) + k.second_moment / V
        log = 0.5 * (k.d * np.log1p(-a2) - 0.5 * k.d * np.log1p(-2.0 / V) + tilted)
    else:
        return INFINITE
    return float(max(pairs, 0.0) * np.exp(log)) if log < 700 else INFINITE


def pair_expectation(
    target: Gaussian | GaussianMixture, cross: float, own: float, log_factor: float = 0.0, centred: bool = False
) -> float:
    """Compute `E exp(cross x.x' + own (|x|^2 + |x'|^2) + log_factor) - 1`, x and x' independent.

    `centred` subtracts the target's mean from both. The result is infinite if the expectation
    diverges.
    """
    parts = target.components if isinstance(target, GaussianMixture) else [target]
    weights = target.weights if isinstance(target, GaussianMixture) else np.ones(1)
    d, origin = target.d, target.mu if centred else np.zeros(target.d)
    form = np.kron(np.array([[own, 0.5 * cross], [0.5 * cross, own]]), np.eye(d))
    total = 0.0
    for wi, p in zip(weights, parts, strict=True):
        for wj, q in zip(weights, parts, strict=True):
            cov = np.zeros((2 * d, 2 * d))
            cov[:d, :d], cov[d:, d:] = p.matrix, q.matrix
            log = _log_expectation(np.concatenate([p.mu - origin, q.mu - origin]), cov, form) + log_factor
            total += wi * wj * (float(np.expm1(log)) if log < 700 else INFINITE)
    return total


def _log_expectation(mean: Array, cov: Array, form: Array) -> float:
    """Compute log E exp(z^T form z) for z ~ N(mean, cov).

    It is infinite unless I - 2 cov^(1/2) form cov^(1/2) is positive definite.
    """
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    inner = np.eye(mean.size) - 2.0 * root.T @ form @ root
    spectrum = np.linalg.eigvalsh(inner)
    if spectrum.min() <= 0.0:
        return INFINITE
    pull = root.T @ (2.0 * form @ mean)
    return float(mean @ form @ mean + 0.5 * pull @ np.linalg.solve(inner, pull) - 0.5 * np.log(spectrum).sum())

"""General bounds on the reward gap for VP, VE and rectified flow, from a few constants.

None assumes that the drift is dissipative in x, which is false for VP; in y = x/a the drift
contracts on the class p = N(0, C) * mu, mu in a ball of radius R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.integrate import quad
from scipy.special import logsumexp

from etude.errors import EtudeError
from etude.theory.arrays import Array, Numbers, nonnegative, number
from etude.theory.continuous_paths import ContinuousPath, Start, as_path
from etude.theory.exact_gap import reward_gap
from etude.theory.levels import levels
from etude.theory.line import Components
from etude.theory.reward_functions import QuadraticReward, Reward, as_reward
from etude.theory.targets import Gaussian, GaussianMixture, Law

INFINITE = float("inf")
NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclass(frozen=True)
class Constants:
    """Constants of a target and of a reward under it, or upper bounds of them.

    The target's class is p = N(0, C) * mu with c_min <= C <= c_max and mu in a ball of radius R. At
    R = 0 the class is that of every 1/c_max-strongly log-concave law; R is infinite for a target
    outside the class.
    """

    d: int
    mean_squared: float  # |m|^2
    second_moment: float  # E|x0|^2
    trace: float  # tr Cov
    c_min: float
    c_max: float
    R: float
    sd: float  # of the reward
    gradient: float  # (E|grad r|^2)^(1/2)
    lipschitz: float  # of r
    gradient_lipschitz: float  # of grad r


def constants_of(target: Law, reward: Reward) -> Constants:
    """Compute the constants; a Lipschitz reward's sd is bounded by L (tr Cov)^(1/2)."""
    reward = as_reward(reward)
    trace, square = float(np.trace(target.matrix)), float(target.mu @ target.mu)
    first, R = target if isinstance(target, Gaussian) else target.components[0], 0.0
    if isinstance(target, GaussianMixture):
        if all(np.allclose(part.matrix, first.matrix, rtol=1e-10, atol=1e-12) for part in target.components):
            middle = 0.5 * (target.means.min(axis=0) + target.means.max(axis=0))
            R = float(np.linalg.norm(target.means - middle, axis=1).max())
        else:
            R = INFINITE
    if isinstance(reward, QuadraticReward):
        sd, gradient = reward.variance(target) ** 0.5, reward.squared_gradient(target) ** 0.5
        curvature = 2.0 * float(np.abs(np.linalg.eigvalsh(reward.parts(target.d)[0])).max())
        lipschitz = INFINITE if curvature else gradient
    else:
        lipschitz = gradient = reward.lipschitz
        sd, curvature = lipschitz * trace**0.5, INFINITE
    low, high = float(first.spectrum.min()), float(first.spectrum.max())
    return Constants(target.d, square, square + trace, trace, low, high, R, sd, gradient, lipschitz, curvature)


def chi2_exact(target: Law, start: Start) -> float:
    """Compute `chi^2(N(0, tau) || p_V)`; infinite if it diverges or would overflow.

    For a mixture it is a quadrature plus its error estimate; EtudeError in d > 1.
    """
    V, excess = float(start.V), float(start.excess)
    if isinstance(target, Gaussian):
        K, D = target.spectrum + V, excess - target.spectrum
        if np.any(D >= K):
            return INFINITE
        m = target.to_eigen(target.mu)
        return float(np.expm1(np.sum(-0.5 * np.log1p(-((D / K) ** 2)) + m**2 / (K - D))))
    if target.d > 1:
        raise EtudeError(f"a mixture in {target.d} dimensions has no closed chi^2: use chi2_jensen or chi2_sharp.")
    return _chi2_line(Components(target), V, excess)


def _chi2_line(parts: Components, V: float, excess: float) -> float:
    """Integrate (prior - p_V)^2 / p_V, largest where p_V underflows, plus the error's estimate."""
    tau, k = V + excess, V + parts.c
    if tau >= 1.9 * k.max():  # just before the integrand's tails diverge
        return INFINITE
    # p_V >= w N(m, k) for the widest component, and prior^2 / N(m, k) is a Gaussian with mean -m tau/room and variance
    # k tau/room. Nothing is left beyond 40 deviations of this Gaussian and of p_V.
    widest = int(np.argmax(k))
    room = float(2.0 * k[widest] - tau)
    tilted = abs(float(parts.m[widest])) * tau / room + 40.0 * float(k[widest] * tau / room) ** 0.5
    reach = max(tilted, float(np.abs(parts.m).max() + 40.0 * k.max() ** 0.5))
    last, panels = -INFINITE, 250
    while True:
        half = reach / panels
        y = (np.linspace(half - reach, reach - half, panels)[:, None] + half * NODES).ravel()
        logs = _log_chi2(y, parts, tau, k, excess) + np.log(half * np.tile(WEIGHTS, panels))
        log = float(logsumexp(logs))
        if log >= 700.0:
            return INFINITE
        # the change when the panels are doubled
        error = abs(float(np.expm1(min(last - log, 700.0)))) if log > -INFINITE else 0.0
        if error < 1e-9 or panels > 60_000:
            break
        last, panels = log, 2 * panels
    log += float(np.log1p(error + 1e-12))
    return float(np.exp(log)) if log < 700 else INFINITE


def _log_chi2(y: Array, parts: Components, tau: float, k: Array, excess: float) -> Array:
    """Compute log of `prior R^2 / (1 + R)` with `R = p_V / prior - 1 = sum_k w_k (e^(e_k) - 1)`."""
    y = y[..., None]
    exponents = 0.5 * np.log1p((excess - parts.c) / k) + 0.5 * (
        y**2 * (parts.c - excess) + 2.0 * y * parts.m * tau - parts.m**2 * tau
    ) / (tau * k)
    total = logsumexp(exponents, b=parts.w, axis=-1)
    near = np.abs(exponents).max(axis=-1) < 1.0  # a small R without cancellation
    small = np.sum(parts.w * np.expm1(np.where(near[..., None], exponents, 0.0)), axis=-1)
    with np.errstate(divide="ignore"):
        far = np.maximum(total, 0.0) + np.log(-np.expm1(-np.abs(total)))
        log_r = np.where(near, np.log(np.abs(small)), far)
    return np.asarray(-0.5 * y[..., 0] ** 2 / tau - 0.5 * np.log(2.0 * np.pi * tau) + 2.0 * log_r - total)


def chi2_jensen(k: Constants, start: Start) -> float:
    """Bound chi^2 by Jensen's `p_V >= N(0, V) exp(y.m/V - E|x0|^2/(2V))`. With e = tau - V,

    `1 + chi^2 <= (1 - e^2/V^2)^(-d/2) exp(tau |m|^2 / (2 V (V - e)) + E|x0|^2 / (2 V))` for e < V.
    """
    V, e = float(start.V), float(start.excess)
    if e >= V:
        return INFINITE
    log = -0.5 * k.d * np.log1p(-((e / V) ** 2)) + (V + e) * k.mean_squared / (2.0 * V * (V - e))
    log += k.second_moment / (2.0 * V)
    return float(np.expm1(max(log, 0.0))) if log < 700 else INFINITE


def chi2_sharp(target: Law, k: Constants, start: Start) -> float:
    """Bound chi^2 of VE and VP by hypercontractivity, of order V^-2 for centred targets.

    With x' an independent copy of x and M Mehler's kernel,

        VE                            (E exp(3 x.x'/V) - 1) exp(|m|^2/V + E|x0|^2/(2V))
        VP (a^2 = 1/(1 + V) < 1/3)    (E M_(3a^2)(x, x') - 1) [(1 - a^2)^d (1 - 2/V)^(-d/2) .]^(1/2)
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


def pair_expectation(target: Law, cross: float, own: float, log_factor: float = 0.0, centred: bool = False) -> float:
    """Compute `E exp(cross x.x' + own (|x|^2 + |x'|^2) + log_factor) - 1`, x and x' independent."""
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
    """Compute log E exp(z^T form z) for z ~ N(mean, cov); infinite where it diverges."""
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    inner = np.eye(mean.size) - 2.0 * root.T @ form @ root
    spectrum = np.linalg.eigvalsh(inner)
    if spectrum.min() <= 0.0:
        return INFINITE
    pull = root.T @ (2.0 * form @ mean)
    return float(mean @ form @ mean + 0.5 * pull @ np.linalg.solve(inner, pull) - 0.5 * np.log(spectrum).sum())


def forgetting(k: Constants, V: float, eta: float) -> float:
    """Compute `Gamma_eta >= exp(-eta^2/2 int_0^V dq / C_P(p_q))`, C_P the Poincare constant of p_q.

    On the class `1/C_P(p_q) >= 1/(c_max + q) - R^2/(c_min + q)^2` (Bakry-Emery) where that is
    positive. From the best such level on, `C_P(p_q)` grows by at most the added noise. Gamma is 1
    outside the class.
    """
    if not np.isfinite(k.R) or eta == 0.0:
        return 1.0
    if k.R == 0.0 and k.c_max == 0.0:
        return 0.0
    q = np.concatenate([[0.0], np.geomspace(1e-6 * V, V, 400)])
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = 1.0 / (k.c_max + q) - (k.R / (k.c_min + q)) ** 2 if k.R else 1.0 / (k.c_max + q)
        poincare = 1.0 / slope
        rate = np.where(slope > 0, poincare / (poincare + V - q), 1.0)
    return float(np.nanmin(rate) ** (0.5 * eta**2))


def contraction_bound(k: Constants, V: float, eta: float) -> float:
    """Bound the factor by which the sampler contracts distances; with kappa = 1 + eta^2,

    Phibar_eta = (c_max/(c_max + V))^(kappa/2) exp(kappa/2 R^2 (1/c_min - 1/(c_min + V))).
    """
    if not np.isfinite(k.R) or (k.R > 0 and k.c_min == 0.0):
        return INFINITE
    if k.c_max == 0.0:
        return 0.0
    spread = k.R**2 * V / (k.c_min * (k.c_min + V)) if k.R else 0.0
    log = 0.5 * (1.0 + eta**2) * (spread - np.log1p(V / k.c_max))
    return float(np.exp(log)) if log < 350 else INFINITE


def start_distance(target: Law, k: Constants, start: Start) -> float:
    """Bound W2(prior, p_V) by `(|m|^2 + (w + sqrt(d) |sqrt(tau) - sqrt(V)|)^2)^(1/2)`.

    `w = min(sqrt(tr Cov), sqrt(2 V log E exp(x.x'/V)))` for the centred target (Talagrand).
    """
    V, excess = float(start.V), float(start.excess)
    pairs = pair_expectation(target, 1.0 / V, 0.0, centred=True)
    talagrand = (2.0 * V * np.log1p(pairs)) ** 0.5 if np.isfinite(pairs) and pairs > 0 else INFINITE
    scale = excess / ((V + excess) ** 0.5 + V**0.5)
    return float((k.mean_squared + (min(k.trace**0.5, talagrand) + k.d**0.5 * abs(scale)) ** 2) ** 0.5)


def reward_change(k: Constants, W: float) -> float:
    """Bound `|E_nu r - E_p r|` for W2(nu, p) <= W by the better of `L W` and `G W + L1/2 W^2`."""
    lipschitz = k.lipschitz * W if np.isfinite(k.lipschitz) else INFINITE
    curved = k.gradient * W + 0.5 * k.gradient_lipschitz * W**2 if np.isfinite(k.gradient_lipschitz) else INFINITE
    return min(lipschitz, curved)


def vanishing_bound(k: Constants, V: float, eta: float, chi2: float) -> float:
    """Compute `eta/2 G chi (int_0^V Phibar_0(q)^2 dq)^(1/2)`."""
    if not np.isfinite(k.R) or not np.isfinite(chi2) or (k.R > 0 and k.c_min == 0.0):
        return INFINITE
    if k.R == 0.0:
        area = k.c_max * np.log1p(V / k.c_max) if k.c_max else 0.0
    elif contraction_bound(k, V, 0.0) == INFINITE or k.R**2 / k.c_min > 600:
        return INFINITE
    else:
        area, error = quad(
            lambda u: k.c_max / (k.c_max + np.exp(u) - k.c_min) * np.exp(u + k.R**2 * (1.0 / k.c_min - np.exp(-u))),
            np.log(k.c_min),
            np.log(k.c_min + V),
            limit=200,
        )
        area += error
    return 0.5 * eta * k.gradient * chi2**0.5 * area**0.5


def bounded_reward_bound(k: Constants, start: Start, oscillation: float) -> float:
    """Compute `2 osc(r) (KL/2)^(1/2)`, `KL <= 1/2 [E|x0|^2/tau + d (V/tau - 1) + d log(tau/V)]`."""
    V, tau = float(start.V), float(start.V + start.excess)
    kl = 0.5 * (k.second_moment / tau + k.d * (V / tau - 1.0) + k.d * np.log(tau / V))
    return float(2.0 * nonnegative(oscillation, "the oscillation") * (0.5 * kl) ** 0.5)


@dataclass(frozen=True)
class GapBounds:
    """Every bound by name, infinite where its assumptions fail, beside the gap with its error."""

    bounds: dict[str, float]
    gap: float
    gap_error: float

    @property
    def best(self) -> float:
        """Smallest bound."""
        return min(self.bounds.values())

    @property
    def best_name(self) -> str:
        """Name of the smallest bound."""
        return min(self.bounds, key=lambda name: self.bounds[name])

    @property
    def ratio(self) -> float:
        """Ratio of the best bound to |gap|; infinite where the gap is 0."""
        return self.best / abs(self.gap) if self.gap else INFINITE


def gap_bounds(target: Law, path: ContinuousPath | str, reward: Reward, eta: float) -> GapBounds:
    """Compute every bound of the continuous-time gap at one eta and one horizon, beside the gap.

    The sampler starts from N(0, tau I) and follows the exact score. W = Phibar W2(prior, p_V).

        density ratio  any target with two moments       sd(r) chi (1 + Gamma_eta)
        coupling       the class; r or grad r Lipschitz  sum over ODE, SDE of (G W + L1/2 W^2)
        vanishing      the class                         eta/2 G chi (int_0^V Phibar_0^2 dq)^(1/2)

    The first follows from `d/dq int h^2 p_q = eta^2 int |grad h|^2 p_q`, h the density ratio of the
    sampler's law to p_q, the last from `gap = eta^2/2 int_0^V E_(p_q)[grad h . grad r_q] dq`, r_q
    the reward pulled back by the flow. In d > 1 a mixture's gap is simulated. EtudeError if the
    path has several horizons or starts from pure noise.
    """
    return gap_bounds_at(target, path, reward, [eta])[0]


def gap_bounds_at(target: Law, path: ContinuousPath | str, reward: Reward, etas: Sequence[float]) -> list[GapBounds]:
    """Compute `gap_bounds` at several etas, which share the constants and the mixture's flow."""
    start = as_path(path).start()
    strengths = [float(nonnegative(number(eta, "eta"), "eta")) for eta in etas]
    if start.V.ndim:
        raise EtudeError("a bound takes one horizon at a time: pass a path whose T is a number.")
    if not np.isfinite(start.V):
        raise EtudeError("the path starts from pure noise, where the continuous-time gap is 0: nothing to bound.")
    k = constants_of(target, reward)
    chi2 = {"Jensen": chi2_jensen(k, start), "sharp": chi2_sharp(target, k, start)}
    if isinstance(target, Gaussian) or target.d == 1:
        chi2["exact"] = chi2_exact(target, start)
    V, distance = float(start.V), start_distance(target, k, start)
    gaps = reward_gap(target, path, reward, np.array(strengths))
    out = []
    for eta, gap in zip(strengths, gaps, strict=True):
        gamma, factors = forgetting(k, V, eta), [contraction_bound(k, V, e) for e in (0.0, eta)]
        bounds = {f"density ratio, {name}": k.sd * x**0.5 * (1.0 + gamma) for name, x in chi2.items()}
        bounds["coupling"] = INFINITE if INFINITE in factors else sum(reward_change(k, f * distance) for f in factors)
        bounds["vanishing, Jensen"] = vanishing_bound(k, V, eta, chi2["Jensen"])
        bounds["vanishing"] = vanishing_bound(k, V, eta, min(chi2.values()))
        out.append(GapBounds(bounds, float(gap), float(getattr(gap, "error", 0.0))))
    return out


def finite_step_bound(
    target: Law,
    schedule: Any,
    reward: Reward,
    eta: float,
    steps: int | None = None,
    spacing: str = "trailing",
    denoiser_error: Numbers = 0.0,
) -> float:
    """Bound the N-step gap of gDDIM from the prior, on the class, by a recursion of W2:

        W^2 <- ([w + (1 - w) l(q)] W + (1 - w) e)^2 + (1 - w)^2 mmse(q),
        w = (v_u/v_t)^(1 + eta^2),     l(q) = c_max/(c_max + q) + q R^2/(c_min + q)^2

    It couples the ODE and the SDE with the exact reverse chain. The larger linear mmse, tr(C q (C +
    q)^-1) with C the covariance, stands for mmse(q). `denoiser_error` is the L2 error e of x0_hat,
    a number or one per step. The bound decays like N^(-1/2) only. EtudeError if the grid has
    several horizons, starts at a = 0 or does not end at s = 0.
    """
    grid = levels(schedule, steps, spacing)
    if grid.a.ndim > 1 or grid.a[0] == 0 or grid.s[-1] > 0:
        raise EtudeError("this bound takes one grid from an a above 0 to s = 0: pass one horizon, and delta above 0.")
    k, start = constants_of(target, reward), grid.start()
    if not np.isfinite(k.R):
        return INFINITE
    spectrum = target.spectrum if isinstance(target, Gaussian) else np.asarray(np.linalg.eigvalsh(target.matrix), float)
    errors = np.broadcast_to(nonnegative(denoiser_error, "denoiser_error"), (grid.steps,))
    total = 0.0
    for e in (0.0, float(nonnegative(number(eta, "eta"), "eta"))):
        W = start_distance(target, k, start)
        for (v, v_next), error in zip(pairwise(grid.v), errors, strict=True):
            q, w = float(v**2), float((v_next / v) ** (1.0 + e**2))
            slope = k.c_max / (k.c_max + q) + q * (k.R / (k.c_min + q)) ** 2
            mmse = float(np.sum(spectrum * q / (spectrum + q)))
            W = (((w + (1.0 - w) * slope) * W + (1.0 - w) * float(error)) ** 2 + (1.0 - w) ** 2 * mmse) ** 0.5
        total += reward_change(k, W)
    return total

"""General bounds on the reward gap for VP, VE and rectified flow, from a few constants.

They assume the exact score and a sampler that starts from N(0, tau I); each docstring adds the
rest. No bound assumes that the drift is dissipative in x, which is false for VP; in y = x/a the
drift contracts on the class p = N(0, C) * mu, mu in a ball of radius R.

    density ratio   any target with two moments     |gap| <= sd(r) chi (1 + Gamma_eta)
    coupling        the class                       |gap| <= sum over ODE, SDE of (G W + L1/2 W^2),  W = Phibar W_T
    vanishing       the class                       |gap| <= eta/2 G chi (int_0^V Phibar_0(q)^2 dq)^(1/2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import quad

from etude.errors import EtudeError
from etude.theory.arrays import Array, Numbers, nonnegative, number
from etude.theory.constants import (
    INFINITE,
    Constants,
    chi2_exact,
    chi2_jensen,
    chi2_sharp,
    constants_of,
    pair_expectation,
)
from etude.theory.continuous_paths import ContinuousPath, Start, as_path
from etude.theory.exact_gap import reward_gap
from etude.theory.levels import levels
from etude.theory.reward_functions import Reward
from etude.theory.targets import Gaussian, GaussianMixture


def forgetting(k: Constants, V: float, eta: float) -> float:
    """Compute `Gamma_eta >= exp(-eta^2/2 int_0^V dq / C_P(p_q))`, C_P the Poincare constant of p_q.

    On the class `1/C_P(p_q) >= 1/(c_max + q) - R^2/(c_min + q)^2` (Bakry-Emery) where that is
    positive. From any level on, `C_P(p_q)` grows by at most the added noise; the function searches
    for the best level to start from. Gamma is 1 outside the class.
    """
    if not np.isfinite(k.R) or eta == 0.0:
        return 1.0
    q = np.concatenate([[0.0], np.geomspace(1e-6 * V, V, 400)])
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = 1.0 / (k.c_max + q) - (k.R / (k.c_min + q)) ** 2 if k.R else 1.0 / (k.c_max + q)
        poincare = 1.0 / slope
        rate = np.where(slope > 0, poincare / (poincare + V - q), 1.0)
    if k.R == 0.0 and k.c_max == 0.0:
        return 0.0
    return float(np.nanmin(rate) ** (0.5 * eta**2))


def density_ratio_bound(k: Constants, start: Start, eta: float, chi2: float) -> float:
    """Compute the bound `sd(r) chi (1 + Gamma_eta)`, with chi^2(prior || p_V) <= chi2.

    It holds for any target with two moments and any r with a second moment. Proof: the density
    ratio h of the sampler's law to p_q obeys `d/dq int h^2 p_q = eta^2 int |grad h|^2 p_q`;
    Poincare's inequality and Cauchy-Schwarz follow, for the ODE (Gamma = 1) and for the SDE.
    """
    return k.sd * chi2**0.5 * (1.0 + forgetting(k, float(start.V), eta))


def contraction_bound(k: Constants, V: float, eta: float) -> float:
    """Compute Phibar_eta, the factor by which the sampler contracts distances on the class.

        Phibar_eta = (c_max/(c_max + V))^(kappa/2) exp(kappa/2 R^2 (1/c_min - 1/(c_min + V)))

    with kappa = 1 + eta^2; it is infinite outside the class.
    """
    kappa = 1.0 + eta**2
    if not np.isfinite(k.R) or (k.R > 0 and k.c_min == 0.0):
        return INFINITE
    if k.c_max == 0.0:
        return 0.0
    spread = k.R**2 * V / (k.c_min * (k.c_min + V)) if k.R else 0.0
    log = 0.5 * kappa * (spread - np.log1p(V / k.c_max))
    return float(np.exp(log)) if log < 350 else INFINITE


def start_distance(target: Gaussian | GaussianMixture, k: Constants, start: Start) -> float:
    """Compute an upper bound of W2(prior, p_V):

        (|m|^2 + (w + sqrt(d) |sqrt(tau) - sqrt(V)|)^2)^(1/2)

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


def coupling_bound(k: Constants, start: Start, eta: float, W: float) -> float:
    """Bound the gap by synchronous coupling of ODE and SDE with the exact reverse process.

    W2 shrinks by Phibar from W = W2(prior, p_V). It holds on the class, for r Lipschitz or with a
    Lipschitz gradient.
    """
    factors = [contraction_bound(k, float(start.V), e) for e in (0.0, eta)]
    return INFINITE if INFINITE in factors else sum(reward_change(k, f * W) for f in factors)


def vanishing_bound(k: Constants, start: Start, eta: float, chi2: float) -> float:
    """Compute `eta/2 G chi (int_0^V Phibar_0(q)^2 dq)^(1/2)`, the bound that goes to zero with eta.

    It holds on the class. Proof: `gap = eta^2/2 int_0^V E_(p_q)[grad h . grad r_q] dq` exactly,
    with r_q the reward pulled back by the flow.
    """
    V = float(start.V)
    if not np.isfinite(k.R) or not np.isfinite(chi2) or (k.R > 0 and k.c_min == 0.0):
        return INFINITE
    if k.R == 0.0:
        area = k.c_max * np.log1p(V / k.c_max) if k.c_max else 0.0
    else:
        if contraction_bound(k, V, 0.0) == INFINITE or k.R**2 / k.c_min > 600:
            return INFINITE
        area, error = quad(
            lambda u: k.c_max / (k.c_max + np.exp(u) - k.c_min) * np.exp(u + k.R**2 * (1.0 / k.c_min - np.exp(-u))),
            np.log(k.c_min),
            np.log(k.c_min + V),
            limit=200,
        )
        area += error
    return 0.5 * eta * k.gradient * chi2**0.5 * area**0.5


def bounded_reward_bound(k: Constants, start: Start, oscillation: float) -> float:
    """Compute `2 osc(r) (KL/2)^(1/2)`, `KL <= 1/2 [E|x0|^2/tau + d (V/tau - 1) + d log(tau/V)]`.

    It holds for any target with two moments and any bounded reward.
    """
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
    def few_constants(self) -> float:
        """Best of the bounds without integrals of the target: coupling, and both with Jensen."""
        return min(self.bounds[name] for name in ("density ratio, Jensen", "coupling", "vanishing, Jensen"))

    @property
    def ratio(self) -> float:
        """Ratio of the best bound to |gap|; infinite where the gap is 0."""
        return self.best / abs(self.gap) if self.gap else INFINITE


def gap_bounds(target: Gaussian | GaussianMixture, path: ContinuousPath | str, reward: Reward, eta: float) -> GapBounds:
    """Compute every bound of the continuous-time gap at one eta and one horizon, beside the gap.

    In d > 1 a mixture's chi^2 is bounded (Jensen, hypercontractivity) and not computed, and its gap
    is simulated.

    Raises:
        EtudeError: the path has several horizons, or starts from pure noise, where there is nothing
            to bound.
    """
    return gap_bounds_at(target, path, reward, [eta])[0]


def gap_bounds_at(
    target: Gaussian | GaussianMixture, path: ContinuousPath | str, reward: Reward, etas: Sequence[float]
) -> list[GapBounds]:
    """Compute `gap_bounds` at several etas, which share the constants and the mixture's flow."""
    start = as_path(path).start()
    strengths = [float(nonnegative(number(eta, "eta"), "eta")) for eta in etas]
    if start.V.ndim:
        raise EtudeError("a bound takes one horizon at a time: pass a path whose T is a number.")
    if not np.isfinite(start.V):
        raise EtudeError(
            "the path starts from pure noise, where the continuous-time gap is 0: there is nothing to bound."
        )
    k = constants_of(target, reward)
    chi2 = {"Jensen": chi2_jensen(k, start), "sharp": chi2_sharp(target, k, start)}
    if isinstance(target, Gaussian) or target.d == 1:
        chi2["exact"] = chi2_exact(target, start)
    distance = start_distance(target, k, start)
    gaps = reward_gap(target, path, reward, np.array(strengths))
    out = []
    for eta, gap in zip(strengths, gaps, strict=True):
        bounds = {f"density ratio, {name}": density_ratio_bound(k, start, eta, x) for name, x in chi2.items()}
        bounds["coupling"] = coupling_bound(k, start, eta, distance)
        bounds["vanishing, Jensen"] = vanishing_bound(k, start, eta, chi2["Jensen"])
        bounds["vanishing"] = vanishing_bound(k, start, eta, min(chi2.values()))
        out.append(GapBounds(bounds, float(gap), float(getattr(gap, "error", 0.0))))
    return out


def finite_step_bound(
    target: Gaussian | GaussianMixture,
    schedule: Any,
    reward: Reward,
    eta: float,
    steps: int | None = None,
    spacing: str = "trailing",
    denoiser_error: Numbers = 0.0,
) -> float:
    """Bound the N-step gap of gDDIM from the prior, on the class, by a recursion of W2:

        W <- ([w + (1 - w) l(q)] W + (1 - w) e)^2 + (1 - w)^2 mmse(q)  (square root),     w = (v_u/v_t)^(1 + eta^2),
        l(q) = c_max/(c_max + q) + q R^2/(c_min + q)^2

    It follows from the coupling of the ODE and of the SDE with the exact reverse chain. The larger
    linear mmse, tr(C q (C + q)^-1) with C the covariance, stands for mmse(q). `denoiser_error` is
    the L2 error e of x0_hat, a number or one per step. The bound decays like N^(-1/2) only.

    Raises:
        EtudeError: the grid has several horizons, starts at a = 0 or does not end at s = 0.
    """
    grid = levels(schedule, steps, spacing)
    if grid.a.ndim > 1 or grid.a[0] == 0 or grid.s[-1] > 0:
        raise EtudeError(
            "this bound takes one grid from an a above 0 down to s = 0: pass one horizon, and delta above 0."
        )
    k, start = constants_of(target, reward), grid.start()
    if not np.isfinite(k.R):
        return INFINITE
    spectrum = target.spectrum if isinstance(target, Gaussian) else np.asarray(np.linalg.eigvalsh(target.matrix), float)
    v = grid.v
    errors = np.broadcast_to(nonnegative(denoiser_error, "denoiser_error"), (grid.steps,))
    total = 0.0
    for e in (0.0, float(nonnegative(number(eta, "eta"), "eta"))):
        W = start_distance(target, k, start)
        for i in range(grid.steps):
            W = _step(k, spectrum, float(v[i] ** 2), float((v[i + 1] / v[i]) ** (1.0 + e**2)), float(errors[i]), W)
        total += reward_change(k, W)
    return total


def _step(k: Constants, spectrum: Array, q: float, w: float, error: float, W: float) -> float:
    slope = k.c_max / (k.c_max + q) + q * (k.R / (k.c_min + q)) ** 2
    mmse = float(np.sum(spectrum * q / (spectrum + q)))
    return (((w + (1.0 - w) * slope) * W + (1.0 - w) * error) ** 2 + (1.0 - w) ** 2 * mmse) ** 0.5

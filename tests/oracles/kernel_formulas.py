"""Closed forms of every kernel in NumPy, derived apart from the package: an oracle for its coefficients and laws.

A step goes from (a_t, s_t) to (a_u, s_u) by x_u = x0 x0_hat + eps eps_hat + std z.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Step = tuple[np.ndarray, np.ndarray, np.ndarray]


def gddim(a_t, s_t, a_u, s_u, eta) -> Step:
    """arXiv 2206.05564: the share rho = (v_u/v_t)^(eta^2) of the current noise is kept, v = s/a."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_rho = np.where(eta > 0, eta**2 * np.log(s_u * a_t / (s_t * a_u)), 0.0)
    return a_u, s_u * np.exp(log_rho), np.sqrt(-(s_u**2) * np.expm1(2 * log_rho))


def ddim(a_t, s_t, a_u, s_u, eta) -> Step:
    """arXiv 2010.02502: std is eta times that of the posterior, and the level's noise s_u is kept in all."""
    share = eta**2 * (1 - (s_u * a_t / (s_t * a_u)) ** 2)
    return a_u, s_u * np.sqrt(1 - share), s_u * np.sqrt(share)


def euler_maruyama(a_t, s_t, a_u, s_u, eta) -> Step:
    """Euler-Maruyama of dy = -(1 + eta^2) eps_hat dv + eta sqrt(d(v^2)) z in y = x/a, with the step in v = s/a."""
    ratio, v_t = s_u * a_t / (s_t * a_u), s_t / a_t
    return a_u, a_u * v_t * (1 - (1 + eta**2) * (1 - ratio)), a_u * eta * v_t * np.sqrt(1 - ratio**2)


def cps(a_t, s_t, a_u, s_u, eta) -> Step:
    """arXiv 2509.05952: a quarter turn of the noise is eta = 1."""
    return a_u, s_u * np.cos(eta * np.pi / 2), s_u * np.sin(eta * np.pi / 2)


def flow_sde(a_t, s_t, a_u, s_u, eta) -> Step:
    """arXiv 2505.05470: Euler-Maruyama of dx = (v + g^2 eps_hat / (2 sigma)) dt + g dB, g^2 = eta^2 sigma / (1 - sigma)."""
    return _flow_step(s_t, s_u, eta**2 * s_t / a_t)


def dance_sde(a_t, s_t, a_u, s_u, eta) -> Step:
    """arXiv 2505.07818: the same with g = eta."""
    return _flow_step(s_t, s_u, eta**2 + 0.0 * s_t)


def precise(a_t, s_t, a_u, s_u, eta) -> Step:
    """arXiv 2605.23522: the share rho = (lam_u/lam_t)^(n^2/2) of the noise is kept."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_rho = np.where(eta > 0, eta**2 / 2 * (np.log(s_u / a_u) - np.log(s_t / a_t)), 0.0)
    return a_u, s_u * np.exp(log_rho), s_u * np.sqrt(-np.expm1(2 * log_rho))


def dance_precise(a_t, s_t, a_u, s_u, eta) -> Step:
    """arXiv 2605.23522: rho = exp(-n^2/2 (1/sigma_u - 1/sigma_t)); no noise is left at the data."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return _keeping(a_u, s_u, np.where(s_u > 0, np.exp(-(eta**2) / 2 * (1 / s_u - 1 / s_t)), 1.0))


def churn(a_t, s_t, a_u, s_u, eta) -> Step:
    """arXiv 2603.12893: noise of variance (1 + gamma)^2 - 1 is added to the present unit before the ODE's step."""
    return _keeping(a_u, s_u, 1 / (1 + eta) + 0.0 * s_u)


def _keeping(a_u, s_u, rho) -> Step:
    return a_u, s_u * rho, s_u * np.sqrt(1 - rho**2)


def _flow_step(sigma_t, sigma_u, g2) -> Step:
    """x_u = x - h (eps_hat - x0_hat) - h g^2 eps_hat / (2 sigma) + g sqrt(h) z; without noise where it ends at the data."""
    g2, h = np.where(sigma_u > 0, g2, 0.0), sigma_t - sigma_u
    return (1 - sigma_t) + h, sigma_t - h - h * g2 / (2 * sigma_t), np.sqrt(h * g2)


FORMULAS: dict[str, Callable[..., Step]] = {
    "gddim": gddim,
    "ddim": ddim,
    "euler-maruyama": euler_maruyama,
    "cps": cps,
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "precise": precise,
    "dance_precise": dance_precise,
    "churn": churn,
}


def law(mean, variance, a, s, coefficients: list[Step], prior_variance=1.0) -> tuple[float, float]:
    """Mean and variance of the last state for a target N(mean, variance) on the line, by conditioning step by step."""
    m, v = 0.0, prior_variance
    for a_t, s_t, (x0, eps, std) in zip(a[:-1], s[:-1], coefficients, strict=True):
        # (x0_hat, eps_hat) = E[(x0, eps) | x_t] of the joint Gaussian of x0, eps and x_t = a x0 + s eps.
        spread = a_t**2 * variance + s_t**2
        to_x0, to_eps = a_t * variance / spread, s_t / spread
        gain = x0 * to_x0 + eps * to_eps
        m, v = x0 * mean + gain * (m - a_t * mean), gain**2 * v + std**2
    return float(m), float(v)

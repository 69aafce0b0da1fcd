"""Rates at which the gap closes as the path gets longer, exact and fitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import Array, Numbers, array, nonnegative, number
from etude.theory.continuous_paths import VE, VP, ContinuousPath, RectifiedFlow
from etude.theory.reward_functions import QuadraticReward
from etude.theory.targets import Gaussian, gaussian


@dataclass(frozen=True)
class Rate:
    """The rate `quantity ≃ constant * variable^(-exponent)`.

    `variable` is "T", "sigma_max", "exp(B)" (B = int beta) or "1/delta"; `regime` is "generic" or
    "centred".
    """

    exponent: float
    constant: float
    variable: str
    regime: str

    def __call__(self, path: ContinuousPath) -> Array:
        """Compute the asymptote on a path (an array where its horizon is one)."""
        return np.asarray(self.constant * natural(path)[1] ** -self.exponent)

    def __str__(self) -> str:
        return f"{self.constant:.4g} * {self.variable}^-{self.exponent:g} ({self.regime})"


def natural(path: ContinuousPath) -> tuple[str, Array]:
    """Return name and value of the variable in which a path's rate is a power.

    EtudeError if the rectified flow starts from pure noise, or the path is of another class.
    """
    if isinstance(path, VE):
        own_top = path.sigma == "geometric" and not np.array_equal(path.sigma_max, path.T)
        return ("sigma_max", path.sigma_max) if own_top else ("T", path.T)
    if isinstance(path, VP):
        return "exp(B)", np.asarray(np.exp(path.total))
    if isinstance(path, RectifiedFlow):
        if np.any(path.delta == 0):
            raise EtudeError("a rectified flow from pure noise has no prior mismatch and no rate: pass delta above 0.")
        return "1/delta", np.asarray(1.0 / path.delta)
    raise EtudeError(f"{type(path).__name__} has no known rate: pass a VE, VP or RectifiedFlow path.")


def rates(target: Gaussian, path: ContinuousPath, reward: QuadraticReward, eta: float) -> Rate:
    """Compute the leading rate of the continuous-time gap as the path gets longer, for eta > 0.

    With Phi_eta = (C/(C + V))^(kappa/2), kappa = 1 + eta^2, and g = E grad r, the gap is a sum of

        V^(-1/2)      -g^T C^(1/2) m                                    (the ODE's mean error)
        V^(-kappa/2)  +g^T C^(kappa/2) m                                (the SDE's mean error)
        V^(-1)        -m^T C^(1/2) Q C^(1/2) m - tr(Q C (e - C))        (centred: the first is 0)
        V^(-kappa)    the same with C^(kappa/2) and the other sign

    with e = 0 for VE (V = sigma_T^2) and e = 1 for VP (V = exp(B) - 1). A rectified flow, where
    V^(-1/2) = delta / (1 - delta), adds -2 tr(Q C) V^(-1/2) and 2 tr(Q C^kappa) V^(1/2 - kappa).
    The rate is that of the slowest term whose coefficient does not vanish (1e-12 of its size):
    "generic" for V^(-1/2), "centred" otherwise. A constant of 0 means that every term vanishes.
    EtudeError at eta 0, where there is no gap, and for a path of no known rate (`natural`).
    """
    target, kappa = gaussian(target, "rates"), 1.0 + float(nonnegative(number(eta, "eta"), "eta")) ** 2
    if kappa == 1.0:
        raise EtudeError("eta is 0, where the SDE is the ODE and the gap is 0: ask for a rate at an eta above 0.")
    merged: dict[float, tuple[float, float]] = {}
    for power, coefficient, size in _terms(target, path, reward, kappa):
        total, scale = merged.get(round(power, 12), (0.0, 0.0))
        merged[round(power, 12)] = (total + coefficient, scale + size)
    present = [(p, x) for p, (x, size) in sorted(merged.items()) if abs(x) > 1e-12 * size]
    power, constant = present[0] if present else (float("inf"), 0.0)
    return _rate(path, power, constant, "generic" if power == 0.5 else "centred")


def asymptotic_series(target: Gaussian, path: ContinuousPath, reward: QuadraticReward, eta: float) -> Array:
    """Add up all terms of `rates`: closer than the leading one, above all at small eta."""
    target, kappa = gaussian(target, "asymptotic_series"), 1.0 + float(nonnegative(number(eta, "eta"), "eta")) ** 2
    terms = _terms(target, path, reward, kappa)
    return np.asarray(sum(coefficient * path.start().V ** -power for power, coefficient, _ in terms))


def own_error_rates(target: Gaussian, path: ContinuousPath, eta: float) -> tuple[Rate, Rate]:
    """Compute the rates of the SDE_eta sampler's |mean error| and trace of the variance error."""
    target, kappa = gaussian(target, "own_error_rates"), 1.0 + float(nonnegative(number(eta, "eta"), "eta")) ** 2
    m, c = target.to_eigen(target.mu), target.spectrum
    mean = float(np.linalg.norm(c ** (kappa / 2) * m))
    if isinstance(path, RectifiedFlow):
        power, variance = kappa - 0.5, 2.0 * float(np.sum(c**kappa))
    else:
        power, variance = kappa, float(np.sum(c**kappa * (_excess(path) - c)))
    return _rate(path, kappa / 2, mean, "mean"), _rate(path, power, variance, "variance")


def _excess(path: ContinuousPath) -> float:
    return 0.0 if isinstance(path, VE) else 1.0


def _rate(path: ContinuousPath, power: float, constant: float, regime: str) -> Rate:
    """Convert a power of 1/V to a power of the path's own variable."""
    variable, _ = natural(path)
    per_v = 1.0 if variable == "exp(B)" or (isinstance(path, VE) and path.sigma == "sqrt") else 2.0
    return Rate(per_v * power, constant, variable, regime)


def _terms(
    target: Gaussian, path: ContinuousPath, reward: QuadraticReward, kappa: float
) -> list[tuple[float, float, float]]:
    """Return (power of 1/V, coefficient, sum of sizes) of every term up to V^(-kappa)."""
    Q = reward.parts(target.d)[0]
    Q = Q if target.basis is None else target.basis.T @ Q @ target.basis
    m, c, g = target.to_eigen(target.mu), target.spectrum, target.to_eigen(reward.gradient(target.mu))
    out = []
    for k, sign in ((1.0, -1.0), (kappa, 1.0)):
        root = c ** (k / 2)
        linear, moved = g * root * m, root * m
        square, spread = (moved[:, None] * Q) * moved, np.diagonal(Q) * root**2 * (_excess(path) - c)
        out.append((k / 2, sign * float(linear.sum()), float(np.abs(linear).sum())))
        apart = np.abs(np.diagonal(Q)) * root**2 * (_excess(path) + c)  # the size before e - c cancels
        out.append((k, sign * float(square.sum() + spread.sum()), float(np.abs(square).sum() + apart.sum())))
        if isinstance(path, RectifiedFlow):
            extra = 2.0 * np.diagonal(Q) * c**k
            out.append((k - 0.5, sign * float(extra.sum()), float(np.abs(extra).sum())))
    return out


@dataclass(frozen=True)
class Fit:
    """The fit `|quantity| ≈ constant * variable^(-exponent)`, and its largest error in the log."""

    exponent: float
    constant: float
    residual: float


def fit_rate(variable: Numbers, quantity: Numbers, tail: float = 0.5) -> Fit:
    """Fit a power law to the share `tail` of the points with the largest `variable`.

    It is a least-squares fit of the logarithms. The constant has the sign of the last point.
    EtudeError for fewer than 4 points, lists of two lengths, or a quantity of 0.
    """
    x, y = array(variable, "the variable"), array(quantity, "the quantity")
    if x.ndim != 1 or x.shape != y.shape or x.size < 4:
        raise EtudeError(f"a rate needs 4 points or more in two lists of one length, got {x.shape} and {y.shape}.")
    order = np.argsort(x)[-max(3, round(tail * x.size)) :]
    x, y = x[order], y[order]
    if np.any(y == 0) or np.any(x <= 0):
        raise EtudeError("a power law cannot be fitted through zeros: leave out the points where the quantity is 0.")
    design = np.stack([np.ones_like(x), -np.log(x)], axis=1)
    (level, slope), *_ = np.linalg.lstsq(design, np.log(np.abs(y)), rcond=None)
    residual = float(np.abs(design @ [level, slope] - np.log(np.abs(y))).max())
    return Fit(float(slope), float(np.sign(y[-1]) * np.exp(level)), residual)

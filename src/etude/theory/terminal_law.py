"""Terminal laws of the continuous-time samplers of a Gaussian target, for every eta >= 0.

The sampler starts from the prior and follows the exact score. In an eigen-direction of C with
eigenvalue c, from level q = V down to q0 (`continuous_paths`),

    Phi_eta = ((c + q0) / (c + V))^((1 + eta^2) / 2) = Phi_0^(1 + eta^2)                    (contraction factor)
    E y     = m - Phi_eta m,        Var y = c + q0 + Phi_eta^2 (tau - V - c),        x = a y.

Every eta has the exact law in the limit V -> infinity; a larger eta forgets the wrong start faster.
"""

from __future__ import annotations

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import Array, Numbers, nonnegative
from etude.theory.continuous_paths import ContinuousPath, Start, as_path
from etude.theory.targets import Gaussian, GaussianMixture


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
    m = target.to_eigen(target.mu)
    mean = target.mu - target.from_eigen(phi * m)
    q = np.asarray(q_stop, dtype=np.float64)[..., None]
    return Gaussian.from_spectrum(mean, target.spectrum + q + variance_error(target, start, phi), target)


def variance_error(target: Gaussian, start: Start, phi: Array) -> Array:
    """Compute `Phi^2 (tau - V - c)`, [..., d], the variance's error from the wrong prior."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(phi > 0, phi**2 * (start.excess[..., None] - target.spectrum), 0.0))


def terminal_law(target: Gaussian, path: ContinuousPath | str, eta: Numbers, t_stop: Numbers = 0.0) -> Gaussian:
    """Compute the law of the eta-sampler at time `t_stop`, in x units.

    `eta`, `path.T` and `t_stop` may be arrays that broadcast together; the result is then a batch
    of laws.

    Raises:
        EtudeError: the target is a mixture, whose terminal law has no closed form (`reward_gap`
            gives its reward gap), or `t_stop` is not below the time that the path starts from.
    """
    target = gaussian(target, "terminal_law")
    path = as_path(path)
    stop = np.asarray(path.time(t_stop))
    if np.any(stop >= path.end):
        raise EtudeError(
            f"t_stop is {float(np.max(stop)):g}, but the path starts at {float(np.min(path.end)):g}: stop below it."
        )
    a, s = path.a(stop), path.s(stop)
    law = law_in_y(target, path.start(), eta, (s / a) ** 2)
    return Gaussian.from_spectrum(law.mu * a[..., None], law.spectrum * a[..., None] ** 2, target)


def gaussian(target: Gaussian | GaussianMixture, what: str) -> Gaussian:
    """Return the target if it is one Gaussian; an EtudeError for any other names `what`."""
    if isinstance(target, Gaussian):
        target.single(what)
        return target
    if isinstance(target, GaussianMixture):
        raise EtudeError(
            f"{what} is closed form for a Gaussian target only, got a mixture: use reward_gap for mixtures."
        )
    raise EtudeError(f"{what} got a {type(target).__name__}, which is not a law: pass Gaussian(mean, cov).")

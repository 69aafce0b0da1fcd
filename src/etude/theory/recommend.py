"""The eta whose sampler comes closest to a target, for a schedule, N and a score error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from etude.theory.arrays import Array, array, number, positive
from etude.theory.continuous_paths import is_path
from etude.theory.laws import ScoreError, as_score_error, law_in_y, law_of_steps, sampler_law
from etude.theory.levels import levels
from etude.theory.sampler_steps import KernelChoice, Limit, SamplerSteps, continuous_eta, largest_eta, sampler_of
from etude.theory.targets import Gaussian, gaussian

POINTS = 121


@dataclass(frozen=True)
class Recommendation:
    """The eta that minimises the W2 distance of the sampler to the target, with the curve.

    Attributes:
        eta, error: the minimum and the W2 distance there.
        etas, errors: the curve: etas and W2 to the target, [n].
        prior: W2 to the target in continuous time with the exact score, [n]: the wrong start alone.
        discretisation: W2 to the target with the exact start and score, [n]: the steps alone.
        score: W2 between the sampler's laws with and without the score error, [n].
        to_ode: W2 between the SDE_eta's law and the ODE's, both with the score error, [n].
        at_limit: whether the minimum is at the largest eta allowed.
    """

    eta: float
    error: float
    etas: Array
    errors: Array
    prior: Array
    discretisation: Array
    score: Array
    to_ode: Array
    at_limit: bool


def recommended_eta(
    target: Gaussian,
    schedule: Any,
    steps: int | None = None,
    spacing: str = "trailing",
    score_error: ScoreError | None = None,
    *,
    kernel: KernelChoice = "gddim",
    eta_max: float = 3.0,
    known_sign: bool = True,
) -> Recommendation:
    """Find the eta in [0, eta_max] whose sampler comes closest to the target.

    A large eta forgets the wrong start and corrects score errors; a small eta loses less to the
    steps. The deployed ODE does not share the sampler's own error. `schedule`, `spacing`,
    `score_error` and `kernel` are those of `finite_step_law`.

    Args:
        steps: N. Default: continuous time on a path, where the score error alone speaks against a
            large eta.
        eta_max: largest eta; lowered to the largest that the kernel has on the grid.
        known_sign: False takes the worst case over the signs of the score error's bias and gain.

    Raises:
        EtudeError: as `finite_step_law`; the kernel has no one eta in continuous time.
    """
    target, error = gaussian(target, "recommended_eta"), as_score_error(score_error)
    top = float(positive(number(eta_max, "eta_max"), "eta_max"))
    if steps is not None or not is_path(schedule):
        schedule = levels(schedule, steps, spacing)
        top = min(top, largest_eta(schedule, kernel))
    signed = [error]
    if not known_sign:
        bias, signs = array(error.bias, "the score error's bias"), (1.0, -1.0)
        signed = [replace(error, bias=b * bias, gain=g * error.gain) for b, g in product(signs, signs)]

    def search(low: float, high: float) -> tuple[SamplerSteps | Limit, Array, Array, int]:
        etas = np.linspace(low, high, POINTS)
        sampler = sampler_of(schedule, etas, None, spacing, kernel)
        errors = np.max([_distance(sampler_law(target, sampler, each), target) for each in signed], axis=0)
        return sampler, etas, errors, int(np.argmin(errors))

    sampler, etas, errors, best = search(0.0, top)
    _, near, near_errors, lowest = search(etas[max(best - 1, 0)], etas[min(best + 1, POINTS - 1)])
    law = sampler_law(target, sampler, error)
    if isinstance(sampler, SamplerSteps):
        limits = continuous_eta(kernel, etas, sampler.levels)
        discretisation = _distance(law_of_steps(target, sampler, "exact"), target)
    else:
        limits, discretisation = sampler.eta, np.zeros_like(etas)
    return Recommendation(
        eta=float(near[lowest]),
        error=float(near_errors[lowest]),
        etas=etas,
        errors=errors,
        prior=_distance(law_in_y(target, sampler.start, limits), target),
        discretisation=discretisation,
        score=_distance(law, sampler_law(target, sampler)),
        to_ode=_distance(law, sampler_law(target, sampler.ode(), error)),
        at_limit=bool(near[lowest] > top * (1.0 - 1e-9)),
    )


def _distance(p: Gaussian, q: Gaussian) -> Array:
    """Compute W2 of laws that share an eigenbasis."""
    spread = (np.sqrt(p.spectrum) - np.sqrt(q.spectrum)) ** 2
    return np.asarray(np.sqrt(np.sum((p.mu - q.mu) ** 2 + spread, axis=-1)))

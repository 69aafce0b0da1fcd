"""Which eta: the trade-off between forgetting the wrong start and correcting score errors (large eta), and discretisation
(small eta), for a given target, schedule, step count and score error.

The error is the Wasserstein-2 distance of the sampler's law to the target. Training with a reward can only match what this
sampler produces to what it wants; what the sampler adds by itself is what the deployed ODE does not share.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from etude.theory.arrays import Array, array, number, positive
from etude.theory.continuous_paths import as_path
from etude.theory.exact_gap import is_path
from etude.theory.finite_step import ScoreError, as_score_error, finite_step_law, largest_ddim_eta
from etude.theory.levels import levels
from etude.theory.score_error import law_in_y_with_error
from etude.theory.targets import Gaussian
from etude.theory.terminal_law import gaussian, law_in_y

POINTS = 121


@dataclass(frozen=True)
class Recommendation:
    """`eta` minimises `error`, the W2 distance of the sampler to the target; the rest is the trade-off curve, arrays [n].

    etas, errors     the curve
    prior            W2 to the target in continuous time with the exact score: the wrong start alone
    discretisation   W2 to the target with the exact start and score: the steps alone
    score            W2 between the sampler's laws with and without the score error
    to_ode           W2 between the SDE_eta's law and the ODE's, both with the score error
    at_limit         whether the minimum is at the largest eta allowed (then more would be better still)
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
    kernel: str = "gddim",
    eta_max: float = 3.0,
    known_sign: bool = True,
) -> Recommendation:
    """The eta in [0, eta_max] whose sampler comes closest to the target, with the whole curve.

    `steps=None` is continuous time on a path: then nothing speaks against a large eta but the score error.
    For the kernel "ddim" eta_max is lowered to the largest eta that it has on the grid.
    `known_sign=False` takes the score error's size only: the worst case over the signs of its bias and gain.
    """
    target, error = gaussian(target, "recommended_eta"), as_score_error(score_error)
    laws = _Laws(target, schedule, steps, spacing, kernel)
    top = float(positive(number(eta_max, "eta_max"), "eta_max"))
    if kernel == "ddim" and laws.grid is not None:
        top = min(top, largest_ddim_eta(laws.grid))
    signs = _signs(error) if not known_sign else [error]

    def distance(etas: Array) -> Array:
        return np.max([_apart(laws(etas, each), target) for each in signs], axis=0)

    etas = np.linspace(0.0, top, POINTS)
    errors = distance(etas)
    best = int(np.argmin(errors))
    near = np.linspace(etas[max(best - 1, 0)], etas[min(best + 1, POINTS - 1)], POINTS)
    values = distance(near)
    found = int(np.argmin(values))
    clean, wrong = laws(etas, ScoreError()), laws(etas, error)
    return Recommendation(
        eta=float(near[found]),
        error=float(values[found]),
        etas=etas,
        errors=errors,
        prior=_apart(laws.continuous(etas), target),
        discretisation=_apart(laws(etas, ScoreError(), start="exact"), target),
        score=_apart(wrong, clean),
        to_ode=_apart(wrong, laws(np.zeros_like(etas), error)),
        at_limit=bool(near[found] > top * (1.0 - 1e-9)),
    )


class _Laws:
    """The sampler's law at an array of etas, with N steps or in continuous time."""

    def __init__(self, target: Gaussian, schedule: Any, steps: int | None, spacing: str, kernel: str):
        self.target, self.kernel = target, kernel
        self.grid = None if steps is None and is_path(schedule) else levels(schedule, steps, spacing)
        self.start = as_path(schedule).start() if self.grid is None else self.grid.start()

    def __call__(self, etas: Array, error: ScoreError, start: str = "prior") -> Gaussian:
        if self.grid is not None:
            return finite_step_law(self.target, self.grid, etas, kernel=self.kernel, start=start, score_error=error)
        if start == "exact":
            return Gaussian.from_spectrum(self.target.mu, self.target.spectrum + 0.0 * etas[:, None], self.target)
        return law_in_y_with_error(self.target, self.start, etas, error) if error else self.continuous(etas)

    def continuous(self, etas: Array) -> Gaussian:
        return law_in_y(self.target, self.start, etas)


def _signs(error: ScoreError) -> list[ScoreError]:
    bias = array(error.bias, "the score error's bias")
    return [
        replace(error, bias=sign_bias * bias, gain=sign_gain * error.gain)
        for sign_bias, sign_gain in itertools.product((1.0, -1.0), (1.0, -1.0))
    ]


def _apart(p: Gaussian, q: Gaussian) -> Array:
    """W2 of laws that share an eigenbasis."""
    spread = (np.sqrt(p.spectrum) - np.sqrt(q.spectrum)) ** 2
    return np.asarray(np.sqrt(np.sum((p.mu - q.mu) ** 2 + spread, axis=-1)))

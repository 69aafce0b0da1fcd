"""The eta whose sampler comes closest to a target, for a schedule, N and a score error.

A large eta forgets the wrong start and corrects score errors; a small eta loses less to the steps.
The error is the Wasserstein-2 distance of the sampler's law to the target. Training with a reward
can only match this sampler's images to what the reward asks for. The deployed ODE does not share
the sampler's own error.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from etude.theory.arrays import Array, array, number, positive
from etude.theory.continuous_paths import Start, as_path
from etude.theory.exact_gap import is_path
from etude.theory.finite_step import law_of_steps
from etude.theory.levels import levels
from etude.theory.sampler_steps import (
    KernelChoice,
    SamplerSteps,
    continuous_eta,
    largest_eta,
    path_eta,
    sampler_steps,
)
from etude.theory.score_error import ScoreError, as_score_error, law_in_y_with_error
from etude.theory.targets import Gaussian
from etude.theory.terminal_law import gaussian, law_in_y

POINTS = 121


@dataclass(frozen=True)
class Recommendation:
    """The eta that minimises the W2 distance of the sampler to the target, with the curve.

    Attributes:
        eta: the minimum.
        error: the W2 distance there.
        etas: the curve's etas, [n].
        errors: W2 to the target, [n].
        prior: W2 to the target in continuous time with the exact score, [n]: the wrong start alone.
        discretisation: W2 to the target with the exact start and score, [n]: the steps alone.
        score: W2 between the sampler's laws with and without the score error, [n].
        to_ode: W2 between the SDE_eta's law and the ODE's, both with the score error, [n].
        at_limit: whether the minimum is at the largest eta allowed, so that a larger one would be
            better still.
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

    Args:
        target: one Gaussian.
        schedule: as in `levels`.
        steps: N. Default: continuous time on a path, where the score error alone speaks against a
            large eta.
        spacing: as in `levels`.
        score_error: error of the noise prediction. Default: none.
        kernel: as in `finite_step_law`; eta is in its unit.
        eta_max: largest eta; lowered to the largest that the kernel has on the grid.
        known_sign: False takes the worst case over the signs of the score error's bias and gain.

    Raises:
        EtudeError: as `finite_step_law` and `continuous_eta`.
    """
    target, error = gaussian(target, "recommended_eta"), as_score_error(score_error)
    top = float(positive(number(eta_max, "eta_max"), "eta_max"))
    grid = None if steps is None and is_path(schedule) else levels(schedule, steps, spacing)
    if grid is not None:
        top = min(top, largest_eta(grid, kernel))
    signs = _signs(error) if not known_sign else [error]

    def sampler(etas: Array) -> _Samplers:
        return _Samplers.at(target, schedule if grid is None else grid, etas, kernel)

    def distances(samplers: _Samplers) -> Array:
        return np.asarray(np.max([_distance(samplers.law(each), target) for each in signs], axis=0))

    coarse = sampler(np.linspace(0.0, top, POINTS))
    etas, errors = coarse.etas, distances(coarse)
    best = int(np.argmin(errors))
    fine = sampler(np.linspace(etas[max(best - 1, 0)], etas[min(best + 1, POINTS - 1)], POINTS))
    near = distances(fine)
    lowest = int(np.argmin(near))
    law = coarse.law(error)
    return Recommendation(
        eta=float(fine.etas[lowest]),
        error=float(near[lowest]),
        etas=etas,
        errors=errors,
        prior=_distance(coarse.continuous(), target),
        discretisation=_distance(coarse.law(ScoreError(), start="exact"), target),
        score=_distance(law, coarse.law(ScoreError())),
        to_ode=_distance(law, coarse.ode(error)),
        at_limit=bool(fine.etas[lowest] > top * (1.0 - 1e-9)),
    )


@dataclass(frozen=True)
class _Samplers:
    """A sampler at an array of etas; `limits` are the gDDIM etas of its limit of short steps."""

    target: Gaussian
    etas: Array
    limits: Array
    start: Start
    steps: SamplerSteps | None

    @classmethod
    def at(cls, target: Gaussian, schedule: Any, etas: Array, kernel: KernelChoice) -> _Samplers:
        if is_path(schedule):
            path = as_path(schedule)
            return cls(target, etas, path_eta(kernel, etas, path), path.start(), None)
        steps = sampler_steps(schedule, etas, kernel=kernel)
        return cls(target, etas, continuous_eta(kernel, etas, steps.levels), steps.levels.start(), steps)

    def law(self, error: ScoreError, start: str = "prior") -> Gaussian:
        if self.steps is not None:
            return law_of_steps(self.target, self.steps, start, error)
        if start == "exact":
            spectrum = np.broadcast_to(self.target.spectrum, (*self.etas.shape, self.target.d))
            return Gaussian.from_spectrum(self.target.mu, spectrum, self.target)
        return law_in_y_with_error(self.target, self.start, self.limits, error) if error else self.continuous()

    def ode(self, error: ScoreError) -> Gaussian:
        etas = np.zeros_like(self.etas)
        return replace(self, etas=etas, limits=etas, steps=self.steps and self.steps.ode()).law(error)

    def continuous(self) -> Gaussian:
        return law_in_y(self.target, self.start, self.limits)


def _signs(error: ScoreError) -> list[ScoreError]:
    bias = array(error.bias, "the score error's bias")
    return [
        replace(error, bias=sign_bias * bias, gain=sign_gain * error.gain)
        for sign_bias, sign_gain in itertools.product((1.0, -1.0), (1.0, -1.0))
    ]


def _distance(p: Gaussian, q: Gaussian) -> Array:
    """Compute W2 of laws that share an eigenbasis."""
    spread = (np.sqrt(p.spectrum) - np.sqrt(q.spectrum)) ** 2
    return np.asarray(np.sqrt(np.sum((p.mu - q.mu) ** 2 + spread, axis=-1)))

"""The reward gap along training: exact ascent of the expected reward of a Gaussian model, no sampling.

The policy is the exact denoiser of N(m, C), or one with a score error, with an affine correction in
every step (`etude.theory.affine_policy`). Training follows the expected gradient of a method
(`TrainingProblem`); the ODE and the SDE of the same weights are measured beside it.
gap = E r(ODE) - E r(SDE at eta).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.errors import EtudeError, unknown
from etude.theory.affine_policy import Weights
from etude.theory.arrays import Array, Numbers, nonnegative, number, positive, whole
from etude.theory.line_training import LineTrainingProblem
from etude.theory.training_problem import TrainingProblem


@dataclass(frozen=True)
class Slope:
    """Derivatives of E r by the time t of the gradient flow d weights / dt = ascent, [etas].

    Attributes:
        ode: of the ODE's reward.
        sde: of the SDE's reward.
    """

    ode: Array
    sde: Array

    @property
    def gap(self) -> Array:
        """Derivative of the gap."""
        return self.ode - self.sde


def gap_slope(problem: TrainingProblem, weights: Weights | None = None) -> Slope:
    """Compute how the gap begins to move: its exact derivative at t = 0 of the gradient flow.

    With J_0 and J_eta the E r of the ODE and of the SDE as functions of the weights, and v the
    method's ascent, `d gap/dt = <grad J_0 - grad J_eta, v>`. For a policy gradient on every step v
    is grad J_eta on the noisy steps, so

        d gap/dt = <grad J_0, grad J_eta> - |grad J_eta|^2        over the noisy steps

    and the gap falls at first whenever |grad J_0| < |grad J_eta| there (Cauchy-Schwarz). A KL to
    the start has no part in it: its gradient is 0 at the start.

    For a shift alone and a linear reward of slope b on the line, with R_i = A_(i+1) ... A_N the
    response of the end to step i, `grad J = b k_i R_i`. Under gDDIM, as steps get short, a
    shift of x0_hat at level q = (s/a)^2 moves the end by

        S_eta(q) = kappa/(2 q) (c/(c + q))^(kappa/2) dq,      kappa = 1 + eta^2

    and S_0 < S_eta exactly below `q* = c (kappa^(2/eta^2) - 1)` (`level_of_equal_response`). So
    training the late steps alone makes the gap fall, and training the early ones alone makes it
    rise.
    """
    weights = weights or problem.start
    direction = problem.ascent(weights)
    ode, sde = (
        sampler.ascent(weights, sampler.course(weights), problem.end).dot(direction)
        for sampler in (problem.ode, problem.sde)
    )
    return Slope(ode, sde)


def level_of_equal_response(c: Numbers, eta: Numbers) -> Array:
    """Compute the q = (s/a)^2 at which ODE and SDE answer alike to a change of the network.

    `q* = c (kappa^(2/eta^2) - 1)`, from `(c + q)/c = kappa^(2/eta^2)`; its limit at eta = 0 is
    `c (e^2 - 1)`, and it falls with eta.
    """
    c, power = positive(c, "c"), nonnegative(eta, "eta") ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(power > 0, 2.0 * np.log1p(power) / power, 2.0)
    return np.asarray(c * np.expm1(rate))


@dataclass(frozen=True)
class GapAlongTraining:
    """The gap after each number of updates; arrays [updates + 1, etas].

    Attributes:
        ode: E r of the ODE.
        sde: E r of the SDE with the same weights, at its eta in every step.
        kl: KL of the SDE's trajectories to those before training.
        weights: the weights after the last update.
    """

    ode: Array
    sde: Array
    kl: Array
    weights: Weights

    @property
    def gap(self) -> Array:
        """E r(ODE) - E r(SDE)."""
        return self.ode - self.sde

    @property
    def rise(self) -> Array:
        """Rise of the ODE's reward since the start."""
        return self.ode - self.ode[0]

    @property
    def relative(self) -> Array:
        """The gap in units of the rise; NaN where there is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.rise == 0, np.nan, self.gap / self.rise)


def gap_along_training(
    problem: TrainingProblem | LineTrainingProblem,
    updates: int = 300,
    rate: float = 0.003,
    optimizer: str = "adam",
    betas: tuple[float, float] = (0.9, 0.999),
    measured_eta: float | None = None,
    on_update: Callable[[int], None] | None = None,
) -> GapAlongTraining:
    """Follow a method's expected gradient and compute the gap after every update.

    Args:
        updates: number of optimiser steps. Default: 300.
        rate: learning rate. Default: 0.003.
        optimizer: "adam" (torch's, arXiv 1412.6980, without weight decay) or "gradient" (plain
            ascent). Default: adam.
        betas: Adam's decay rates. Default: torch's, 0.9 and 0.999.
        measured_eta: one eta for the SDE of all weights. Default: the eta that each is trained at.
        on_update: called with the number of each update that is done.

    Raises:
        EtudeError: an argument is out of its range, or the rewards leave float64's range.
    """
    updates, rate = whole(updates, "updates"), float(positive(number(rate, "rate"), "rate"))
    if optimizer not in ("adam", "gradient"):
        raise unknown("optimizer", str(optimizer), ("adam", "gradient"))
    eta = None if measured_eta is None else number(measured_eta, "the measured eta")
    weights = problem.start
    step = _Adam(rate, betas) if optimizer == "adam" else lambda direction: direction.scaled(rate)
    values = []
    for update in range(updates + 1):
        with np.errstate(over="ignore", invalid="ignore"):
            if update:
                weights = weights + step(problem.ascent(weights, update))
                if on_update:
                    on_update(update)
            values.append(problem.measure(weights, eta))
        if not np.all(np.isfinite(values[-1])):
            raise EtudeError(
                f"the rewards leave the range of float64 after {update} updates: lower the rate, {rate:g}."
            )
    ode, sde_rewards, kl = (np.stack(each) for each in zip(*values, strict=True))
    return GapAlongTraining(ode, sde_rewards, kl, weights)


def gap_at_limit(problem: TrainingProblem) -> GapAlongTraining:
    """Compute the gap where policy gradients with a KL end: one row, at their only stationary point.

    At a stationary point every noisy step i has `E[(E grad V(A e + shift + u) - beta u/std^2) (w^T,
    1)] = 0`, with u the step's shift and V the value of the next state. The bracket is affine in w,
    and w has a covariance of full rank, so the bracket itself is 0: u is the best answer to the
    steps after it, and backwards every u is the only one. Hence no other stationary point exists.
    With kl "path" it is the law of `mean_policy_optimum`.

    EtudeError: beta is 0 (then many weights are optimal, with different gaps), the method is
    another one, the window moves, the problem is standardized or shared, or the reward outgrows
    the KL.
    """
    if not problem.has_limit:
        raise EtudeError(
            f"training by {problem.method} at beta = {problem.beta:g} has no limit in closed form here: use the method "
            "'policy-gradient' with a beta above 0 and a fixed window, neither standardized nor shared."
        )
    sampler, trained = problem.training(1)
    weights = sampler.fixed_point(problem.end, problem.beta, problem.path_kl, trained)
    ode, sde, kl = problem.measure(weights)
    return GapAlongTraining(ode[None], sde[None], kl[None], weights)


class _Adam:
    """Adam's steps, as torch's AdamW takes them without weight decay (eps 1e-8)."""

    def __init__(self, rate: float, betas: tuple[float, float]):
        self.rate, self.betas, self.count = rate, betas, 0
        self.moments: Any = (0.0, 0.0, 0.0, 0.0)

    def __call__(self, direction: Weights) -> Weights:
        (b1, b2), (F1, F2, f1, f2) = self.betas, self.moments
        self.count += 1
        F1, f1 = b1 * F1 + (1 - b1) * direction.F, b1 * f1 + (1 - b1) * direction.f
        F2, f2 = b2 * F2 + (1 - b2) * direction.F**2, b2 * f2 + (1 - b2) * direction.f**2
        self.moments = F1, F2, f1, f2
        c1, c2 = 1 - b1**self.count, 1 - b2**self.count
        return Weights(*(self.rate * m / c1 / (np.sqrt(v / c2) + 1e-8) for m, v in ((F1, F2), (f1, f2))))

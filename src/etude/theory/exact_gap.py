"""The reward gap, its parts and the improvement, in continuous time or with N steps.

reward gap  = E r(ODE samples) - E r(SDE_eta samples)      of one target (the tuned model)
improvement = E r(ODE samples of p*) - E r(ODE samples of p_ref),     p* ∝ p_ref exp(r / beta)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from etude.theory.arrays import Array, Numbers, nonnegative, plain
from etude.theory.continuous_paths import ContinuousPath, Start, as_path
from etude.theory.finite_step import finite_step_law, law_of_steps
from etude.theory.mixture import mixture_gap, mixture_improvement
from etude.theory.reward_functions import QuadraticReward, Reward, as_reward
from etude.theory.sampler_steps import KernelChoice, SamplerSteps, continuous_eta, path_eta, sampler_steps
from etude.theory.score_error import ScoreError, as_score_error
from etude.theory.targets import Gaussian, GaussianMixture
from etude.theory.terminal_law import contraction, gaussian, law_in_y
from etude.theory.tilt import tilt


def reward_gap(
    target: Gaussian | GaussianMixture,
    path_or_schedule: Any,
    reward: Reward,
    eta: Numbers | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: KernelChoice = "gddim",
) -> Any:
    """Compute E r of the ODE sampler minus E r of the SDE_eta sampler.

    Both start from the prior and follow the exact score.

    The gap of a Gaussian target is exact: a number, or an array where eta or T is one. The gap of a
    mixture is an `Approximation` for one eta, with its numerical error on the line and a 95 %
    interval in d > 1; `mixture_gap` takes its options.

    Args:
        target: the law that the score belongs to.
        path_or_schedule: a path, "sd", "ddpm" or "flow"; with N steps also a grid or a plan's
            `StepTable`.
        reward: quadratic or Lipschitz.
        eta: the stochasticity in the kernel's unit. Default: that of the kernel or of the table.
        steps: N. Default: continuous time on a path, and the grid's own number on a grid.
        spacing: as in `levels`.
        kernel: as in `finite_step_law`. In continuous time it says the unit of eta, and nothing
            else.

    Raises:
        EtudeError: as `finite_step_law`; the reward is neither.
    """
    reward = as_reward(reward)
    if isinstance(target, GaussianMixture):
        return mixture_gap(target, path_or_schedule, reward, eta, steps=steps, spacing=spacing, kernel=kernel)
    target = gaussian(target, "reward_gap")
    if steps is None and is_path(path_or_schedule):
        path = as_path(path_or_schedule)
        return continuous_gap(target, path.start(), reward, path_eta(kernel, eta, path))
    return step_gap(target, reward, sampler_steps(path_or_schedule, eta, steps, spacing, kernel))


def is_path(schedule: Any) -> bool:
    """Return whether the schedule is a path or its name, which has a limit in continuous time."""
    return isinstance(schedule, (str, ContinuousPath))


def continuous_gap(target: Gaussian, start: Start, reward: Reward, eta: Numbers) -> Any:
    """Compute the gap of the continuous-time samplers that start at `start` (Gaussian target)."""
    if not isinstance(reward, QuadraticReward):
        return reward_difference(reward, law_in_y(target, start, 0.0), law_in_y(target, start, eta))
    m = target.to_eigen(target.mu)
    ode, sde, apart = _contractions(target, start, eta)
    middle = target.mu - target.from_eigen(0.5 * (ode + sde) * m)
    spread = _product(apart * (ode + sde), start.excess[..., None] - target.spectrum)
    return plain(reward.change(-target.from_eigen(apart * m), middle, spread, target))


def _contractions(target: Gaussian, start: Start, eta: Numbers) -> tuple[Array, Array, Array]:
    """Compute Phi_0, Phi_eta, and `-Phi_0 (Phi_0^(eta^2) - 1)`, the accurate Phi_0 - Phi_eta."""
    ode, sde = contraction(target, start, 0.0), contraction(target, start, eta)
    power = nonnegative(eta, "eta")[..., None] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.where(ode > 0, -ode * np.expm1(power * np.log(ode)), 0.0)
    return ode, sde, apart


def _product(value: Array, excess: Array) -> Array:
    """Multiply, with 0 times infinity = 0."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(value != 0, value * excess, 0.0))


def step_gap(
    target: Gaussian,
    reward: Reward,
    sampler: SamplerSteps,
    start: str = "prior",
    score_error: ScoreError | None = None,
) -> Any:
    """Compute E r of the ODE's steps on the sampler's levels minus E r of the sampler."""
    ode, sde = (law_of_steps(target, each, start, score_error) for each in (sampler.ode(), sampler))
    return reward_difference(reward, ode, sde)


def reward_difference(reward: Reward, p: Gaussian, q: Gaussian) -> Any:
    """Compute E_p r - E_q r for laws of two samplers of one target, which share an eigenbasis."""
    if isinstance(reward, QuadraticReward):
        shift = p.mu - q.mu
        return plain(reward.change(shift, 0.5 * (p.mu + q.mu), p.spectrum - q.spectrum, p))
    return plain(np.asarray(reward.expected(p)) - np.asarray(reward.expected(q)))


def improvement(
    target: Gaussian | GaussianMixture,
    path: Any,
    reward: QuadraticReward,
    beta: float,
    steps: int | None = None,
    spacing: str = "trailing",
) -> Any:
    """Compute E r of the ODE sampler of the tilted law p* minus that of `target`, the reference.

    Both samplers start from the prior, follow exact scores, and use the same path, steps and
    spacing.
    """
    if isinstance(target, GaussianMixture):
        return mixture_improvement(target, tilt(target, reward, beta), path, reward, steps=steps, spacing=spacing)
    tuned, base = (ode_law(law, path, steps, spacing) for law in (tilt(target, reward, beta), target))
    return reward.expected(tuned) - reward.expected(base)


def ode_law(target: Gaussian, path: Any, steps: int | None, spacing: str) -> Gaussian:
    """Compute the law of the deterministic sampler, in continuous time or with N steps."""
    if steps is None and is_path(path):
        return law_in_y(gaussian(target, "ode_law"), as_path(path).start(), 0.0)
    return finite_step_law(target, path, 0.0, steps, spacing)


@dataclass(frozen=True)
class GapSplit:
    """The N-step gap and its parts: `total = prior + discretisation + score_error + interaction`.

    Attributes:
        total: the N-step gap.
        prior: the continuous-time gap from the same start, which the wrong initial law causes.
        discretisation: the gap of the two N-step samplers that both start from the exact law of
            x_T.
        score_error: the change of the N-step gap from the prior by the score error.
        interaction: the rest, small because the parts are nearly additive.
    """

    total: Any
    prior: Any
    discretisation: Any
    score_error: Any
    interaction: Any

    @property
    def dominant(self) -> Any:
        """Name of the largest part in absolute value, one for every entry of eta."""
        names = np.array(["prior", "discretisation", "score_error"])
        parts = np.abs(np.stack(np.broadcast_arrays(self.prior, self.discretisation, self.score_error)))
        largest = names[np.argmax(parts, axis=0)]
        return largest if np.ndim(largest) else str(largest)

    def as_dict(self) -> dict[str, Any]:
        """Return the parts by their names."""
        return asdict(self)


def gap_split(
    target: Gaussian,
    schedule: Any,
    reward: Reward,
    eta: Numbers | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: KernelChoice = "gddim",
    score_error: ScoreError | None = None,
) -> GapSplit:
    """Split the N-step gap of a Gaussian target into prior, discretisation and score error.

    Arguments are those of `reward_gap` and `finite_step_law`.

    Raises:
        EtudeError: as `finite_step_law`; from a start that is not pure noise also for a table
            without eta, and for a kernel without one eta in the limit of short steps
            (`continuous_eta`).
    """
    target, reward = gaussian(target, "gap_split"), as_reward(reward)
    sampler = sampler_steps(schedule, eta, steps, spacing, kernel)
    clean = step_gap(target, reward, sampler)
    limit = continuous_eta(kernel, eta, sampler.levels)
    prior = continuous_gap(target, sampler.levels.start(), reward, limit)
    discretisation = step_gap(target, reward, sampler, "exact")
    total = step_gap(target, reward, sampler, "prior", score_error) if as_score_error(score_error) else clean
    return GapSplit(total, prior, discretisation, total - clean, clean - prior - discretisation)

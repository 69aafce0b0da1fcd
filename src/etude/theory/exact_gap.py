"""The reward gap, its parts and the improvement, in continuous time or with N steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from etude.theory.arrays import Approximation, Numbers, nonnegative, plain
from etude.theory.continuous_paths import Start
from etude.theory.laws import ScoreError, as_score_error, contraction, law_in_y, law_of_steps, sampler_law
from etude.theory.mixture import mixture_gap, ode_value
from etude.theory.optima import tilt
from etude.theory.reward_functions import QuadraticReward, Reward, as_reward
from etude.theory.sampler_steps import KernelChoice, Limit, SamplerSteps, continuous_eta, sampler_of, sampler_steps
from etude.theory.targets import Gaussian, GaussianMixture, Law, gaussian


def reward_gap(
    target: Law,
    path_or_schedule: Any,
    reward: Reward,
    eta: Numbers | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: KernelChoice = "gddim",
) -> Any:
    """Compute E r of the ODE sampler minus E r of the SDE_eta sampler, with the exact score.

    The gap of a Gaussian target is exact: a number, or an array where eta or T is one. The gap of a
    mixture is an `Approximation` (`mixture_gap`). `eta`, `spacing` and `kernel` are those of
    `finite_step_law`, with its errors. In continuous time the kernel only says the unit of eta.

    Args:
        path_or_schedule: a path, "sd", "ddpm" or "flow"; with N steps also a grid or a plan's
            `StepTable`.
        steps: N. Default: continuous time on a path, and the grid's own number on a grid.
    """
    reward = as_reward(reward)
    if isinstance(target, GaussianMixture):
        return mixture_gap(target, path_or_schedule, reward, eta, steps, spacing, kernel)
    target = gaussian(target, "reward_gap")
    sampler = sampler_of(path_or_schedule, eta, steps, spacing, kernel)
    if isinstance(sampler, Limit):
        return continuous_gap(target, sampler.start, reward, sampler.eta)
    return step_gap(target, reward, sampler)


def continuous_gap(target: Gaussian, start: Start, reward: Reward, eta: Numbers) -> Any:
    """Compute the gap of the continuous-time samplers that start at `start` (Gaussian target)."""
    if not isinstance(reward, QuadraticReward):
        return reward_difference(reward, law_in_y(target, start, 0.0), law_in_y(target, start, eta))
    m, power = target.to_eigen(target.mu), nonnegative(eta, "eta")[..., None] ** 2
    ode, sde = contraction(target, start, 0.0), contraction(target, start, eta)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.where(ode > 0, -ode * np.expm1(power * np.log(ode)), 0.0)  # ode - sde without cancellation
        squares = apart * (ode + sde)
        # 0 times an infinite excess is 0.
        spread = np.where(squares != 0, squares * (start.excess[..., None] - target.spectrum), 0.0)
    middle = target.mu - target.from_eigen(0.5 * (ode + sde) * m)
    return plain(reward.change(-target.from_eigen(apart * m), middle, spread, target))


def step_gap(
    target: Gaussian, reward: Reward, sampler: SamplerSteps, start: str = "prior", score_error: ScoreError | None = None
) -> Any:
    """Compute E r of the ODE's steps on the sampler's levels minus E r of the sampler."""
    ode, sde = (law_of_steps(target, each, start, score_error) for each in (sampler.ode(), sampler))
    return reward_difference(reward, ode, sde)


def reward_difference(reward: Reward, p: Gaussian, q: Gaussian) -> Any:
    """Compute E_p r - E_q r for laws of two samplers of one target, which share an eigenbasis."""
    if isinstance(reward, QuadraticReward):
        return plain(reward.change(p.mu - q.mu, 0.5 * (p.mu + q.mu), p.spectrum - q.spectrum, p))
    return plain(np.asarray(reward.expected(p)) - np.asarray(reward.expected(q)))


def improvement(
    target: Law, path: Any, reward: QuadraticReward, beta: float, steps: int | None = None, spacing: str = "trailing"
) -> Any:
    """Compute E r of the ODE sampler of the tilted law p* minus that of `target`, the reference.

    Both samplers start from the prior, follow exact scores, and use the same path, steps and
    spacing.
    """
    sampler = sampler_of(path, 0.0, steps, spacing, "gddim")
    if isinstance(target, GaussianMixture):
        after, before = (ode_value(law, sampler, reward) for law in (tilt(target, reward, beta), target))
        return Approximation(float(after) - float(before), after.error + before.error, after.kind)
    tuned, base = (sampler_law(law, sampler) for law in (tilt(target, reward, beta), target))
    return reward.expected(tuned) - reward.expected(base)


@dataclass(frozen=True)
class GapSplit:
    """The N-step gap and its parts: `total = prior + discretisation + score_error + interaction`.

    Attributes:
        total: the N-step gap.
        prior: the continuous-time gap from the same start, which the wrong initial law causes.
        discretisation: the gap of the N-step samplers that start from the exact law of x_T.
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

    Arguments and errors are those of `reward_gap` and `finite_step_law`; EtudeError also off pure
    noise for a table without eta, and for a kernel without one eta in the limit of short steps.
    """
    target, reward = gaussian(target, "gap_split"), as_reward(reward)
    sampler = sampler_steps(schedule, eta, steps, spacing, kernel)
    clean = step_gap(target, reward, sampler)
    prior = continuous_gap(target, sampler.start, reward, continuous_eta(kernel, eta, sampler.levels))
    discretisation = step_gap(target, reward, sampler, "exact")
    total = step_gap(target, reward, sampler, "prior", score_error) if as_score_error(score_error) else clean
    return GapSplit(total, prior, discretisation, total - clean, clean - prior - discretisation)

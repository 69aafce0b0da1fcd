"""The reward gap and the improvement of a target, in continuous time or with N steps, and what the gap is made of.

reward gap  = E r(ODE samples) - E r(SDE_eta samples)      of one target (the tuned model)
improvement = E r(ODE samples of p*) - E r(ODE samples of p_ref),     p* ∝ p_ref exp(r / beta)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from etude.theory.arrays import Array, Numbers, nonnegative
from etude.theory.continuous_paths import Path, Start, as_path
from etude.theory.finite_step import ScoreError, as_score_error, finite_step_law
from etude.theory.gap_types import Reward, as_reward
from etude.theory.levels import Levels, levels
from etude.theory.mixture import mixture_gap, mixture_improvement
from etude.theory.reward_functions import QuadraticReward
from etude.theory.targets import Gaussian, GaussianMixture
from etude.theory.terminal_law import contraction, gaussian, law_in_y
from etude.theory.tilt import tilt


def reward_gap(
    target: Gaussian | GaussianMixture,
    path_or_schedule: Any,
    reward: Reward,
    eta: Numbers,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: str = "gddim",
) -> Any:
    """E r of the ODE sampler minus E r of the SDE_eta sampler, both started from the prior with the exact score.

    `path_or_schedule` is a path, "sd", "ddpm" or "flow", or (with N steps) a grid; `steps=None` is continuous time.
    Gaussian target: exact; a number, or an array where eta or T is one. Mixture: an `Estimate` for one eta, with its
    numerical error on the line and a 95 % interval in d > 1 (`mixture_gap` says more and takes the options).
    """
    reward = as_reward(reward)
    if isinstance(target, GaussianMixture):
        return mixture_gap(target, path_or_schedule, reward, eta, steps=steps, spacing=spacing, kernel=kernel)
    target = gaussian(target, "reward_gap")
    if steps is None and is_path(path_or_schedule):
        return continuous_gap(target, as_path(path_or_schedule).start(), reward, eta)
    return difference(reward, *ode_and_sde(target, levels(path_or_schedule, steps, spacing), eta, kernel))


def is_path(schedule: Any) -> bool:
    """Whether this is a path (or the name of one), which has a continuous-time limit, rather than a grid."""
    return isinstance(schedule, (str, Path))


def continuous_gap(target: Gaussian, start: Start, reward: Reward, eta: Numbers) -> Any:
    """The gap of the continuous-time samplers that start at `start` (Gaussian target)."""
    if not isinstance(reward, QuadraticReward):
        return difference(reward, law_in_y(target, start, 0.0), law_in_y(target, start, eta))
    m = target.to_eigen(target.mu)
    ode, sde, apart = _contractions(target, start, eta)
    middle = target.mu - target.from_eigen(0.5 * (ode + sde) * m)
    spread = _scaled(apart * (ode + sde), start.excess[..., None] - target.spectrum)
    return _number(reward.change(-target.from_eigen(apart * m), middle, spread, target))


def _contractions(target: Gaussian, start: Start, eta: Numbers) -> tuple[Array, Array, Array]:
    """Phi_0, Phi_eta and their difference without cancellation: `Phi_0 - Phi_eta = -Phi_0 (Phi_0^(eta^2) - 1)`."""
    ode, sde = contraction(target, start, 0.0), contraction(target, start, eta)
    power = nonnegative(eta, "eta")[..., None] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.where(ode > 0, -ode * np.expm1(power * np.log(ode)), 0.0)
    return ode, sde, apart


def _scaled(value: Array, excess: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(value != 0, value * excess, 0.0))


def ode_and_sde(
    target: Gaussian,
    grid: Levels,
    eta: Numbers,
    kernel: str = "gddim",
    start: str = "prior",
    score_error: ScoreError | None = None,
) -> tuple[Gaussian, Gaussian]:
    """The N-step laws of the ODE and of SDE_eta, computed together."""
    eta = nonnegative(eta, "eta")
    shape = np.broadcast_shapes(eta.shape, grid.a.shape[1:])
    both = np.stack([np.zeros(shape), np.broadcast_to(eta, shape)])
    law = finite_step_law(target, grid, both, kernel=kernel, start=start, score_error=score_error)
    return law[0], law[1]


def difference(reward: Reward, p: Gaussian, q: Gaussian) -> Any:
    """E_p r - E_q r for two laws of samplers of the same target (they share an eigenbasis)."""
    if isinstance(reward, QuadraticReward):
        shift = p.mu - q.mu
        return _number(reward.change(shift, 0.5 * (p.mu + q.mu), p.spectrum - q.spectrum, p))
    return _number(np.asarray(reward.expected(p)) - np.asarray(reward.expected(q)))


def improvement(
    target: Gaussian | GaussianMixture,
    path: Any,
    reward: QuadraticReward,
    beta: float,
    steps: int | None = None,
    spacing: str = "trailing",
) -> Any:
    """E r of the ODE sampler of the tilted law p* minus E r of the ODE sampler of `target` (the reference).

    Both samplers use the path, steps and spacing given and start from the prior; both scores are exact.
    """
    if isinstance(target, GaussianMixture):
        return mixture_improvement(target, tilt(target, reward, beta), path, reward, steps=steps, spacing=spacing)
    tuned, base = (ode_law(law, path, steps, spacing) for law in (tilt(target, reward, beta), target))
    return reward.expected(tuned) - reward.expected(base)


def ode_law(target: Gaussian, path: Any, steps: int | None, spacing: str) -> Gaussian:
    """The law of the deterministic sampler, in continuous time or with N steps."""
    if steps is None and is_path(path):
        return law_in_y(gaussian(target, "ode_law"), as_path(path).start(), 0.0)
    return finite_step_law(target, path, 0.0, steps, spacing)


@dataclass(frozen=True)
class GapSplit:
    """The N-step gap and its parts: `total = prior + discretisation + score_error + interaction`.

    prior            the continuous-time gap from the same start: what the wrong initial law does
    discretisation   the gap of the two N-step samplers, both started from the exact law of x_T
    score_error      what the score error adds to the N-step gap from the prior
    interaction      the rest (small: the parts are nearly additive)
    """

    total: Any
    prior: Any
    discretisation: Any
    score_error: Any
    interaction: Any

    @property
    def dominant(self) -> Any:
        """The name of the largest part in absolute value, one for every entry of eta."""
        names = np.array(["prior", "discretisation", "score_error"])
        parts = np.abs(np.stack(np.broadcast_arrays(self.prior, self.discretisation, self.score_error)))
        found = names[np.argmax(parts, axis=0)]
        return found if np.ndim(found) else str(found)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def gap_split(
    target: Gaussian,
    schedule: Any,
    reward: Reward,
    eta: Numbers,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: str = "gddim",
    score_error: ScoreError | None = None,
) -> GapSplit:
    """Splits the N-step reward gap of a Gaussian target into prior mismatch, discretisation and score error."""
    target, reward = gaussian(target, "gap_split"), as_reward(reward)
    grid = levels(schedule, steps, spacing)

    def gap(start: str, error: ScoreError | None) -> Any:
        return difference(reward, *ode_and_sde(target, grid, eta, kernel, start, error))

    clean = gap("prior", None)
    prior, discretisation = continuous_gap(target, grid.start(), reward, eta), gap("exact", None)
    total = gap("prior", score_error) if as_score_error(score_error) else clean
    return GapSplit(total, prior, discretisation, total - clean, clean - prior - discretisation)


def _number(value: Array) -> Any:
    return value if np.ndim(value) else float(value)

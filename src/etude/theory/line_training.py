"""The gap of a mixture on the line along training, by a Markov chain on a grid.

The network is the exact denoiser of the mixture with an affine correction in every step, as in
`etude.theory.affine_policy`. A state's value is taken as linear between grid points and is averaged
over the step's Gaussian exactly, so one formula serves noisy steps and those of the ODE. Gradients
are those of the chain itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import ndtr

from etude.errors import EtudeError
from etude.theory.affine_policy import Weights, output_unit
from etude.theory.arrays import Array, Numbers, nonnegative, number, whole
from etude.theory.reward_functions import Reward, as_reward
from etude.theory.sampler_steps import KernelChoice, SamplerSteps, sampler_steps
from etude.theory.targets import GaussianMixture
from etude.theory.training_problem import with_etas

REACH = 5.0  # of the grid, in standard deviations of the path; the rest of a normal law weighs 6e-7


@dataclass(frozen=True)
class _Chain:
    """Laws [N + 1, n] of the states on the grid, and each step's transition and its slope, [n, n]."""

    laws: list[Array]
    moves: list[Array]
    slopes: list[Array]


class LineTrainingProblem:
    """Policy gradients on a mixture on the line, for `gap_along_training`.

    Follows the gradient of E r - beta KL of the steps in the weights of the noisy steps of the SDE.
    E r has an error of the second order in the grid's spacing, about 1e-3 with the default.

    Args:
        target: a mixture on the line.
        schedule, reward, eta, steps, spacing, kernel, beta, prediction: as in `TrainingProblem`;
            the reward may be Lipschitz, too.
        points: number of grid points. Default: 401.

    Raises:
        EtudeError: the mixture is not on the line, eta is 0, or an argument is out of its range.
    """

    def __init__(
        self,
        target: GaussianMixture,
        schedule: Any,
        reward: Reward,
        eta: Numbers | None = None,
        steps: int | None = None,
        spacing: str = "trailing",
        kernel: KernelChoice = "gddim",
        *,
        beta: float = 0.0,
        prediction: Any = None,
        points: int = 401,
    ):
        if not isinstance(target, GaussianMixture) or target.d > 1:
            raise EtudeError(
                f"{target!r} is no mixture on the line: use TrainingProblem for a Gaussian in any dimension."
            )
        self.target, self.reward = target, as_reward(reward)
        self.beta = float(nonnegative(number(beta, "beta"), "beta"))
        self.kernel, self.points = kernel, whole(points, "points", 11)
        self.sde = with_etas(sampler_steps(schedule, eta, steps, spacing, kernel))
        if not (self.sde.variance > 0).any(axis=0).all():
            raise EtudeError("no step of the sampler is noisy, so a policy gradient trains nothing: raise eta.")
        self.levels, (self.steps, self.etas) = self.sde.levels, self.sde.x0.shape
        default = "noise" if self.levels.a[0] > 0 else "velocity"
        self.unit = output_unit(self.levels, default if prediction is None else prediction)
        self.ode = with_etas(self.sde.ode(), self.etas)

    @property
    def start(self) -> Weights:
        """The weights before training."""
        return Weights.zeros(self.steps, self.etas, 1)

    @cached_property
    def grids(self) -> Array:
        """Grid points of the states, [N + 1, n]: their reach follows the path, with room for training."""
        mean, deviation = float(self.target.mu[0]), float(self.target.matrix[0, 0]) ** 0.5
        a, s = self.levels.a, self.levels.s
        reach = REACH * (np.sqrt((a * deviation) ** 2 + s**2) + 0.1 * (abs(mean) + deviation)) + abs(a * mean)
        reach[0] = max(reach[0], REACH * float(self.levels.prior_variance) ** 0.5)
        return np.asarray(np.linspace(-1.0, 1.0, self.points) * reach[:, None])

    def _correction(self, i: int, e: int, weights: Weights) -> tuple[Array, Array]:
        """Return w, and the correction of x0_hat, at the grid points of step i."""
        a, s = self.levels.a[i], self.levels.s[i]
        white = (self.grids[i] - a * self.target.mu[0]) / np.sqrt(a**2 * self.target.matrix[0, 0] + s**2)
        return white, self.unit[i] * (weights.F[i, e, 0, 0] * white + weights.f[i, e, 0])

    def chain(self, sampler: SamplerSteps, e: int, weights: Weights) -> _Chain:
        """Compute the states' laws and the steps of one eta."""
        first = self.grids[0] / np.sqrt(float(self.levels.prior_variance))
        law = np.exp(-0.5 * first**2)
        laws, moves, slopes = [law / law.sum()], [], []
        for i in range(self.steps):
            a, s, x = float(self.levels.a[i]), float(self.levels.s[i]), self.grids[i]
            exact = (
                self.target.posterior_mean(x[:, None] / a, (s / a) ** 2)[:, 0] if a > 0 else self.target.mu[0] + 0 * x
            )
            x0 = exact + self._correction(i, e, weights)[1]
            mean = sampler.x0[i, e] * x0 + sampler.eps[i, e] * (x - a * x0) / s
            move, slope = _transition(mean, float(sampler.variance[i, e]), self.grids[i + 1])
            moves.append(move)
            slopes.append(slope)
            laws.append(laws[-1] @ move)
        return _Chain(laws, moves, slopes)

    def ascent(self, weights: Weights, update: int = 1) -> Weights:
        """Compute the gradient of E r - beta KL; 0 in steps without noise."""
        out = self.start
        lever = self.unit[:, None] * (
            self.sde.x0 - self.sde.eps * (self.levels.a / self.levels.s.clip(1e-300))[:-1, None]
        )
        for e in range(self.etas):
            chain, value = self.chain(self.sde, e, weights), self._values()
            for i in range(self.steps - 1, -1, -1):
                if self.sde.variance[i, e] > 0:
                    white, moved = self._correction(i, e, weights)
                    push = lever[i, e] * (chain.slopes[i] @ value)
                    if self.beta:
                        push = push - self.beta * lever[i, e] ** 2 / self.sde.variance[i, e] * moved / self.unit[i]
                    weight = chain.laws[i] * push
                    out.F[i, e, 0, 0], out.f[i, e, 0] = weight @ white, weight.sum()
                value = chain.moves[i] @ value
        return out

    def _values(self) -> Array:
        return np.asarray(self.reward(self.grids[-1]), dtype=np.float64)

    def measure(self, weights: Weights, eta: float | None = None) -> tuple[Array, Array, Array]:
        """Compute E r of the ODE and of the SDE, and the KL of the SDE's trajectories, each [etas].

        An eta measures all weights with one SDE.
        """
        sampler, out = self.sde, np.zeros((3, self.etas))
        if eta is not None:
            sampler = with_etas(sampler_steps(self.levels, eta, kernel=self.kernel), self.etas)
        for e in range(self.etas):
            ode, chain = self.chain(self.ode, e, weights), self.chain(sampler, e, weights)
            out[0, e], out[1, e] = (each.laws[-1] @ self._values() for each in (ode, chain))
            for i in np.flatnonzero(sampler.variance[:, e] > 0).tolist():
                lever = sampler.x0[i, e] - sampler.eps[i, e] * self.levels.a[i] / self.levels.s[i]
                moved = lever * self._correction(i, e, weights)[1]
                out[2, e] += chain.laws[i] @ moved**2 / (2.0 * sampler.variance[i, e])
        return out[0], out[1], out[2]


def _transition(mean: Array, variance: float, grid: Array) -> tuple[Array, Array]:
    """Average the hat functions of a grid over N(mean, variance): [n, n], and its slope by the mean.

    With h the spacing and G(u) = u Phi(u) + phi(u), the hat at g has the average
    `std/h [G((g + h - m)/std) - 2 G((g - m)/std) + G((g - h - m)/std)]`. A linear interpolation adds
    h^2/6 to the variance on average, which is taken from the step's noise where there is enough.
    """
    h = grid[1] - grid[0]
    edges = np.concatenate([[grid[0] - h], grid, [grid[-1] + h]])
    distance = edges[None, :] - np.clip(mean, grid[0], grid[-1])[:, None]
    std = np.sqrt(variance - h**2 / 6.0 if variance > h**2 / 3.0 else variance)
    if std > 0:
        u = distance / std
        share = ndtr(u)
        primitive = distance * share + std * np.exp(-0.5 * u**2) / np.sqrt(2.0 * np.pi)
    else:
        share, primitive = (distance > 0).astype(np.float64), np.maximum(distance, 0.0)
    move, slope = (np.diff(each, 2, axis=1) / h for each in (primitive, -share))
    total = move.sum(axis=1, keepdims=True)  # what falls beyond the grid is given back
    return move / total, slope / total

"""A model, a reward, a sampler and a method of training, of which every expectation is closed form."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from etude.errors import EtudeError, unknown
from etude.theory.affine_policy import AffineSampler, End, Mask, Weights, output_unit
from etude.theory.arrays import Array, Numbers, nonnegative, number, whole
from etude.theory.laws import ScoreError
from etude.theory.noised_images import matching_ascent, noised_distance_slope
from etude.theory.reward_functions import QuadraticReward
from etude.theory.sampler_steps import KernelChoice, SamplerSteps, sampler_steps
from etude.theory.targets import Gaussian, gaussian

METHODS = ("policy-gradient", "matching", "backpropagation")
KLS = ("steps", "path")


class TrainingProblem:
    """A model, a reward, a sampler and a method, of which the gap along training is exact.

    Methods and what they follow, with J = E r under the sampler that draws the images:

    * "policy-gradient" (DDPO, arXiv 2305.13301; Flow-GRPO, MixGRPO): the gradient of J - beta KL in
      the weights of the noisy steps, under the SDE, or under its `window` with the ODE around it.
      KL is that of the steps, each at the states as they come ("steps", which DDPO with KL and
      etude's trainer have), or of the whole trajectory ("path").
    * "matching" (NFT, arXiv 2509.16117, at the old policy): images of the ODE are noised again and
      matched with the weight r - E r; minus beta times the gradient of half the squared distance of
      the network's output to the reference's on noised images. No SDE is used.
    * "backpropagation" (DRaFT, arXiv 2309.17400): the gradient of J through every step of the ODE,
      with the same distance.

    Args:
        target: N(m, C), the law whose exact denoiser the network is before training.
        schedule, eta, steps, spacing, kernel: the SDE, as in `reward_gap`; eta may be [etas]. Each
            eta trains weights of its own.
        method: one of the three. Default: policy-gradient.
        beta: strength of the penalty. Default: 0.
        kl: "steps" or "path". Default: steps.
        window: `(start, size)`, or a strategy of `etude.sampling.windows`. Default: every step.
        standardized: divide r by its standard deviation under the present sampler, as group
            advantages do; beta is `objective.kl_coef` then. Default: False.
        score_error: error of the network before training. Default: none.
        prediction: output of the network, "sample", "noise" or "velocity", or |d x0_hat / d output|
            by step, [N]. It sets the unit of the weights, so the relative speed of the steps.
            Default: noise as SD1.5, and velocity as FLUX where the sampler starts from pure noise.
        shared: one F and f for all steps, as a network whose change is the same at every level;
            the last step and those outside a window move, too. Default: False.

    Raises:
        EtudeError: a name is unknown, the reward is not quadratic, the window does not fit, or no
            step can be trained.
    """

    def __init__(
        self,
        target: Gaussian,
        schedule: Any,
        reward: QuadraticReward,
        eta: Numbers | None = None,
        steps: int | None = None,
        spacing: str = "trailing",
        kernel: KernelChoice = "gddim",
        *,
        method: str = "policy-gradient",
        beta: float = 0.0,
        kl: str = "steps",
        window: Any = None,
        standardized: bool = False,
        score_error: ScoreError | None = None,
        prediction: Any = None,
        shared: bool = False,
    ):
        self.target, self.beta = (
            gaussian(target, "the gap along training"),
            float(nonnegative(number(beta, "beta"), "beta")),
        )
        if not isinstance(reward, QuadraticReward):
            raise EtudeError(f"the gap along training is exact for a QuadraticReward, got {type(reward).__name__}.")
        for name, value, known in (("method", method, METHODS), ("KL", kl, KLS)):
            if value not in known:
                raise unknown(name, str(value), known)
        self.reward, self.method, self.path_kl = reward, method, kl == "path"
        self.standardized, self.score_error, self.shared = standardized, score_error, shared
        sampler = with_etas(sampler_steps(schedule, eta, steps, spacing, kernel))
        self.kernel = kernel
        self.levels, self.steps, self.sde_steps = sampler.levels, sampler.levels.steps, sampler
        self.etas = sampler.x0.shape[1]
        self.unit = output_unit(
            self.levels, ("noise" if self.levels.a[0] > 0 else "velocity") if prediction is None else prediction
        )
        self.end = End.of(self.target, reward, float(self.levels.a[-1]))
        self.window = _window(window, self.steps)
        self.ode, self.sde = self._affine(sampler.ode()), self._affine(sampler)
        self._by_eta: dict[float, AffineSampler] = {}
        self._by_start: dict[int, tuple[AffineSampler, Mask]] = {}
        self.training(1)

    def _affine(self, sampler: SamplerSteps) -> AffineSampler:
        made = with_etas(sampler, self.etas)
        return AffineSampler.of(self.target, made, self.unit, self.score_error)

    @cached_property
    def start(self) -> Weights:
        """The weights before training."""
        return Weights.zeros(self.steps, self.etas, self.target.d)

    @property
    def has_limit(self) -> bool:
        """Whether `gap_at_limit` knows where training ends."""
        moves = any(self.window(update) != self.window(1) for update in range(2, 200))
        return self.method == "policy-gradient" and self.beta > 0 and not (self.standardized or self.shared or moves)

    def sde_at(self, eta: float | None) -> AffineSampler:
        """Return the SDE of every step, at one other eta for all weights if it is given."""
        if eta is None:
            return self.sde
        if eta not in self._by_eta:
            self._by_eta[eta] = self._affine(sampler_steps(self.levels, eta, kernel=self.kernel))
        return self._by_eta[eta]

    def training(self, update: int) -> tuple[AffineSampler, Mask]:
        """Return the sampler that draws the images of an update (from 1 on), and its trained steps.

        The latter are bool [N, etas].
        """
        if self.method != "policy-gradient":
            return self.ode, np.ones((self.steps, self.etas), dtype=bool)
        first, size = self.window(update)
        if first not in self._by_start:
            inside = (np.arange(self.steps) >= first) & (np.arange(self.steps) < first + size)
            ode, sde = with_etas(self.sde_steps.ode(), self.etas), self.sde_steps
            mixed = (np.where(inside[:, None], getattr(sde, n), getattr(ode, n)) for n in ("x0", "eps", "variance"))
            sampler = SamplerSteps(self.levels, *mixed)
            trained = sampler.variance > 0
            if not trained.any(axis=0).all():
                raise EtudeError(
                    "no step of the sampler is noisy, so a policy gradient trains nothing: raise eta, move the window, or use "
                    "the method 'matching' or 'backpropagation'."
                )
            self._by_start[first] = self._affine(sampler), trained
        return self._by_start[first]

    def ascent(self, weights: Weights, update: int = 1) -> Weights:
        """Compute the method's expected direction at some weights; 0 in steps that are not trained."""
        sampler, trained = self.training(update)
        course = sampler.course(weights)
        scale = 1.0 / course.spread(self.end) if self.standardized else np.ones(self.etas)
        end = self.end.scaled(scale)
        if self.method == "policy-gradient":
            out = sampler.ascent(weights, course, end, self.beta if self.path_kl else 0.0)
            if self.beta and not self.path_kl:
                out = out + sampler.penalty_slope(weights, course).scaled(-self.beta)
            out = out.scaled(trained)
        else:
            a, s = self.levels.a, self.levels.s
            images = course.mean[-1] + (float(a[-1]) - 1.0) * self.target.to_eigen(self.target.mu), course.cov[-1]
            if self.method == "backpropagation":
                out = sampler.ascent(weights, course, end)
            else:
                at_data = End.of(self.target, self.reward, 1.0).scaled(scale)
                out = matching_ascent(self.target, self.levels, self.unit, weights, images, at_data, self.score_error)
            if self.beta:
                distance = noised_distance_slope(weights, sampler.whiten, a[:-1], s[:-1], images)
                out = out + distance.scaled(-self.beta)
        return out.summed() if self.shared else out

    def measure(self, weights: Weights, eta: float | None = None) -> tuple[Array, Array, Array]:
        """Compute E r of the ODE and of the SDE, and the KL of the SDE's trajectories, each [etas].

        An eta measures all weights with one SDE.
        """
        sampler = self.sde_at(eta)
        course = sampler.course(weights)
        ode = self.ode.course(weights).reward(self.end)
        return ode, course.reward(self.end), sampler.kl(weights, course)


def with_etas(sampler: SamplerSteps, etas: int | None = None) -> SamplerSteps:
    """Give the coefficients an axis for the etas, [N, etas]."""
    if sampler.levels.a.ndim > 1 or sampler.x0.ndim > 2:
        raise EtudeError("the gap along training takes one horizon and a list of etas: pass eta as a number or [etas].")
    wide = [each.reshape(len(each), -1) for each in (sampler.x0, sampler.eps, sampler.variance)]
    shape = (len(wide[0]), etas or wide[0].shape[1])
    return SamplerSteps(sampler.levels, *(np.broadcast_to(each, shape) for each in wide))


def _window(window: Any, steps: int) -> Callable[[int], tuple[int, int]]:
    """Return the window, (start, size), as a function of the update."""
    if window is None:
        return lambda update: (0, steps)
    if hasattr(window, "start_at"):
        return lambda update: (window.start_at(update), window.size)
    first, size = (
        whole(each, f"the window's {name}", least)
        for each, name, least in zip(window, ("start", "size"), (0, 1), strict=True)
    )
    if first + size > steps:
        raise EtudeError(
            f"a window of size {size} from step {first} on does not fit in {steps} steps: make it smaller."
        )
    return lambda update: (first, size)

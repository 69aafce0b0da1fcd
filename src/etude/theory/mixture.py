"""The reward gap and the improvement of mixtures, with their errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from etude.errors import EtudeError
from etude.theory.approximation import NUMERICAL, Approximation
from etude.theory.arrays import Numbers, whole
from etude.theory.continuous_paths import ContinuousPath, as_path
from etude.theory.line_flow import line_values
from etude.theory.line_steps import line_step_values
from etude.theory.reward_functions import Reward, as_reward
from etude.theory.sampler_steps import KernelChoice, eta_of, path_eta, sampler_steps
from etude.theory.simulation import Simulation, simulate_continuous, simulate_steps
from etude.theory.targets import GaussianMixture


def mixture_gap(
    target: GaussianMixture,
    path: Any,
    reward: Reward,
    eta: Numbers | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: KernelChoice = "gddim",
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> Any:
    """Compute E r(ODE) - E r(SDE_eta) of a mixture, as an `Approximation`.

    Both samplers start from the prior and follow the exact score.

    On the line `line_flow` computes it in continuous time and `line_steps` with N steps; `.error`
    is the numerical error. In d > 1 it comes from `samples` paired simulations; `.error` is the
    half-width of a 95 % interval. An array of etas gives an object array of approximations.

    The other arguments and the errors are those of `reward_gap`.
    """
    reward, samples = as_reward(reward), whole(samples, "samples", 2)
    if not isinstance(target, GaussianMixture):
        raise EtudeError(
            f"mixture_gap takes a GaussianMixture, got {type(target).__name__}: use reward_gap for a Gaussian."
        )
    continuous = _path_of(path, steps)
    if continuous is None and np.ndim(0.0 if eta is None else eta) == 0:
        return _step_gap(target, path, reward, eta, steps, spacing, kernel, samples, seed)
    etas = eta_of(kernel, eta)
    if continuous is None:
        gaps = [_step_gap(target, path, reward, e, steps, spacing, kernel, samples, seed) for e in etas.flat]
    else:
        gaps = _continuous_gaps(target, continuous, reward, path_eta(kernel, etas, continuous).ravel(), samples, seed)
    if not etas.ndim:
        return gaps[0]
    out = np.empty(etas.size, dtype=object)
    out[:] = gaps
    return out.reshape(etas.shape)


def _continuous_gaps(
    target: GaussianMixture, path: ContinuousPath, reward: Reward, etas: Any, samples: int, seed: int
) -> list[Approximation]:
    start = path.start()
    if not np.isfinite(start.V):
        return [Approximation(0.0, 0.0, "exact: the path starts from pure noise")] * len(etas)
    if target.d > 1:
        return [simulate_continuous(target, start, reward, float(eta), samples, seed).gap for eta in etas]
    values = line_values(target, start, reward, etas)
    return [Approximation(gap, error, NUMERICAL) for gap, error in zip(values.gaps, values.gap_errors, strict=True)]


def _step_gap(
    target: GaussianMixture,
    path: Any,
    reward: Reward,
    eta: Numbers | None,
    steps: int | None,
    spacing: str,
    kernel: KernelChoice,
    samples: int,
    seed: int,
) -> Approximation:
    if target.d > 1:
        return simulate_gap(target, path, reward, eta, steps, spacing, kernel, samples=samples, seed=seed).gap
    ode, sde = line_step_values(target, sampler_steps(path, eta, steps, spacing, kernel), reward)
    return Approximation(float(ode) - float(sde), ode.error + sde.error, NUMERICAL)


def simulate_gap(
    target: GaussianMixture,
    path: Any,
    reward: Reward,
    eta: Numbers | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: KernelChoice = "gddim",
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> Simulation:
    """Simulate the samplers of `mixture_gap` with the exact score in any dimension, at one eta.

    The result also has E r of both samplers and the size of the extrapolation to continuous time.
    """
    continuous, reward = _path_of(path, steps), as_reward(reward)
    if continuous is None:
        return simulate_steps(target, sampler_steps(path, eta, steps, spacing, kernel), reward, samples, seed)
    strength = float(path_eta(kernel, eta, continuous))
    return simulate_continuous(target, continuous.start(), reward, strength, samples, seed)


def mixture_improvement(
    reference: GaussianMixture,
    tuned: GaussianMixture,
    path: Any,
    reward: Reward,
    steps: int | None = None,
    spacing: str = "trailing",
) -> Approximation:
    """Compute E r(ODE of `tuned`) - E r(ODE of `reference`), with the error as in `mixture_gap`."""
    after, before = (_ode_value(law, path, reward, steps, spacing) for law in (tuned, reference))
    return Approximation(float(after) - float(before), after.error + before.error, after.kind)


def _ode_value(law: GaussianMixture, path: Any, reward: Reward, steps: int | None, spacing: str) -> Approximation:
    continuous = _path_of(path, steps)
    start = None if continuous is None else continuous.start()
    if start is not None and not np.isfinite(start.V):
        return Approximation(float(reward.expected(law)), 0.0, NUMERICAL)
    if law.d > 1:
        return simulate_gap(law, path, reward, 0.0, steps, spacing).ode
    if start is not None:
        values = line_values(law, start, reward, np.zeros(0))
        return Approximation(values.ode, values.ode_error, NUMERICAL)
    return line_step_values(law, sampler_steps(path, 0.0, steps, spacing), reward)[0]


def _path_of(path: Any, steps: int | None) -> ContinuousPath | None:
    """Return the path of a question in continuous time; None for a question about N steps."""
    if steps is not None or not isinstance(path, (str, ContinuousPath)):
        return None
    path = as_path(path)
    if path.start().V.ndim:
        raise EtudeError("a mixture takes one horizon at a time: pass a path whose T is a number.")
    return path

"""The reward gap and the improvement of mixtures: with a numerical error on the line, with a 95 % interval in d > 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import Numbers, nonnegative, whole
from etude.theory.continuous_paths import Path, Start, as_path
from etude.theory.estimate import Estimate
from etude.theory.gap_types import Reward, as_reward
from etude.theory.levels import levels
from etude.theory.line_flow import line_values
from etude.theory.line_steps import KIND, line_step_gap
from etude.theory.simulation import Simulated, simulate_continuous, simulate_steps
from etude.theory.targets import GaussianMixture


def mixture_gap(
    target: GaussianMixture,
    path: Any,
    reward: Reward,
    eta: Numbers,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: str = "gddim",
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> Any:
    """E r(ODE) - E r(SDE_eta) of a mixture, started from the prior with the exact score, as an `Estimate`.

    On the line: `line_flow` in continuous time, `line_steps` with N steps; `.error` is the numerical error.
    In d > 1: `samples` paired simulations; `.error` is the half-width of a 95 % interval.
    An array of etas gives an object array of `Estimate`s.
    """
    etas, reward = nonnegative(eta, "eta"), as_reward(reward)
    if not isinstance(target, GaussianMixture):
        raise EtudeError(
            f"mixture_gap takes a GaussianMixture, got {type(target).__name__}: use reward_gap for a Gaussian."
        )
    samples, start = whole(samples, "samples", 2), _start(path, steps)
    if start is not None and target.d == 1 and np.isfinite(start.V):
        values = line_values(target, start, reward, etas.ravel())
        found = [Estimate(float(g), float(e), KIND) for g, e in zip(values.gaps, values.gap_errors, strict=True)]
    else:
        found = [
            _one(target, path, start, reward, float(e), steps, spacing, kernel, samples, seed) for e in etas.ravel()
        ]
    if not etas.ndim:
        return found[0]
    out = np.empty(etas.size, dtype=object)
    out[:] = found
    return out.reshape(etas.shape)


def _one(
    target: GaussianMixture,
    path: Any,
    start: Start | None,
    reward: Reward,
    eta: float,
    steps: int | None,
    spacing: str,
    kernel: str,
    samples: int,
    seed: int,
) -> Estimate:
    if start is not None and not np.isfinite(start.V):
        return Estimate(0.0, 0.0, "exact: the path starts from pure noise")
    if target.d == 1:
        ode, sde = line_step_gap(target, levels(path, steps, spacing), reward, eta, kernel)
        return Estimate(float(ode) - float(sde), ode.error + sde.error, KIND)
    return simulated(target, path, reward, eta, steps, spacing, kernel, samples=samples, seed=seed).gap


def simulated(
    target: GaussianMixture,
    path: Any,
    reward: Reward,
    eta: float,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: str = "gddim",
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> Simulated:
    """The same by exact-score simulation in any dimension, with E r of both samplers and the extrapolation's size."""
    start, reward = _start(path, steps), as_reward(reward)
    if start is not None:
        return simulate_continuous(target, start, reward, eta, samples, seed)
    return simulate_steps(target, levels(path, steps, spacing), reward, eta, kernel, samples, seed)


def mixture_improvement(
    reference: GaussianMixture,
    tuned: GaussianMixture,
    path: Any,
    reward: Reward,
    steps: int | None = None,
    spacing: str = "trailing",
) -> Estimate:
    """E r(ODE of `tuned`) - E r(ODE of `reference`), with the error as in `mixture_gap`."""
    values = [_ode(law, path, reward, steps, spacing) for law in (tuned, reference)]
    return Estimate(float(values[0]) - float(values[1]), values[0].error + values[1].error, values[0].kind)


def _ode(law: GaussianMixture, path: Any, reward: Reward, steps: int | None, spacing: str) -> Estimate:
    start = _start(path, steps)
    if start is not None and not np.isfinite(start.V):
        return Estimate(float(reward.expected(law)), 0.0, KIND)
    if law.d > 1:
        return simulated(law, path, reward, 0.0, steps, spacing).ode
    if start is not None:
        values = line_values(law, start, reward, np.zeros(0))
        return Estimate(values.ode, values.ode_error, KIND)
    return line_step_gap(law, levels(path, steps, spacing), reward, 0.0, "gddim")[0]


def _start(path: Any, steps: int | None) -> Start | None:
    """Where the continuous-time sampler starts; None when the question is about N steps."""
    if steps is not None or not isinstance(path, (str, Path)):
        return None
    start = as_path(path).start()
    if start.V.ndim:
        raise EtudeError("a mixture takes one horizon at a time: pass a path whose T is a number.")
    return start

"""The gap of a mixture in d dimensions by simulation with the exact score, with a 95 % interval.

The ODE and the SDE start from the same prior draws, so most of the variance cancels. Continuous
time is the limit of gDDIM on a log-SNR grid. A run with N steps and one with N/2 share their
Brownian motion; they are extrapolated (2 fine - coarse, because gDDIM is of first order) before
averaging, and the change is reported as `bias_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.errors import EtudeError
from etude.theory.approximation import INTERVAL, Approximation
from etude.theory.arrays import Array
from etude.theory.continuous_paths import Start
from etude.theory.reward_functions import Reward
from etude.theory.sampler_steps import SamplerSteps
from etude.theory.targets import GaussianMixture

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Simulation:
    """E r of the ODE and of the SDE, and their gap, from paired draws.

    `bias_scale` is the size of the extrapolation to continuous time, and 0 with N steps.
    """

    ode: Approximation
    sde: Approximation
    gap: Approximation
    bias_scale: float


def simulate_steps(
    target: GaussianMixture, sampler: SamplerSteps, reward: Reward, samples: int, seed: int
) -> Simulation:
    """Simulate the N-step sampler, and the ODE on the same levels."""
    grid = sampler.levels
    if sampler.x0.ndim > 1:
        raise EtudeError("a mixture takes one eta and one horizon at a time: pass numbers.")
    rng = np.random.default_rng(seed)
    start = rng.standard_normal((samples, target.d)) * np.sqrt(grid.prior_variance)
    values = []
    for k in (sampler.ode(), sampler):
        x = start
        for i in range(grid.steps):
            a, s = float(grid.a[i]), float(grid.s[i])
            x0 = target.posterior_mean(x / a, (s / a) ** 2) if a > 0 else np.broadcast_to(target.mu, x.shape)
            x = k.x0[i] * x0 + k.eps[i] * (x - a * x0) / s
            if k.variance[i] > 0:
                x = x + np.sqrt(k.variance[i]) * rng.standard_normal(x.shape)
        values.append(_reward_values(reward, x, target))
    return _summary(values[0], values[1], bias_scale=0.0)


def simulate_continuous(
    target: GaussianMixture, start: Start, reward: Reward, eta: float, samples: int, seed: int, steps: int = 240
) -> Simulation:
    """Simulate the continuous-time samplers, extrapolated from `steps` and `steps`/2 steps.

    Raises:
        EtudeError: the path starts from pure noise, where the gap is exactly 0.
    """
    if not np.isfinite(start.V):
        raise EtudeError(
            "the path starts from pure noise, where the continuous-time gap is exactly 0: nothing to simulate."
        )
    rng, V = np.random.default_rng(seed), float(start.V)
    v = np.append(np.sqrt(V) * np.exp(np.linspace(0.0, _span(target, V), steps)), 0.0)
    begin = rng.standard_normal((samples, target.d)) * np.sqrt(V + float(start.excess))
    ends = {(e, stride): begin for e in (0.0, eta) for stride in (1, 2)}
    noise = np.zeros_like(begin)
    for i in range(0, steps, 2):
        middle, end = min(i + 1, steps), min(i + 2, steps)
        w2, b1, b2, b = _pair(v[i], v[middle], v[end], eta)
        z1, z2 = rng.standard_normal((2, *begin.shape))
        noise = (w2 * b1 * z1 + b2 * z2) / b if b > 0 else noise
        for e in (0.0, eta):
            z = (z1, z2, noise) if e > 0 else (0.0, 0.0, 0.0)
            ends[e, 1] = _step(target, ends[e, 1], v[i], v[middle], e, z[0])
            ends[e, 1] = _step(target, ends[e, 1], v[middle], v[end], e, z[1])
            ends[e, 2] = _step(target, ends[e, 2], v[i], v[end], e, z[2])
    fine, coarse = ([_reward_values(reward, ends[e, k], target) for e in (0.0, eta)] for k in (1, 2))
    values = [2.0 * f - c for f, c in zip(fine, coarse, strict=True)]
    change = float(np.mean((fine[0] - coarse[0]) - (fine[1] - coarse[1])))
    return _summary(values[0], values[1], bias_scale=abs(change))


def _span(target: GaussianMixture, V: float) -> float:
    """Return log(last level / first), the last a hundredth of the data's least deviation."""
    smallest = min(float(part.spectrum.min()) for part in target.components) ** 0.5
    return min(float(np.log(0.01 * smallest / V**0.5)), -1.0)


def _pair(v0: float, v1: float, v2: float, eta: float) -> tuple[float, float, float, float]:
    """Return how the noises of two fine gDDIM steps add up to the coarse step's noise.

    The four numbers are w of the second fine step, std of each fine step, and std of the coarse
    step.
    """

    def std(u: float, t: float) -> float:
        return u * float(np.sqrt(-np.expm1(2.0 * eta**2 * np.log(u / t)))) if u > 0 and eta > 0 else 0.0

    return (v2 / v1) ** (1.0 + eta**2) if v2 > 0 else 0.0, std(v1, v0), std(v2, v1), std(v2, v0)


def _step(target: GaussianMixture, y: Array, v_t: float, v_u: float, eta: float, z: Array | float) -> Array:
    """Take one gDDIM step in y = x/a."""
    x0 = target.posterior_mean(y, v_t**2)
    w = (v_u / v_t) ** (1.0 + eta**2)
    std = v_u * np.sqrt(1.0 - (v_u / v_t) ** (2.0 * eta**2))
    return np.asarray((1.0 - w) * x0 + w * y + std * z)


def _reward_values(reward: Reward, x: Array, target: GaussianMixture) -> Array:
    return np.asarray(reward(x[:, 0] if target.on_line else x), dtype=np.float64)


def _summary(ode: Array, sde: Array, bias_scale: float) -> Simulation:
    def mean(values: Array) -> Approximation:
        return Approximation(float(values.mean()), Z95 * float(values.std(ddof=1)) / values.size**0.5, INTERVAL)

    return Simulation(mean(ode), mean(sde), mean(ode - sde), bias_scale)

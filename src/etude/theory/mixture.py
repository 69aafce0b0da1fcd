"""The reward gap of mixtures: on the line by quadrature, in d dimensions by paired simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import INTERVAL, NUMERICAL, Approximation, Array, Numbers, whole
from etude.theory.continuous_paths import Start
from etude.theory.line import line_step_values, line_values
from etude.theory.reward_functions import Reward, as_reward
from etude.theory.sampler_steps import KernelChoice, Limit, SamplerSteps, sampler_of
from etude.theory.targets import GaussianMixture

Z95 = 1.959963984540054


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
    """Compute E r(ODE) - E r(SDE_eta) of a mixture: an `Approximation`, or an object array of them.

    On the line its `.error` is the numerical error. In d > 1 the gap comes from `samples` paired
    simulations, and `.error` is the half-width of a 95 % interval. The other arguments and the
    errors are those of `reward_gap`.
    """
    reward, samples = as_reward(reward), whole(samples, "samples", 2)
    if not isinstance(target, GaussianMixture):
        raise EtudeError(f"mixture_gap takes a mixture, got {type(target).__name__}: use reward_gap for a Gaussian.")
    sampler = _one_horizon(sampler_of(path, eta, steps, spacing, kernel))
    shape = sampler.eta.shape if isinstance(sampler, Limit) else sampler.x0.shape[1:]
    places = list(np.ndindex(shape))
    if isinstance(sampler, Limit) and not np.isfinite(sampler.start.V):
        gaps = [Approximation(0.0, 0.0, "exact: the path starts from pure noise")] * len(places)
    elif target.d > 1:
        gaps = [_simulate(target, sampler.at(place), reward, samples, seed).gap for place in places]
    elif isinstance(sampler, Limit):
        gaps = line_values(target, sampler.start, reward, sampler.eta.ravel())[1:]
    else:
        values = [line_step_values(target, sampler.at(place), reward) for place in places]
        gaps = [Approximation(float(ode) - float(sde), ode.error + sde.error, NUMERICAL) for ode, sde in values]
    if not shape:
        return gaps[0]
    out = np.empty(len(gaps), dtype=object)
    out[:] = gaps
    return out.reshape(shape)


def _one_horizon(sampler: SamplerSteps | Limit) -> SamplerSteps | Limit:
    if sampler.start.V.ndim:
        raise EtudeError("a mixture takes one horizon at a time: pass a path whose T is a number.")
    return sampler


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
    sampler = _one_horizon(sampler_of(path, eta, steps, spacing, kernel))
    return _simulate(target, sampler, as_reward(reward), samples, seed)


def ode_value(law: GaussianMixture, sampler: SamplerSteps | Limit, reward: Reward) -> Approximation:
    """Compute E r of a sampler at eta 0, with the error as in `mixture_gap`."""
    start = _one_horizon(sampler).start
    if isinstance(sampler, Limit) and not np.isfinite(start.V):
        return Approximation(float(reward.expected(law)), 0.0, NUMERICAL)
    if law.d > 1:
        return _simulate(law, sampler, reward).ode
    if isinstance(sampler, Limit):
        return line_values(law, start, reward, np.zeros(0))[0]
    return line_step_values(law, sampler, reward)[0]


@dataclass(frozen=True)
class Simulation:
    """E r of the ODE and of the SDE, and their gap, from paired draws.

    `bias_scale` is the size of the extrapolation to continuous time, and 0 with N steps.
    """

    ode: Approximation
    sde: Approximation
    gap: Approximation
    bias_scale: float


def _simulate(
    target: GaussianMixture, sampler: SamplerSteps | Limit, reward: Reward, samples: int = 10_000, seed: int = 0
) -> Simulation:
    if isinstance(sampler, SamplerSteps):
        return simulate_steps(target, sampler, reward, samples, seed)
    return simulate_continuous(target, sampler.start, reward, float(sampler.eta), samples, seed)


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
    """Simulate the limit of gDDIM on a log-SNR grid, extrapolated from `steps` and `steps`/2 steps.

    Both share their Brownian motion, and are extrapolated (2 fine - coarse, because gDDIM is of
    first order) before averaging. EtudeError from pure noise, where the gap is exactly 0.
    """
    if not np.isfinite(start.V):
        raise EtudeError("the path starts from pure noise, where the continuous-time gap is 0: nothing to simulate.")
    rng, V = np.random.default_rng(seed), float(start.V)
    # The last level is a hundredth of the data's least deviation.
    smallest = min(float(part.spectrum.min()) for part in target.components) ** 0.5
    span = min(float(np.log(0.01 * smallest / V**0.5)), -1.0)
    v = np.append(np.sqrt(V) * np.exp(np.linspace(0.0, span, steps)), 0.0)
    begin = rng.standard_normal((samples, target.d)) * np.sqrt(V + float(start.excess))
    ends = {(e, stride): begin for e in (0.0, eta) for stride in (1, 2)}
    noise = np.zeros_like(begin)
    for i in range(0, steps, 2):
        first, middle, last = v[i], v[min(i + 1, steps)], v[min(i + 2, steps)]
        z1, z2 = rng.standard_normal((2, *begin.shape))
        # The noises of two fine steps add up to the coarse step's.
        w2 = (last / middle) ** (1.0 + eta**2) if last > 0 else 0.0
        b1, b2, b = _std(middle, first, eta), _std(last, middle, eta), _std(last, first, eta)
        noise = (w2 * b1 * z1 + b2 * z2) / b if b > 0 else noise
        for e in dict.fromkeys((0.0, eta)):  # once where eta is 0, too
            fine1, fine2, coarse_z = (z1, z2, noise) if e > 0 else (0.0, 0.0, 0.0)
            ends[e, 1] = _step(target, ends[e, 1], first, middle, e, fine1)
            ends[e, 1] = _step(target, ends[e, 1], middle, last, e, fine2)
            ends[e, 2] = _step(target, ends[e, 2], first, last, e, coarse_z)
    fine, coarse = ([_reward_values(reward, ends[e, k], target) for e in (0.0, eta)] for k in (1, 2))
    values = [2.0 * f - c for f, c in zip(fine, coarse, strict=True)]
    change = float(np.mean((fine[0] - coarse[0]) - (fine[1] - coarse[1])))
    return _summary(values[0], values[1], bias_scale=abs(change))


def _std(u: float, t: float, eta: float) -> float:
    """Compute the std of a gDDIM step from level t to u, without cancellation for short steps."""
    return u * float(np.sqrt(-np.expm1(2.0 * eta**2 * np.log(u / t)))) if u > 0 and eta > 0 else 0.0


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

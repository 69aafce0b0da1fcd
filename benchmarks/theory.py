"""Time of 1,000 reward gaps of a 64-dimensional Gaussian on one core, and tightness of the bounds.

The Gaussian has full covariance, and N = 50. Run with one thread: `OMP_NUM_THREADS=1
OPENBLAS_NUM_THREADS=1 python benchmarks/theory.py`. The promise is under 2 s, in three readings: a
new target every time (its eigendecomposition included), one target and reward at 1,000 etas in one
call each, and the same etas in a single call. The tightness is best bound / |gap| over random
Gaussians (d = 1 to 6, full indefinite Q) and random mixtures on the line, with VE, VP and
rectified-flow starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from etude.theory import (
    VE,
    VP,
    ContinuousPath,
    Gaussian,
    GaussianMixture,
    QuadraticReward,
    RectifiedFlow,
    gap_bounds,
    reward_gap,
)

DIMENSION, STEPS, EVALUATIONS = 64, 50, 1000


def covariance(rng: np.random.Generator) -> np.ndarray:
    root = rng.standard_normal((DIMENSION, DIMENSION)) / DIMENSION**0.5
    return root @ root.T


def timed(label: str, work: Callable[[], object]) -> None:
    start = time.perf_counter()
    work()
    print(f"{label:<42} {time.perf_counter() - start:6.3f} s")


def path(rng: np.random.Generator) -> ContinuousPath:
    choices: list[ContinuousPath] = [
        VE(T=float(rng.uniform(3.0, 80.0))),
        VP(T=float(rng.uniform(2.0, 10.0))),
        RectifiedFlow(delta=float(rng.uniform(0.003, 0.1))),
    ]
    return choices[rng.integers(len(choices))]


def gaussian_ratio(rng: np.random.Generator, d: int) -> tuple[float, float]:
    root, Q = rng.standard_normal((2, d, d))
    target = Gaussian(rng.standard_normal(d), root @ root.T / d + 0.02 * np.eye(d))
    return _ratios(target, QuadraticReward(Q + Q.T, center=rng.standard_normal(d)), rng)


def mixture_ratio(rng: np.random.Generator) -> tuple[float, float]:
    K = int(rng.integers(2, 5))
    target = GaussianMixture(rng.dirichlet(np.full(K, 2.0)), rng.uniform(-2.0, 2.0, K), rng.uniform(0.1, 0.8))
    return _ratios(target, QuadraticReward(1.0, center=float(rng.normal())), rng)


def _ratios(
    target: Gaussian | GaussianMixture, reward: QuadraticReward, rng: np.random.Generator
) -> tuple[float, float]:
    found = gap_bounds(target, path(rng), reward, float(rng.uniform(0.2, 2.0)))
    few = min(found.bounds[name] for name in ("density ratio, Jensen", "coupling", "vanishing, Jensen"))
    return found.ratio, few / abs(found.gap)


def tightness(label: str, ratios: list[tuple[float, float]]) -> None:
    best, few = np.array(ratios).T
    print(
        f"{label:<42} best bound / |gap|: median {np.median(best):.2f}, 90 % below {np.quantile(best, 0.9):.1f}, "
        f"smallest {best.min():.3f}; few constants only: median {np.median(few):.2f}"
    )


def main() -> None:
    rng = np.random.default_rng(0)
    covariances = [covariance(rng) for _ in range(EVALUATIONS)]
    mean, etas = rng.standard_normal(DIMENSION), rng.uniform(0.0, 2.0, EVALUATIONS)
    reward = QuadraticReward(covariance(rng), center=rng.standard_normal(DIMENSION))
    target = Gaussian(mean, covariances[0])
    timed(
        "1,000 targets, one call each",
        lambda: [
            reward_gap(Gaussian(mean, C), "sd", reward, eta, steps=STEPS)
            for C, eta in zip(covariances, etas, strict=True)
        ],
    )
    timed(
        "one target, 1,000 etas, one call each",
        lambda: [reward_gap(target, "sd", reward, e, steps=STEPS) for e in etas],
    )
    timed("one target, 1,000 etas, one call", lambda: reward_gap(target, "sd", reward, etas, steps=STEPS))
    tightness("400 Gaussians, d = 1", [gaussian_ratio(rng, 1) for _ in range(400)])
    tightness("400 Gaussians, d = 2 to 6", [gaussian_ratio(rng, int(rng.integers(2, 7))) for _ in range(400)])
    tightness("60 mixtures on the line", [mixture_ratio(rng) for _ in range(60)])


if __name__ == "__main__":
    main()

"""Time of 1,000 reward gaps of a 64-dimensional Gaussian with full covariance at N = 50, on one core.

Run with one thread: `OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/theory.py`. Three readings of the promise
(under 2 s): a new target every time (its eigendecomposition included), one target and reward at 1,000 etas one call at a
time, and the same etas in one call.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from etude.theory import Gaussian, QuadraticReward, reward_gap

DIMENSION, STEPS, EVALUATIONS = 64, 50, 1000


def covariance(rng: np.random.Generator) -> np.ndarray:
    root = rng.standard_normal((DIMENSION, DIMENSION)) / DIMENSION**0.5
    return root @ root.T


def timed(label: str, work: Callable[[], object]) -> None:
    start = time.perf_counter()
    work()
    print(f"{label:<42} {time.perf_counter() - start:6.3f} s")


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


if __name__ == "__main__":
    main()

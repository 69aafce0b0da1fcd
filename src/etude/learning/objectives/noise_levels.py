"""Noise levels at which final images are trained, drawn anew in each iteration.

Column j of L columns draws u uniformly in the stratum [j / L, (j + 1) / L), counted from noise to
data. Therefore every image is trained over the whole range.

    steps          the sampler's N steps: level floor(u N); with L = N exactly the steps
    uniform        the model's own FINE levels, spread evenly as the model's schedule has them
    logit_normal   the same with sigmoid(z), z ~ N(0, 1), in the place of u (arXiv 2403.03206)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.special import expit, ndtri
from torch import Tensor

from etude.learning.objectives.objective import Samples
from etude.policies import TrainablePolicy
from etude.sampling.noise import keyed_generator, to_device

LevelSampling = Literal["steps", "uniform", "logit_normal"]
FINE = 500
"""Number of levels of `uniform` and `logit_normal`."""


@dataclass(frozen=True)
class Levels:
    """The noise level of each image and column: the network's timestep, the coefficient of the signal and
    that of the noise, `[n, L]` each."""

    timesteps: Tensor
    a: Tensor
    s: Tensor


def draw_levels(policy: TrainablePolicy, samples: Samples, count: int, sampling: LevelSampling) -> Levels:
    """The levels of `count` columns, functions of seed, iteration and image alone."""
    noise, table = samples.noise, samples.table
    draws = np.stack([
        keyed_generator(noise.seed, f"{noise.stream}/level", noise.iteration, index).random(count)
        for index in samples.indices
    ])  # fmt: skip
    u = (np.arange(count) + draws) / count
    if sampling == "logit_normal":
        u = expit(ndtri(u))
    if sampling == "steps":
        timesteps, a, s = table.timesteps, table.a, table.s
    else:
        grid = policy.grid(FINE)
        timesteps, a, s = (to_device(part, policy.device) for part in (grid.timesteps, grid.a.float(), grid.s.float()))
    index = np.minimum((u * len(timesteps)).astype(np.int64), len(timesteps) - 1)
    at = to_device(torch.from_numpy(index), policy.device)
    return Levels(timesteps[at], a[at], s[at])

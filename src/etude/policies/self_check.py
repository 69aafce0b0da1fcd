"""A batch against one by one: prompts of unequal length, encoded alone, at different timesteps.

Padding and masks that a pipeline shows to its network, and timesteps that it spreads over another
axis than the samples', show there and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etude.policies.outline import is_outline
from etude.sampling.noise import NoiseSource, to_device

if TYPE_CHECKING:
    from etude.policies.pipeline import PipelinePolicy

PROMPTS = ("a", "red heart", "a picture of two cats that sit beside one another in the evening sun")
"""Prompts of unequal length."""


def tolerance(policy: PipelinePolicy) -> float:
    """Largest relative difference that rounding explains: 1e-3 in float32, and 0.1 in half precision.

    Rounding gives about 1e-5 and 0.02. The faults that were seen give 0.3 and more.
    """
    return 1e-3 if policy.computing_dtype == torch.float32 else 0.1


def states(policy: PipelinePolicy, count: int) -> tuple[Tensor, Tensor]:
    """So many states with their timesteps, all different."""
    x = to_device(NoiseSource(0, "trial").initial(list(range(count)), policy.latent_shape), policy.device)
    return x, policy.grid(4).timesteps[:count].to(policy.device)


@torch.no_grad()
def batch_difference(policy: PipelinePolicy, prompts: list[str], guidance_scale: float) -> float:
    """Relative difference of predictions in one batch from those of each prompt alone, the largest of all rows."""
    x, timesteps = states(policy, len(prompts))
    together = policy.predict(x, timesteps, policy.encode(prompts), guidance_scale)
    rows = [slice(row, row + 1) for row in range(len(x))]
    alone = [policy.predict(x[row], timesteps[row], policy.encode(prompts[row]), guidance_scale) for row in rows]
    return relative_difference(together, torch.cat(alone))


def relative_difference(values: Tensor, expected: Tensor) -> float:
    """`|values - expected| / |expected|` of the row where it is largest; NaN counts as infinite."""
    difference = (values - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-12)
    return float(difference.nan_to_num(torch.inf).max())


@torch.no_grad()
def guidance_difference(policy: PipelinePolicy, off: float, scale: float) -> float:
    """Relative difference of a prediction at a guidance scale from that without guidance."""
    if is_outline(policy):
        return 0.0
    (x, timesteps), told = states(policy, 1), policy.encode([PROMPTS[-1]])
    with_guidance, without = (policy.predict(x, timesteps, told, each) for each in (scale, off))
    return relative_difference(with_guidance, without)

"""Images from a policy under any plan, without training."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from etude.sampling.kernels import make_kernel
from etude.sampling.model import Policy
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan
from etude.sampling.rollout import rollout


def make_plan(kernel: str, eta: float, num_steps: int, first_step: str = "ode") -> SamplingPlan:
    """The plan of every step under one kernel; eta = 0 is the ODE. Nothing of it is trained."""
    if eta == 0:
        return SamplingPlan.ode(num_steps)
    return SamplingPlan.sde(num_steps, make_kernel(kernel, eta), trained=False, first_step=first_step)


def sample_images(
    policy: Policy,
    prompts: list[str],
    plan: SamplingPlan,
    guidance_scale: float = 5.0,
    seed: int = 0,
    batch_size: int = 32,
    stream: str = "evaluation",
    on_step: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """uint8 images `[len(prompts), 3, h, w]`.

    Image i starts from the noise keyed by (seed, stream, i), whatever the plan: two plans give pairs.
    """
    table = plan.tabulate(policy.grid(plan.grid_size)).to(policy.device)
    trajectory = rollout(
        policy,
        table,
        policy.encode(prompts),
        NoiseSource(seed, stream),
        list(range(len(prompts))),
        guidance_scale,
        batch_size,
        on_step=on_step,
    )
    return policy.decode(trajectory.latents)

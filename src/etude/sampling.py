"""Images from a policy under any plan, without training."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from etude.errors import unknown
from etude.kernels import KERNELS as KERNELS
from etude.kernels import Kernel
from etude.noise import NoiseSource
from etude.plans import SamplingPlan
from etude.policies.base import Policy
from etude.rollout import rollout


def make_plan(kernel: str, eta: float, num_steps: int, first_step: str = "ode") -> SamplingPlan:
    """The plan of every step under one kernel; eta = 0 is the ODE. Nothing of it is trained."""
    if eta == 0:
        return SamplingPlan.ode(num_steps)
    return SamplingPlan.sde(num_steps, make_kernel(kernel, eta), trained=False, first_step=first_step)


def make_kernel(kernel: str, eta: float) -> Kernel:
    """A kernel by its name in the configuration."""
    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    make: Callable[[float], Kernel] = KERNELS[kernel]
    return make(eta)


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

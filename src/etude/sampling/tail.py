"""The compressed tail of MixGRPO-Flash (arXiv 2507.21802).

A few steps of diffusers' DPM-Solver++(2M) lead from the end of a window to the last level.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from etude.batching import Progress
from etude.sampling.model import Conditioning, Policy
from etude.sampling.noise import to_device
from etude.sampling.paths import FlowPath, Grid, to_x0_eps

LARGEST_SIGMA = 1 - 1e-6
"""Largest sigma for a multistep solver on rectified flow, which takes the logarithm of
a = 1 - sigma.

diffusers' UniPC keeps the same distance from pure noise.
"""


def multistep_tail(
    policy: Policy,
    tail: Grid,
    conditioning: Conditioning,
    x: Tensor,
    guidance_scale: float,
    on_step: Progress = lambda images: None,
) -> Tensor:
    """Takes a batch down the levels of `tail` with DPM-Solver++(2M).

        D       = x0_hat + (x0_hat - x0_hat') h / (2 h')        h = log(lam_t / lam_u); ' marks the step before
        x_u     = (s_u / s_t) x - a_u (exp(-h) - 1) D           lam = s / a

    The first step is of first order (D = x0_hat), which is the step of the ODE plan. As in
    diffusers, the last step is of first order too if there are fewer than 15 steps or if it ends in
    clean data.

    Args:
        tail: M + 1 levels; the first is the level of `x`.
        x: fp32 latents `[n, *latent_shape]`.
        on_step: called with n after each of the M steps.

    Returns:
        Latents at the last level, shaped like `x`.
    """
    solver = pinned_scheduler(scheduler_class("DPMSolverMultistepScheduler"), tail, policy, prediction_type="sample")
    a, s = (to_device(level.float(), x.device) for level in (tail.a, tail.s))
    for step in range(tail.num_steps):
        timesteps = tail.timesteps[step : step + 1].expand(len(x))
        output = policy.predict(x, timesteps, conditioning, guidance_scale)
        x0_hat, _ = to_x0_eps(output, x, a[step], s[step], policy.prediction_type)
        x = solver.step(x0_hat, solver.timesteps[step], x, return_dict=False)[0]
        on_step(len(x))
    return x


def scheduler_class(name: str) -> Any:
    """The scheduler class of that name in diffusers."""
    import diffusers

    return getattr(diffusers, name)


def pinned_scheduler(kind: Any, grid: Grid, policy: Policy, prediction_type: str) -> Any:
    """A diffusers scheduler on exactly the grid's levels, with an empty history.

    `set_timesteps` is not called, because it would choose other levels.
    """
    flow = isinstance(policy.path, FlowPath)
    if kind.__name__ == "FlowMatchEulerDiscreteScheduler":
        scheduler, sigmas = kind(), grid.s
    else:
        end = "zero" if grid.s[-1] == 0 else "sigma_min"
        scheduler = kind(prediction_type=prediction_type, use_flow_sigmas=flow, final_sigmas_type=end)
        sigmas = grid.s.clamp(max=LARGEST_SIGMA) if flow else grid.s / grid.a
    scheduler.sigmas, scheduler.timesteps = sigmas.float(), grid.timesteps
    scheduler.num_inference_steps = grid.num_steps
    scheduler.set_begin_index(0)
    return scheduler

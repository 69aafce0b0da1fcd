"""The compressed tail of MixGRPO-Flash (arXiv 2507.21802): DPM-Solver++(2M) after the window."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from etude.batching import Progress
from etude.sampling.model import Conditioning, Policy
from etude.sampling.noise import to_device
from etude.sampling.paths import FlowPath, Grid, to_x0_eps

LARGEST_SIGMA = 1 - 1e-6
"""Largest sigma for a multistep solver, which takes log(1 - sigma); as in diffusers' UniPC."""


def multistep_tail(
    policy: Policy,
    tail: Grid,
    conditioning: Conditioning,
    x: Tensor,
    guidance_scale: float,
    on_step: Progress = lambda images: None,
) -> Tensor:
    """Takes a batch `x`, fp32 `[n, *latent_shape]`, down the M + 1 levels of `tail` with DPM-Solver++(2M).

        D       = x0_hat + (x0_hat - x0_hat') h / (2 h')        h = log(lam_t / lam_u); ' marks the step before
        x_u     = (s_u / s_t) x - a_u (exp(-h) - 1) D           lam = s / a

    The first step is of first order (D = x0_hat), which is the step of the ODE plan. As in
    diffusers, the last step is of first order too if there are fewer than 15 steps or if it ends in
    clean data. `on_step` is called with n after each step.
    """
    solver = pinned_scheduler("DPMSolverMultistepScheduler", tail, policy, prediction_type="sample")
    a, s = (to_device(level.float(), x.device) for level in (tail.a, tail.s))
    for step in range(tail.num_steps):
        timesteps = tail.timesteps[step : step + 1].expand(len(x))
        output = policy.predict(x, timesteps, conditioning, guidance_scale)
        x0_hat, _ = to_x0_eps(output, x, a[step], s[step], policy.prediction_type)
        x = solver.step(x0_hat, solver.timesteps[step], x, return_dict=False)[0]
        on_step(len(x))
    return x


def pinned_scheduler(name: str, grid: Grid, policy: Policy, prediction_type: str) -> Any:
    """A diffusers scheduler on exactly the grid's levels, with an empty history."""
    import diffusers

    # `set_timesteps` is not called, because it would choose other levels.
    kind, flow = getattr(diffusers, name), isinstance(policy.path, FlowPath)
    if name == "FlowMatchEulerDiscreteScheduler":
        scheduler, sigmas = kind(), grid.s
    else:
        end = "zero" if grid.s[-1] == 0 else "sigma_min"
        scheduler = kind(prediction_type=prediction_type, use_flow_sigmas=flow, final_sigmas_type=end)
        sigmas = grid.s.clamp(max=LARGEST_SIGMA) if flow else grid.s / grid.a
    scheduler.sigmas, scheduler.timesteps = sigmas.float(), grid.timesteps
    scheduler.num_inference_steps = grid.num_steps
    scheduler.set_begin_index(0)
    return scheduler

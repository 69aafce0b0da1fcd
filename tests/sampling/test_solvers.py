"""diffusers' solvers: the tail after a window, and the samplers of deployment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from etude.batching import MicroBatch
from etude.errors import EtudeError
from etude.policies.flux import FluxPolicy
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.policies.stable_diffusion_3 import StableDiffusion3Policy
from etude.sampling.kernels import GDDIM
from etude.sampling.model import Conditioning
from etude.sampling.noise import NoiseSource
from etude.sampling.paths import FlowPath, Grid, VPPath, flow_grid, to_x0_eps
from etude.sampling.plans import SamplingPlan
from etude.sampling.rollout import rollout
from etude.sampling.sampler import ODE
from etude.sampling.solvers import SOLVERS, Solver
from etude.sampling.tail import multistep_tail
from support.gaussian_policy import GaussianPolicy, flow_path
from support.tiny import flux, stable_diffusion, stable_diffusion_3

VP = VPPath.from_config(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
)
FLOW = FlowPath.from_config({"shift": 3.0})
NOTHING = Conditioning({}, {})
MEAN, VARIANCE = 1.5, 0.25


class Gaussian:
    """The exact network of data N(1.5, 0.25), which needs of a policy only what a sampler does."""

    def __init__(self, path):
        self.path, self.prediction_type, self.told = path, path.prediction_type, []

    def predict(self, x, timesteps, conditioning, guidance_scale):
        self.told.append(float(timesteps[0]))
        if isinstance(self.path, VPPath):
            a, s = self.path.level(timesteps[:1])
        else:
            s = timesteps[:1].double() / 1000
            a = 1 - s
        x0 = MEAN + a * VARIANCE / (a**2 * VARIANCE + s**2) * (x - a * MEAN)
        eps = (x - a * x0) / s
        return (eps if isinstance(self.path, VPPath) else eps - x0).float()


def start(policy, grid, count=16):
    """States whose law is that of the first level."""
    noise = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    a, s = float(grid.a[0]), float(grid.s[0])
    return a * MEAN + math.sqrt(a**2 * VARIANCE + s**2) * noise


def exact(grid, x):
    """The probability-flow ODE of a Gaussian keeps a state's distance from the mean in standard deviations."""
    a, s = grid.a, grid.s
    spread = (a**2 * VARIANCE + s**2).sqrt()
    return a[-1] * MEAN + spread[-1] / spread[0] * (x - a[0] * MEAN)


def flow_levels(sigmas) -> Grid:
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    return Grid(1000 * sigmas[:-1].float(), 1 - sigmas, sigmas)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_the_tail_is_what_diffusers_own_solver_makes_of_the_networks_own_output(kind, count):
    if kind == "vp":
        policy, grid = Gaussian(VP), VP.grid(40)
        tail = SamplingPlan.window(40, GDDIM(1.2), 10, 2, compression=count / 28).tabulate(grid).tail
        direct = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        direct.set_timesteps(timesteps=tail.timesteps.tolist())
    else:
        policy = Gaussian(FLOW)
        direct = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=0.4)
        direct.set_timesteps(count)
        tail = flow_grid(direct.timesteps.float(), direct.sigmas)
    assert tail.num_steps == count
    x = y = start(policy, tail)
    for timestep in direct.timesteps:
        y = direct.step(policy.predict(y, timestep[None], NOTHING, 1.0), timestep, y).prev_sample
    torch.testing.assert_close(multistep_tail(policy, tail, NOTHING, x, 1.0), y, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
def test_a_tail_of_one_step_is_the_step_of_the_ode(path):
    policy, grid = Gaussian(path), path.grid(10)
    table = SamplingPlan.window(10, GDDIM(1.2), 6, 3, compression=0.01).tabulate(grid)
    assert table.tail.num_steps == 1
    x = start(policy, table.tail)
    output = policy.predict(x, table.tail.timesteps, NOTHING, 1.0)
    pair = to_x0_eps(output, x, grid.a[9].float(), grid.s[9].float(), path.prediction_type)
    expected = SamplingPlan.ode(10).tabulate(grid).transition(9, *pair).mean
    torch.testing.assert_close(multistep_tail(policy, table.tail, NOTHING, x, 1.0), expected, atol=1e-6, rtol=1e-6)


def test_the_tail_is_of_second_order_where_euler_is_of_first():
    policy, errors = Gaussian(FLOW), {"tail": [], "ode": []}
    for count in (16, 32, 64):
        levels = flow_levels(
            [1 / (1 + math.exp(t)) for t in np.linspace(-2, 2, count + 1)]
        )  # even in log-SNR, not to 0
        x = start(policy, levels)
        table, y = SamplingPlan.ode(count).tabulate(levels), x
        for i in range(count):
            output = policy.predict(y, levels.timesteps[i : i + 1], NOTHING, 1.0)
            y = table.transition(i, *to_x0_eps(output, y, table.a[i], table.s[i], "flow")).mean
        tail = multistep_tail(policy, levels, NOTHING, x, 1.0)
        for name, found in (("tail", tail), ("ode", y)):
            errors[name].append(float((found - exact(levels, x)).abs().max()))
    tail, ode = np.array(errors["tail"]), np.array(errors["ode"])
    assert (tail < ode / 4).all()
    assert (tail[:-1] / tail[1:] > 3).all()
    assert (ode[:-1] / ode[1:] < 2.5).all()


def test_a_tail_to_clean_data_beats_as_many_euler_steps():
    for path in (VP, FLOW):
        policy, grid = Gaussian(path), path.grid(24)
        tail = SamplingPlan.window(24, GDDIM(1.2), 2, 2, compression=0.4).tabulate(grid).tail
        x = y = start(policy, tail)
        table = SamplingPlan.ode(8).tabulate(tail)
        for i in range(8):
            output = policy.predict(y, tail.timesteps[i : i + 1], NOTHING, 1.0)
            y = table.transition(i, *to_x0_eps(output, y, table.a[i], table.s[i], path.prediction_type)).mean
        target = exact(tail, x)
        found = multistep_tail(policy, tail, NOTHING, x, 1.0)
        assert (found - target).square().mean() < 0.6 * (y - target).square().mean()


def test_a_tail_remembers_nothing_of_the_batch_before():
    policy, grid = Gaussian(FLOW), FLOW.grid(20)
    tail = SamplingPlan.window(20, GDDIM(1.2), 4, 4, compression=0.4).tabulate(grid).tail
    x = start(policy, tail)
    first = multistep_tail(policy, tail, NOTHING, x, 1.0)
    multistep_tail(policy, tail, NOTHING, 100 + x, 1.0)
    assert torch.equal(multistep_tail(policy, tail, NOTHING, x, 1.0), first)
    assert policy.told[:5] == tail.timesteps.tolist()


DATA = (1.5, -0.5), (0.25, 2.0)


def flash(num_steps, start, compression, count=4):
    """The table and the states of a Flash rollout of a Gaussian flow, from the window's end to the image."""
    policy = GaussianPolicy(*DATA, flow_path(1.0))
    table = SamplingPlan.window(num_steps, GDDIM(1.2), start - 2, 2, compression=compression).tabulate(
        policy.grid(num_steps)
    )
    noise, samples = NoiseSource(0, "training"), list(range(count))
    made = rollout(policy, table, policy.encode(["a"] * count), noise, samples, 1.0, count)
    return policy, table.tail, made.states[:, -1], made.latents


def end_error(tail, x, latents):
    """The largest error of the end in units of the start's distance from the mean: the same for every start, as the ODE is linear."""
    mean, variance = (torch.tensor(v, dtype=torch.float64).reshape(1, -1, 1, 1) for v in DATA)
    a, s = tail.a[0], tail.s[0]
    deviation = x.double() - a * mean
    true = mean + (variance / (a**2 * variance + s**2)).sqrt() * deviation
    return float((latents - true).square().sum().div(deviation.square().sum()).sqrt())


def euler(policy, tail, x):
    table = SamplingPlan.ode(tail.num_steps).tabulate(tail)
    for i in range(tail.num_steps):
        output = policy.predict(x, tail.timesteps[i : i + 1].expand(len(x)), NOTHING, 1.0)
        x = table.transition(i, *to_x0_eps(output, x, table.a[i], table.s[i], "flow")).mean
    return x


@pytest.mark.parametrize("compression", [0.4, 1.0])
def test_the_error_of_a_flash_rollouts_tail_falls_like_the_square_of_its_step(compression):
    """Against the exact flow, from a quarter of the way down to clean data; Euler's method on the same levels falls like the step."""
    errors, eulers = [], []
    for k in (2, 4, 8):
        policy, tail, x, latents = flash(20 * k, 5 * k, compression)
        assert tail.num_steps == round(15 * k * compression)
        errors.append(end_error(tail, x, latents))
        eulers.append(end_error(tail, x, euler(policy, tail, x)))
    for finer, coarser in ((2, 1), (1, 0)):
        assert errors[coarser] / errors[finer] > 2**1.6
        assert eulers[coarser] / eulers[finer] < 2**1.4
    assert all(tail < 0.5 * first for tail, first in zip(errors, eulers, strict=True))


@pytest.mark.parametrize("count", [3, 4, 7, 16])
def test_a_flash_rollouts_tail_of_three_steps_or_more_is_diffusers_second_order_solver(count):
    """Levels and network's own velocity given to the solver directly; with so many steps it is not Euler's method."""
    policy, tail, x, latents = flash(2 * count + 3, 3, 0.5)
    assert tail.num_steps == count
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    solver.set_timesteps(count)
    solver.sigmas, solver.timesteps = tail.s.float(), tail.timesteps
    expected = x
    for timestep in solver.timesteps:
        output = policy.predict(expected, timestep.expand(len(x)), NOTHING, 1.0)
        expected = solver.step(output, timestep, expected).prev_sample
    torch.testing.assert_close(latents, expected, atol=2e-5, rtol=1e-5)
    assert (latents - euler(policy, tail, x)).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:.*does not fit into memory")
@pytest.mark.parametrize("solver", ["dpmsolver++", "heun"])
def test_a_solver_that_runs_out_of_memory_goes_on_in_smaller_batches(solver, monkeypatch):
    policy, taken, steps = GaussianPolicy(*DATA, flow_path()), [], []
    monkeypatch.setattr(policy, "decode", lambda latents: latents)
    whole = Solver(solver, 5).draw(policy, ["a"] * 7, batch_size=2)
    predict = policy.predict

    def limited(x, *rest):
        if len(x) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        taken.append(len(x))
        return predict(x, *rest)

    monkeypatch.setattr(policy, "predict", limited)
    batches = MicroBatch(4, "batch_size")
    assert torch.equal(Solver(solver, 5).draw(policy, ["a"] * 7, batch_size=batches, on_step=steps.append), whole)
    assert batches.size == 2
    assert sum(steps) == sum(taken) == 7 * Solver(solver, 5).evaluations


PROMPTS = ["red heart", "pizza"]
VP_SOLVERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
FLOW_OPTIONS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_SOLVERS = {
    "heun": (FlowMatchHeunDiscreteScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, FLOW_OPTIONS),
    "unipc": (UniPCMultistepScheduler, FLOW_OPTIONS),
}


def assert_plain_pipeline_agrees(policy, solver, scheduler, monkeypatch, num_steps=6, guidance_scale=2.0):
    """The final latents of the plain pipeline with that scheduler, from the same noise."""
    with monkeypatch.context() as patch:
        patch.setattr(policy, "decode", lambda latents: latents)
        found = Solver(solver, num_steps, guidance_scale).draw(policy, PROMPTS, seed=3)
        ode = ODE(num_steps, guidance_scale).draw(policy, PROMPTS, seed=3)
        patch.setattr(policy.pipeline, "scheduler", scheduler)
        policy.pipeline.set_progress_bar_config(disable=True)
        height, width = policy.image_size
        call = {"height": height, "width": width, **policy.call_arguments(guidance_scale), "output_type": "latent"}
        noise = NoiseSource(3, "evaluation").initial([0, 1], policy.latent_shape)
        plain = policy.pipeline(PROMPTS, latents=noise, num_inference_steps=num_steps, **call).images
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-5)
    return float((found - ode).abs().max())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", VP_SOLVERS)
def test_on_vp_a_solver_is_the_plain_pipeline_with_that_scheduler(solver, prediction_type, monkeypatch):
    policy = StableDiffusionPolicy(stable_diffusion(prediction_type=prediction_type))
    scheduler = VP_SOLVERS[solver].from_config(policy.pipeline.scheduler.config)
    away = assert_plain_pipeline_agrees(policy, solver, scheduler, monkeypatch)
    assert away < 1e-5 if solver == "ddim" else away > 1e-4


@pytest.mark.parametrize("solver", ["euler", "ddim"])
@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_on_flow_euler_is_the_plain_pipeline_and_the_ode(kind, solver, monkeypatch):
    policy = FluxPolicy(flux()) if kind == "flux" else StableDiffusion3Policy(stable_diffusion_3())
    assert assert_plain_pipeline_agrees(policy, solver, policy.pipeline.scheduler, monkeypatch) < 1e-5


def test_on_flow_heun_is_the_plain_pipeline_with_that_scheduler(monkeypatch):
    policy = StableDiffusion3Policy(stable_diffusion_3())
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    assert assert_plain_pipeline_agrees(policy, "heun", scheduler, monkeypatch) > 1e-4


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_on_flow_a_solver_is_the_plain_pipeline_with_that_scheduler_on_the_models_levels(kind, solver, monkeypatch):
    policy = FluxPolicy(flux()) if kind == "flux" else StableDiffusion3Policy(stable_diffusion_3())
    grid, (parent, options) = policy.grid(6), FLOW_SOLVERS[solver]

    class OnTheModelsLevels(parent):
        def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
            super().set_timesteps(6)
            sigmas, timesteps = grid.s.float(), grid.timesteps
            if solver == "heun":
                sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
                timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
            else:
                sigmas = sigmas.clamp(max=1 - 1e-6)
            self.sigmas, self.timesteps = sigmas, timesteps

    assert assert_plain_pipeline_agrees(policy, solver, OnTheModelsLevels(**options), monkeypatch) > 1e-4


@pytest.mark.parametrize("solver", ["dpmsolver++", "unipc"])
def test_the_models_levels_are_diffusers_own_for_that_solver_to_a_few_thousandths(solver):
    parent, options = FLOW_SOLVERS[solver]
    scheduler = parent(**options, flow_shift=3.0)
    scheduler.set_timesteps(12)
    levels = StableDiffusion3Policy(stable_diffusion_3()).path.grid(12, sigmas=np.linspace(1, 1 / 12, 12).tolist()).s
    assert (scheduler.sigmas - levels).abs().max() < 3e-3


@pytest.mark.parametrize("num_steps", [1, 2, 9])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_progress_counts_the_evaluations_and_images_do_not_depend_on_the_batch_size(kind, solver, num_steps):
    policy = FluxPolicy(flux()) if kind == "flux" else StableDiffusionPolicy(stable_diffusion())
    prompts, steps = ["sun", "moon", "car"], []
    sampler = Solver(solver, num_steps, 2.0)
    images = sampler.draw(policy, prompts, batch_size=2, on_step=steps.append)
    assert sum(steps) == 3 * sampler.evaluations
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.uint8
    whole = sampler.draw(policy, prompts)
    assert (images.int() - whole.int()).abs().max() <= 1


def test_an_unknown_solver_and_too_many_steps_are_refused():
    policy = StableDiffusionPolicy(stable_diffusion())
    with pytest.raises(EtudeError, match="did you mean 'unipc'"):
        Solver("unipcc", 4)
    with pytest.raises(EtudeError, match="from 1 to 1000"):
        Solver("euler", 1001).check(policy)
    with pytest.raises(EtudeError, match="from 1 to 1000"):
        Solver("euler", 1001).draw(policy, PROMPTS)

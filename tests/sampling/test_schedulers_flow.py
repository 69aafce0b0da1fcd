from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)

from etude.errors import EtudeError
from etude.sampling.kernels import FlowSDE
from etude.sampling.schedulers import FlowMatchGDDIMScheduler, GDDIMScheduler
from support import tiny
from support.kernels import KERNELS

SHIFTS: dict[str, dict[str, Any]] = {
    "none": {},
    "static": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift_terminal": 0.1},
    "dynamic-terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    "karras": {"use_karras_sigmas": True, "shift": 3.0},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True, "shift": 1.7},
    "fewer-levels": {"num_train_timesteps": 250, "shift": 2.0},
}
Timing = dict[str, Any]
TIMINGS: dict[str, Timing] = {
    "count": {"num_inference_steps": 6},
    "sigmas": {"sigmas": [1.0, 0.8, 0.6, 0.5, 0.3, 0.1]},
    "timesteps": {"timesteps": [900.0, 700.0, 600.0, 300.0, 200.0, 50.0]},
    "both": {"sigmas": [1.0, 0.7, 0.4], "timesteps": [1000.0, 650.0, 400.0]},
    "many": {"num_inference_steps": 200},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def velocity(x: torch.Tensor) -> torch.Tensor:
    """A network's output at the state x."""
    return torch.tanh(1.3 * x.roll(1, 0)) - 0.4 * x


def both(options: dict[str, Any], timing: Timing, **ours: Any) -> tuple[Any, Any]:
    mu = 0.8 if options.get("use_dynamic_shifting") else None
    pair = FlowMatchEulerDiscreteScheduler(**options), FlowMatchGDDIMScheduler(**options, **ours)
    for scheduler in pair:
        scheduler.set_timesteps(**timing, mu=mu)
    return pair


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("kernel", ["gddim", "flow_sde", "cps"])
def test_eta_zero_is_diffusers_euler_under_every_shift(shift, timing, kernel):
    options = SHIFTS[shift]
    if "timesteps" in TIMINGS[timing] and options.get("num_train_timesteps"):
        options = {"shift": options["shift"]}
    theirs, ours = both(options, TIMINGS[timing], kernel=kernel)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    assert torch.equal(theirs.sigmas, ours.sigmas)
    assert theirs.num_inference_steps == ours.num_inference_steps
    x = torch.randn(2, 4, 8, 8, generator=generator())
    for t in theirs.timesteps:
        output = velocity(x)
        want, got = (scheduler.step(output, t, x, return_dict=False)[0] for scheduler in (theirs, ours))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        x = want
    assert theirs.step_index == ours.step_index


def test_a_level_shift_set_later_is_theirs_too():
    theirs, ours = both({}, {"num_inference_steps": 5})
    for scheduler in (theirs, ours):
        scheduler.set_shift(2.5)
        scheduler.set_timesteps(5)
    assert torch.equal(theirs.sigmas, ours.sigmas)
    x = torch.randn(1, 4, 8, 8, generator=generator())
    want, got = (s.step(velocity(x), s.timesteps[0], x).prev_sample for s in (theirs, ours))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("eta", [0.5, 1.2, 5.0, 50.0])
def test_any_eta_keeps_the_marginals_of_the_true_pair(eta):
    """Var(x | x0) = sigma^2 at every level, to 5 standard errors."""
    _, scheduler = both({"shift": 3.0}, {"num_inference_steps": 8}, eta=eta)
    n, draws = 50_000, generator(2)
    eps = torch.randn(n, 1, generator=generator(1))
    x = eps
    for t, (sigma, following) in zip(scheduler.timesteps, pairwise(scheduler.sigmas.tolist()), strict=True):
        eps = (x - (1 - sigma) * 0.7) / sigma
        x = scheduler.step(eps - 0.7, t, x, generator=draws).prev_sample
        if following > 0:
            assert abs(float((x - (1 - following) * 0.7).var()) / following**2 - 1) < 5 * (2 / n) ** 0.5
    torch.testing.assert_close(x, torch.full_like(x, 0.7), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_a_step_is_the_kernels_transition(name):
    _, scheduler = both({"shift": 3.0}, {"num_inference_steps": 5}, eta=0.7, kernel=name)
    x, output, noise = torch.randn(3, 2, 16, 8, generator=generator())
    scheduler.set_begin_index(2)
    got = scheduler.step(output, scheduler.timesteps[2], x, variance_noise=noise)
    sigma, sigma_u = scheduler.sigmas[2].double(), scheduler.sigmas[3].double()
    x0, eps = x - sigma.float() * output, x + (1 - sigma).float() * output
    transition = KERNELS[name](0.7).transition(x0, eps, (1 - sigma, sigma), (1 - sigma_u, sigma_u))
    torch.testing.assert_close(got.prev_sample, transition.sample(noise), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(got.pred_original_sample, x0, atol=2e-6, rtol=2e-6)
    assert scheduler.kernel == KERNELS[name](0.7)


def test_pure_noise_takes_the_euler_step_or_where_asked_redraws():
    x, output, noise = torch.randn(3, 2, 16, 8, generator=generator())
    theirs, ode = both({}, {"num_inference_steps": 5}, eta=1.0)
    _, sde = both({}, {"num_inference_steps": 5}, eta=1.0, first_step="sde")
    t = theirs.timesteps[0]
    want = theirs.step(output, t, x).prev_sample
    torch.testing.assert_close(ode.step(output, t, x, variance_noise=noise).prev_sample, want, atol=1e-6, rtol=1e-6)
    sigma = float(theirs.sigmas[1])
    redrawn = (1 - sigma) * (x - output) + sigma * noise
    torch.testing.assert_close(sde.step(output, t, x, variance_noise=noise).prev_sample, redrawn, atol=1e-6, rtol=1e-6)
    with pytest.raises(EtudeError, match="infinite noise at sigma = 1"):
        both({}, {"num_inference_steps": 5}, eta=0.7, kernel="flow_sde", first_step="sde")


def test_noise_comes_from_the_call_then_from_the_scheduler_then_from_torch():
    x = torch.randn(2, 16, 8, generator=generator())

    def step(of: int, **arguments: Any) -> torch.Tensor:
        _, scheduler = both({}, {"num_inference_steps": 5}, eta=1.0)
        scheduler.generator = arguments.pop("own", None)
        scheduler.set_begin_index(1)
        torch.manual_seed(of)
        return scheduler.step(velocity(x), scheduler.timesteps[1], x, **arguments).prev_sample

    given = step(0, generator=generator(5))
    assert torch.equal(given, step(1, generator=generator(5), own=generator(6)))
    assert torch.equal(given, step(2, own=generator(5)))
    noise = torch.randn(x.shape, generator=generator(5))
    assert torch.equal(given, step(3, variance_noise=noise, own=generator(6)))
    assert torch.equal(step(4), step(4))
    assert not torch.equal(step(4), step(5))
    rows = step(6, own=[generator(7), generator(8)])
    assert torch.equal(rows[1:], step(7, own=[generator(9), generator(8)])[1:])


def test_step_has_no_eta_argument_and_the_arguments_that_pipelines_give():
    names = list(inspect.signature(FlowMatchGDDIMScheduler.step).parameters)[1:]
    assert names == ["model_output", "timestep", "sample", "generator", "variance_noise", "return_dict"]
    theirs = inspect.signature(FlowMatchEulerDiscreteScheduler.set_timesteps).parameters
    assert list(inspect.signature(FlowMatchGDDIMScheduler.set_timesteps).parameters) == list(theirs)
    own = {"eta", "kernel", "first_step", "solver"}
    ours = inspect.signature(FlowMatchGDDIMScheduler.__init__).parameters
    want = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    assert {k: p.default for k, p in ours.items() if k not in own} == {k: p.default for k, p in want.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_keep_their_dtype_and_fp32_arithmetic(dtype):
    x, output = torch.randn(2, 2, 16, 8, generator=generator()).to(dtype)
    got, exact = (both({}, {"num_inference_steps": 5}, eta=1.2)[1] for _ in range(2))
    for scheduler in (got, exact):
        scheduler.set_begin_index(2)
    half = got.step(output, got.timesteps[2], x, generator=generator(5)).prev_sample
    full = exact.step(output.float(), exact.timesteps[2], x.float(), generator=generator(5)).prev_sample
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))
    theirs, _ = both({}, {"num_inference_steps": 5})
    assert theirs.step(output, theirs.timesteps[0], x.float()).prev_sample.dtype == half.dtype


def test_a_step_reads_nothing_back_from_the_device():
    """On the meta device any value read back (item, cpu, a branch on a tensor) is an error."""
    scheduler = FlowMatchGDDIMScheduler(shift=3.0, eta=1.2)
    scheduler.set_timesteps(5, device="meta")
    scheduler.set_begin_index(0)
    x = torch.empty(2, 16, 8, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x, variance_noise=x).prev_sample
    assert x.shape == (2, 16, 8)


@pytest.mark.parametrize("source", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_from_config_keeps_every_value_and_a_saved_scheduler_loads_as_it_was(source, tmp_path):
    scheduler = FlowMatchGDDIMScheduler.from_config(source(shift=3.0).config, eta=0.7, kernel="flow_sde")
    assert (scheduler.config.shift, scheduler.kernel) == (3.0, FlowSDE(0.7))
    scheduler.save_pretrained(tmp_path / "ours")
    loaded = FlowMatchGDDIMScheduler.from_pretrained(tmp_path / "ours")
    keys = inspect.signature(FlowMatchGDDIMScheduler.__init__).parameters.keys() - {"self"}
    assert {k: loaded.config[k] for k in keys} == {k: scheduler.config[k] for k in keys}
    source(shift=2.0).save_pretrained(tmp_path / "theirs")
    other = FlowMatchGDDIMScheduler.from_pretrained(tmp_path / "theirs", eta=1.2)
    assert (other.config.shift, other.eta, other.config.kernel) == (2.0, 1.2, "gddim")
    back = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    assert back.config.shift == 3.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eta": -0.5}, "finite number"),
        ({"eta": float("nan")}, "finite number"),
        ({"kernel": "flow_sd"}, "did you mean 'flow_sde'"),
        ({"kernel": "cps", "eta": 1.2}, "folds back"),
        ({"first_step": "none"}, "first_step"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "Only one of"),
    ],
)
def test_an_illegal_option_is_an_error_when_the_scheduler_is_made(options, says):
    with pytest.raises(EtudeError, match=says):
        FlowMatchGDDIMScheduler(**options)
    with pytest.raises(EtudeError, match=says):
        FlowMatchGDDIMScheduler.from_config(FlowMatchEulerDiscreteScheduler().config, **options)


def test_each_scheduler_refuses_the_others_config():
    with pytest.raises(EtudeError, match="not a rectified-flow scheduler"):
        FlowMatchGDDIMScheduler.from_config(DDIMScheduler().config, eta=1.0)
    with pytest.raises(EtudeError, match="not a variance preserving scheduler"):
        GDDIMScheduler.from_config(FlowMatchEulerDiscreteScheduler().config, eta=1.0)


def test_misuse_is_an_error_that_says_what_to_do():
    scheduler = FlowMatchGDDIMScheduler(eta=1.0)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(EtudeError, match="call set_timesteps"):
        scheduler.step(x, 1.0, x)
    with pytest.raises(EtudeError, match="no number of steps"):
        scheduler.set_timesteps()
    with pytest.raises(EtudeError, match="same length"):
        scheduler.set_timesteps(4, sigmas=[1.0, 0.5])
    with pytest.raises(EtudeError, match="must fall"):
        scheduler.set_timesteps(sigmas=[0.5, 1.0])
    with pytest.raises(EtudeError, match="give the levels 1, 1, 0, but they must fall"):
        FlowMatchGDDIMScheduler(use_dynamic_shifting=True).set_timesteps(2, mu=40.0)
    with pytest.raises(EtudeError, match="no mu was given"):
        FlowMatchGDDIMScheduler(use_dynamic_shifting=True).set_timesteps(4)
    with pytest.raises(EtudeError, match="largest legal eta"):
        FlowMatchGDDIMScheduler(kernel="ddim", eta=1.5).set_timesteps(10)
    scheduler.set_timesteps(2)
    for timestep in (1, torch.tensor(1)):
        with pytest.raises(EtudeError, match="whole number"):
            scheduler.step(x, timestep, x)
    with pytest.raises(EtudeError, match="timestep 7 is not among the 2"):
        scheduler.step(x, torch.tensor(7.0), x)
    with pytest.raises(EtudeError, match="one of the two"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=generator(), variance_noise=x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(EtudeError, match="all 2 steps were taken"):
        scheduler.step(x, scheduler.timesteps[1], x)


MAKERS = {
    "flux": lambda: tiny.flux(),
    "schnell": lambda: tiny.flux(guidance_embeds=False, use_dynamic_shifting=False, shift=1.0),
    "sd3": lambda: tiny.stable_diffusion_3(),
    "sd3-dynamic": lambda: tiny.stable_diffusion_3(use_dynamic_shifting=True),
}


@pytest.fixture(scope="module", params=MAKERS)
def pipe(request) -> FluxPipeline | StableDiffusion3Pipeline:
    pipe = MAKERS[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, scheduler: Any, seed: int = 7, **arguments: Any) -> torch.Tensor:
    """Latents of two prompts under a scheduler; the step's noise from torch's global generator."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    torch.manual_seed(seed)
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent", **arguments}
    if "Img2Img" not in type(pipe).__name__:
        call = {"height": 16, "width": 16, **call}
    try:
        return pipe(["a red cat", "the sun"], max_sequence_length=12, generator=generator(7), **call).images
    finally:
        pipe.scheduler = before


def test_a_whole_pipeline_run_equals_diffusers_euler(pipe):
    theirs = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    ours = FlowMatchGDDIMScheduler.from_config(pipe.scheduler.config)
    want = sample(pipe, theirs)
    torch.testing.assert_close(sample(pipe, ours), want, atol=1e-6, rtol=1e-5)
    sigmas = {"sigmas": [1.0, 0.6, 0.2], "num_inference_steps": 3}
    torch.testing.assert_close(sample(pipe, ours, **sigmas), sample(pipe, theirs, **sigmas), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_an_image_to_image_run_equals_diffusers_euler(pipe, strength):
    convert = FluxImg2ImgPipeline if isinstance(pipe, FluxPipeline) else StableDiffusion3Img2ImgPipeline
    img2img = convert(**{k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")})
    img2img.set_progress_bar_config(disable=True)
    arguments = {"image": torch.rand(2, 3, 16, 16, generator=generator(3)), "strength": strength}
    arguments |= {"height": 16, "width": 16}
    theirs = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    want = sample(img2img, theirs, **arguments)
    ours = FlowMatchGDDIMScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(sample(img2img, ours, **arguments), want, atol=1e-6, rtol=1e-5)
    noisy = sample(img2img, FlowMatchGDDIMScheduler.from_config(pipe.scheduler.config, eta=1.2), **arguments)
    assert bool(noisy.isfinite().all())
    assert not torch.allclose(noisy, want, atol=1e-3)


@pytest.mark.parametrize(("kernel", "eta"), [("gddim", 0.5), ("gddim", 1.2), ("flow_sde", 0.7), ("cps", 0.8)])
def test_a_pipeline_samples_finite_images_that_the_seed_decides(pipe, kernel, eta):
    scheduler = FlowMatchGDDIMScheduler.from_config(pipe.scheduler.config, eta=eta, kernel=kernel)
    once, again, other = (sample(pipe, scheduler, seed) for seed in (1, 1, 2))
    assert bool(once.isfinite().all())
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_a_pipeline_saves_and_loads_with_its_eta(pipe, tmp_path):
    scheduler = FlowMatchGDDIMScheduler.from_config(pipe.scheduler.config, eta=1.4, kernel="dance_sde")
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        pipe.save_pretrained(tmp_path)
    finally:
        pipe.scheduler = before
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, FlowMatchGDDIMScheduler)
    assert (loaded.scheduler.eta, loaded.scheduler.config.kernel) == (1.4, "dance_sde")
    assert '"etude",' in (tmp_path / "model_index.json").read_text()
    assert torch.equal(sample(loaded, loaded.scheduler), sample(pipe, scheduler))

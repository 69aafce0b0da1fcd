from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from etude.errors import EtudeError
from etude.sampling.schedulers import GDDIMScheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def output_for(kind: str, x0: torch.Tensor, eps: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """A network's output a little off the truth, at any state x."""
    a, s = alpha.sqrt(), (1 - alpha).sqrt()
    x0_hat = x0 + 0.1 * torch.tanh(x)
    eps_hat = eps + 0.1 * torch.tanh(x)
    return {"epsilon": eps_hat, "sample": x0_hat, "v_prediction": a * eps_hat - s * x0_hat}[kind]


def run_both(config: dict[str, Any], num_steps: int, eta: float) -> float:
    """The largest difference from diffusers' DDIM over a whole trajectory, each step from DDIM's own state."""
    theirs = DDIMScheduler(**config)
    ours = GDDIMScheduler.from_config(theirs.config, eta=eta)
    theirs.set_timesteps(num_steps)
    ours.set_timesteps(num_steps)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    x0, eps = torch.randn(2, 2, 4, 8, 8, generator=generator(1))
    alpha = theirs.alphas_cumprod[theirs.timesteps[0]]
    x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps
    worst = 0.0
    for k, t in enumerate(theirs.timesteps):
        output = output_for(theirs.config.prediction_type, x0, eps, x, theirs.alphas_cumprod[t])
        noise = torch.randn(x.shape, generator=generator(100 + k))
        want = theirs.step(output, int(t), x, eta=eta, variance_noise=noise if eta else None)
        got = ours.step(output, t, x, variance_noise=noise)
        scale = max(1.0, float(want.prev_sample.abs().max()))
        worst = max(worst, float((got.prev_sample - want.prev_sample).abs().max()) / scale)
        torch.testing.assert_close(got.pred_original_sample, want.pred_original_sample, atol=2e-5, rtol=2e-5)
        x = want.prev_sample
    return worst


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
def test_eta_zero_and_one_are_diffusers_ddim(eta, kind, spacing, set_alpha_to_one, offset):
    config = {
        **SD,
        "prediction_type": kind,
        "timestep_spacing": spacing,
        "set_alpha_to_one": set_alpha_to_one,
        "steps_offset": offset,
    }
    for num_steps in (10, 50):
        assert run_both(config, num_steps, eta) < 1e-6


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_other_beta_schedules_and_trained_betas_are_diffusers_ddim_too(schedule, eta):
    config = {"clip_sample": False, "beta_schedule": schedule, "prediction_type": "v_prediction"}
    assert run_both(config, 20, eta) < 1e-6
    betas = torch.linspace(0.001, 0.05, 200).tolist()
    assert run_both({"clip_sample": False, "trained_betas": betas, "num_train_timesteps": 200}, 20, eta) < 1e-6


@pytest.mark.parametrize(
    "limits",
    [
        {"clip_sample": True, "clip_sample_range": 0.7},
        {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
        {"clip_sample": True, "thresholding": True},
    ],
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_clipping_and_thresholding_are_those_of_diffusers_ddim(limits, eta):
    assert run_both({**SD, **limits}, 20, eta) < 1e-6


def test_zero_terminal_snr_starts_with_diffusers_ode_step_or_where_asked_with_a_redraw():
    config = {
        **SD,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    assert run_both(config, 10, 0.0) < 1e-6
    x, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator())
    schedulers = {first: GDDIMScheduler(**config, eta=1.0, first_step=first) for first in ("ode", "sde")}
    got = {}
    for first, scheduler in schedulers.items():
        scheduler.set_timesteps(10)
        got[first] = scheduler.step(output, 999, x, variance_noise=noise).prev_sample
    theirs = DDIMScheduler(**config)
    theirs.set_timesteps(10)
    torch.testing.assert_close(got["ode"], theirs.step(output, 999, x).prev_sample, atol=1e-6, rtol=1e-6)
    # At a = 0 and eta 1 diffusers takes the root of a rounding error below 0; its formula's value is this.
    alpha = theirs.alphas_cumprod[899]
    redrawn = -alpha.sqrt() * output + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(got["sde"], redrawn, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_a_step_ends_at_the_next_timestep_of_the_grid(spacing):
    """6 steps do not divide 1000: the true noise must be read off at the level of the next timestep."""
    scheduler = GDDIMScheduler(**SD, timestep_spacing=spacing)
    scheduler.set_timesteps(6)
    x0, eps = torch.randn(2, 2, 4, 8, 8, generator=generator())
    steps = scheduler.timesteps
    x = scheduler.add_noise(x0, eps, steps[:1])
    for t, following in pairwise(steps):
        x = scheduler.step(eps, t, x).prev_sample
        torch.testing.assert_close(x, scheduler.add_noise(x0, eps, following[None]), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("eta", [0.5, 1.5, 5.0, 50.0])
def test_any_eta_keeps_the_marginals_of_the_true_pair(eta):
    scheduler = GDDIMScheduler(**SD, eta=eta)
    scheduler.set_timesteps(10)
    x0 = torch.randn(1, 1, 1, 1, generator=generator()).expand(50_000, 1, 1, 1)
    x = scheduler.add_noise(x0, torch.randn(x0.shape, generator=generator(1)), scheduler.timesteps[:1])
    draws = generator(2)
    for t, following in pairwise(scheduler.timesteps):
        alpha = scheduler.alphas_cumprod[t]
        eps = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        x = scheduler.step(eps, t, x, generator=draws).prev_sample
        noise_var = float(1 - scheduler.alphas_cumprod[following])
        assert abs(float(x.var()) / noise_var - 1) < 5 * (2 / 50_000) ** 0.5


def test_the_eta_that_pipelines_pass_never_replaces_the_configs():
    scheduler = GDDIMScheduler(**SD, eta=1.2)
    scheduler.set_timesteps(4)
    x, t, output = torch.ones(1, 1, 2, 2), scheduler.timesteps[0], torch.zeros(1, 1, 2, 2)
    plain = scheduler.step(output, t, x, generator=generator()).prev_sample
    for same in (0, 0.0, 1.2):
        assert torch.equal(scheduler.step(output, t, x, generator=generator(), eta=same).prev_sample, plain)
    with pytest.raises(EtudeError, match=r"eta = 0\.7 was given to the pipeline, but the scheduler's own is 1\.2"):
        scheduler.step(output, t, x, generator=generator(), eta=0.7)


def test_betas_and_alphas_are_those_of_diffusers():
    ours, theirs = GDDIMScheduler(**SD), DDIMScheduler(**SD)
    torch.testing.assert_close(ours.betas, theirs.betas, atol=2e-7, rtol=1e-3)
    torch.testing.assert_close(ours.alphas, theirs.alphas, atol=2e-7, rtol=1e-6)


def test_step_takes_what_diffusers_pipelines_pass():
    parameters = inspect.signature(GDDIMScheduler.step).parameters
    assert list(parameters)[1:] == [
        "model_output",
        "timestep",
        "sample",
        "generator",
        "variance_noise",
        "return_dict",
        "eta",
    ]


@pytest.mark.parametrize(
    "source",
    [
        DDIMScheduler,
        DDPMScheduler,
        PNDMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
    ],
)
def test_from_config_keeps_the_values_the_source_scheduler_really_has(source):
    scheduler = source(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ours = GDDIMScheduler.from_config(scheduler.config, eta=1.2)
    for key in ("timestep_spacing", "clip_sample", "set_alpha_to_one", "prediction_type", "steps_offset"):
        if key in scheduler.config:
            assert ours.config[key] == scheduler.config[key], key
    assert ours.config.eta == 1.2
    torch.testing.assert_close(ours.alphas_cumprod, scheduler.alphas_cumprod)
    raw = {k: v for k, v in scheduler.config.items() if k not in scheduler.config["_use_default_values"]}
    raw["_class_name"] = source.__name__
    again = GDDIMScheduler.from_config(raw, eta=1.2)
    assert again.config.timestep_spacing == ours.config.timestep_spacing
    assert again.path.final_alpha_cumprod == ours.path.final_alpha_cumprod


def test_an_euler_config_that_ends_above_zero_noise_stays_so():
    source = EulerDiscreteScheduler(final_sigmas_type="sigma_min")
    ours = GDDIMScheduler.from_config(source.config, eta=1.0)
    ours.set_timesteps(10)
    assert ours.path.final_alpha_cumprod == float(ours.alphas_cumprod[0])


def test_a_saved_scheduler_loads_as_it_was_and_a_saved_pndm_loads_as_gddim(tmp_path):
    scheduler = GDDIMScheduler(**SD, eta=1.3, first_step="sde", steps_offset=1, timestep_spacing="trailing")
    scheduler.save_pretrained(tmp_path / "ours")
    loaded = GDDIMScheduler.from_pretrained(tmp_path / "ours")
    keys = inspect.signature(GDDIMScheduler.__init__).parameters.keys() - {"self"}
    assert {k: loaded.config[k] for k in keys} == {k: scheduler.config[k] for k in keys}
    default = GDDIMScheduler()
    default.save_pretrained(tmp_path / "default")
    assert GDDIMScheduler.from_pretrained(tmp_path / "default").config.clip_sample is False
    PNDMScheduler(skip_prk_steps=True, steps_offset=1).save_pretrained(tmp_path / "theirs")
    other = GDDIMScheduler.from_pretrained(tmp_path / "theirs", eta=0.8)
    assert (other.config.steps_offset, other.config.set_alpha_to_one, other.eta) == (1, False, 0.8)
    assert DDIMScheduler.from_config(scheduler.config).config.timestep_spacing == "trailing"


@pytest.mark.parametrize("eta", [-0.5, float("nan"), float("inf")])
def test_an_illegal_eta_is_an_error_when_the_scheduler_is_made(eta):
    with pytest.raises(EtudeError, match="finite number"):
        GDDIMScheduler(eta=eta)
    with pytest.raises(EtudeError, match="finite number"):
        GDDIMScheduler.from_config(DDIMScheduler().config, eta=eta)


def test_misuse_is_an_error_that_says_what_to_do():
    scheduler = GDDIMScheduler(**SD, eta=1.0)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(EtudeError, match="call set_timesteps"):
        scheduler.step(x, 1, x)
    scheduler.set_timesteps(10)
    for timestep in (7, -1, 1000, torch.tensor(5)):
        with pytest.raises(EtudeError, match="not among the 10"):
            scheduler.step(x, timestep, x)
    with pytest.raises(EtudeError, match="one of the two"):
        scheduler.step(x, 900, x, generator=generator(), variance_noise=x)
    for num_steps in (0, 1001):
        with pytest.raises(EtudeError, match="from 1 to 1000"):
            scheduler.set_timesteps(num_steps)
    with pytest.raises(EtudeError, match="first_step"):
        GDDIMScheduler(first_step="none")


def test_per_sample_timesteps_and_tuples_are_the_same_step():
    scheduler = GDDIMScheduler(**SD, eta=1.2)
    scheduler.set_timesteps(10)
    x, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator())
    mixed = scheduler.step(output, torch.tensor([900, 300]), x, variance_noise=noise)
    for row, t in enumerate((900, 300)):
        alone = scheduler.step(output, t, x, variance_noise=noise, return_dict=False)
        assert torch.equal(alone[0][row], mixed.prev_sample[row])
        assert torch.equal(alone[1][row], mixed.pred_original_sample[row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_keep_their_dtype_and_fp32_arithmetic(dtype):
    scheduler = GDDIMScheduler(**SD, eta=1.2)
    scheduler.set_timesteps(50)
    x, output = torch.randn(2, 2, 4, 8, 8, generator=generator()).to(dtype)
    got = scheduler.step(output, 20, x, generator=generator(5)).prev_sample
    exact = scheduler.step(output.float(), 20, x.float(), generator=generator(5)).prev_sample
    assert got.dtype == dtype
    assert torch.equal(got, exact.to(dtype))


def test_a_step_reads_nothing_back_from_the_device():
    """On the meta device any value read back (item, cpu, a branch on a tensor) is an error."""
    scheduler = GDDIMScheduler(**SD, eta=1.2)
    scheduler.set_timesteps(10, device="meta")
    x = torch.empty(2, 4, 8, 8, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x, variance_noise=x).prev_sample
    assert x.shape == (2, 4, 8, 8)


def test_add_noise_and_velocity_are_those_of_diffusers_ddim():
    theirs, ours = DDIMScheduler(**SD), GDDIMScheduler(**SD)
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=generator())
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
    torch.testing.assert_close(ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t))
    assert ours.scale_model_input(x, 3) is x
    assert (len(ours), ours.order, ours.init_noise_sigma) == (1000, 1, 1.0)
    assert torch.equal(ours.timesteps, theirs.timesteps)


def tokenizer() -> CLIPTokenizer:
    letters = list("abcdefghijklmnopqrstuvwxyz")
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def parts(**unet: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "unet": UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **unet,
        ),
        "vae": AutoencoderKL(
            block_out_channels=[16, 16],
            norm_num_groups=8,
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            sample_size=16,
        ),
        "tokenizer": tokenizer(),
    }


@pytest.fixture(scope="module")
def sd() -> StableDiffusionPipeline:
    components = parts(cross_attention_dim=32, attention_head_dim=8)
    components["text_encoder"] = CLIPTextModel(text_config()).eval()
    pipe = StableDiffusionPipeline(
        **components,
        scheduler=DDIMScheduler(**SD, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sdxl() -> StableDiffusionXLPipeline:
    components = parts(
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80,
    )
    pipe = StableDiffusionXLPipeline(
        **components,
        text_encoder=CLIPTextModel(text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config()).eval(),
        tokenizer_2=components["tokenizer"],
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, scheduler: Any, **arguments: Any) -> torch.Tensor:
    """Latents of two prompts under a scheduler, from a fixed generator."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        call = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent", **arguments}
        return pipe(["a red cat", "the sun"], generator=generator(7), **call).images
    finally:
        pipe.scheduler = before


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_whole_pipeline_run_equals_diffusers_ddim(name, eta, request):
    """At eta 1 too: both schedulers draw one noise per step, the last included, from the pipeline's generator."""
    pipe = request.getfixturevalue(name)
    size = {"height": 16, "width": 16}
    theirs = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    ours = GDDIMScheduler.from_config(theirs.config, eta=eta)
    want = sample(pipe, theirs, eta=eta, **size)
    got = sample(pipe, ours, **size)
    assert got.shape == (2, 4, 8, 8)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(EtudeError, match=r"eta = 0\.3 was given to the pipeline"):
        sample(pipe, ours, eta=0.3, **size)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_an_image_to_image_run_equals_diffusers_ddim(name, strength, eta, request):
    pipe = request.getfixturevalue(name)
    convert = StableDiffusionImg2ImgPipeline if name == "sd" else StableDiffusionXLImg2ImgPipeline
    img2img = convert(**pipe.components, **({"requires_safety_checker": False} if name == "sd" else {}))
    img2img.set_progress_bar_config(disable=True)
    image = torch.rand(2, 3, 16, 16, generator=generator(3))
    theirs = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    ours = GDDIMScheduler.from_config(theirs.config, eta=eta)
    want = sample(img2img, theirs, image=image, strength=strength, eta=eta)
    got = sample(img2img, ours, image=image, strength=strength)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.5, 1.2, 5.0])
def test_a_pipeline_samples_finite_images_at_any_eta_and_eta_matters(sd, eta):
    images = {
        e: sample(sd, GDDIMScheduler.from_config(sd.scheduler.config, eta=e), output_type="pt") for e in (0.0, eta)
    }
    assert bool(images[eta].isfinite().all())
    assert not torch.equal(images[0.0], images[eta])


def test_a_pipeline_saves_and_loads_with_its_eta(sd, tmp_path):
    before, sd.scheduler = sd.scheduler, GDDIMScheduler.from_config(sd.scheduler.config, eta=1.4)
    try:
        sd.save_pretrained(tmp_path)
        want = sample(sd, sd.scheduler)
    finally:
        sd.scheduler = before
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, GDDIMScheduler)
    assert pipe.scheduler.eta == 1.4
    assert torch.equal(sample(pipe, pipe.scheduler), want)

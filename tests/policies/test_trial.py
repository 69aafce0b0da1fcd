"""A model's parts are taken as the plain pipeline takes them, and a value that is not finite is never a picture."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from etude.cli.app import app
from etude.errors import EtudeError
from etude.policies import load_policy
from etude.policies.flux import FluxPolicy
from etude.policies.pipeline import PipelinePolicy
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.policies.stable_diffusion_xl import StableDiffusionXLPolicy
from etude.policies.trial import tell_of_scheduler
from etude.sampling.finite import FiniteMarks
from etude.sampling.noise import NoiseSource
from etude.sampling.sampler import ODE
from etude.sampling.solvers import Solver
from support.readable import model, not_a_number, scaled, single, tiny_autoencoder, unet, without
from support.tiny import flux, stable_diffusion, stable_diffusion_xl


def plain(policy: PipelinePolicy, guidance: float, **call: Any) -> Tensor:
    policy.pipeline.set_progress_bar_config(disable=True)
    noise = NoiseSource(0, "evaluation").initial([0], policy.latent_shape)
    arguments = {"num_inference_steps": 4, "guidance_scale": guidance, "latents": noise, "output_type": "np", **call}
    return torch.from_numpy(policy.pipeline(["red heart"], **arguments).images).permute(0, 3, 1, 2).mul(255).round()


def with_guidance_embedding(kind: str) -> PipelinePolicy:
    pipeline = stable_diffusion() if kind == "sd" else stable_diffusion_xl()
    network = unet(pipeline.unet, time_cond_proj_dim=8)
    torch.nn.init.normal_(network.time_embedding.cond_proj.weight, 0, 3)
    pipeline.register_modules(unet=network)
    if kind == "sd":
        return StableDiffusionPolicy(pipeline)
    pipeline.scheduler = stable_diffusion().scheduler
    return StableDiffusionXLPolicy(pipeline)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_an_embedded_guidance_scale_is_the_plain_pipelines(kind: str) -> None:
    policy = with_guidance_embedding(kind)
    assert policy.encode(["red heart"]).unconditional == {}
    pictures = [ODE(4, guidance).draw(policy, ["red heart"]).float() for guidance in (1.0, 5.0)]
    for found, guidance in zip(pictures, (1.0, 5.0), strict=True):
        assert (found - plain(policy, guidance)).abs().max() <= 1
    assert not torch.equal(*pictures)


@pytest.mark.parametrize("family", [StableDiffusionPolicy, FluxPolicy])
def test_a_tiny_autoencoder_decodes_as_in_the_plain_pipeline(family: type[PipelinePolicy]) -> None:
    is_flux = family is FluxPolicy
    pipeline = flux() if is_flux else stable_diffusion()
    pipeline.register_modules(vae=tiny_autoencoder())
    side = {"height": 16, "width": 16, "max_sequence_length": 12} if is_flux else {}
    policy = family(pipeline, resolution=16 if is_flux else None)
    assert (ODE(4, 2.0).draw(policy, ["red heart"]).float() - plain(policy, 2.0, **side)).abs().max() <= 1
    assert not is_flux or family(pipeline).image_size == family(pipeline).pipeline_size()


def test_the_ddim_solver_is_the_ode_where_the_models_scheduler_does_not_clip() -> None:
    policy = StableDiffusionXLPolicy(stable_diffusion_xl())
    ode, ddim = (
        sampler.draw(policy, ["red heart"], decode=False) for sampler in (ODE(50, 1.0), Solver("ddim", 50, 1.0))
    )
    assert ode.abs().max() > 1.5  # so that clipping would show
    torch.testing.assert_close(ddim, ode, atol=1e-3, rtol=1e-3)


def test_a_file_without_an_autoencoder_keeps_its_text_encoder(tmp_path: Path) -> None:
    arguments = single(tmp_path, without("first_stage_model."))
    policy = load_policy(**arguments, device="cpu")
    whole = stable_diffusion()
    mine = {name: getattr(policy.pipeline, name).state_dict() for name in ("unet", "text_encoder", "vae")}
    whole.register_modules(vae=stable_diffusion(7).vae)
    for name, weights in mine.items():
        expected = getattr(whole, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in weights.items())


class Reads(TorchDispatchMode):
    """Counts the readings of a number from the device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_marks_wait_for_the_device_at_their_check_alone() -> None:
    marks = FiniteMarks("unet", torch.bfloat16, 3)
    with Reads() as reads:
        for step, value in enumerate((1.0, float("inf"), float("nan"))):
            marks.add(torch.tensor([0.0, value]), step)
    assert reads.count == 0
    with pytest.raises(EtudeError, match="unet's prediction at step 2 of 3 in bfloat16 holds NaN or infinity"):
        marks.check()
    marks.check()  # which has forgotten them


@pytest.mark.parametrize(
    "sampler", [ODE(4, 2.0), Solver("ddim", 4, 2.0), Solver("heun", 4, 2.0)], ids=lambda s: s.label
)
def test_a_prediction_that_is_not_finite_ends_every_sampler_and_names_the_step(
    sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, calls = StableDiffusionPolicy(stable_diffusion()), []
    predict = policy.predict

    def overflows(*args: Any) -> Tensor:
        calls.append(1)
        return predict(*args) * (float("inf") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(policy, "predict", overflows)
    with pytest.raises(EtudeError, match=rf"the unet's prediction at step 3 of {sampler.evaluations} in float32"):
        sampler.draw(policy, ["red heart"], decode=False)


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_an_encoded_prompt_that_is_not_finite_is_named_with_its_encoder(encoder: str) -> None:
    policy = StableDiffusionXLPolicy(stable_diffusion_xl())
    with torch.no_grad():
        letter = policy.pipeline.tokenizer("red heart").input_ids[1]
        policy.pipeline.components[encoder].get_input_embeddings().weight[letter, 0] = float("inf")
    policy.encode(["pizza"])
    with pytest.raises(EtudeError, match=f"the {encoder}'s encoder_hidden_states at the prompt 'red heart' in float32"):
        policy.encode(["red heart"])


@pytest.mark.parametrize(
    ("scheduler", "options", "says"),
    [
        (
            DDIMScheduler,
            {"clip_sample": False, "thresholding": True},
            "thresholding = True; the ODE .* leaves the predicted image as it is",
        ),
        (DDIMScheduler, {"clip_sample": True}, "clip_sample = True"),
        (DDPMScheduler, {}, "clip_sample = True"),
        (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}, "interpolation_type = log_linear"),
        (DPMSolverMultistepScheduler, {"lambda_min_clipped": -5.1}, "lambda_min_clipped = -5.1"),
        (
            FlowMatchEulerDiscreteScheduler,
            {"stochastic_sampling": True},
            "stochastic_sampling = True; .* draws no noise",
        ),
        (DDIMScheduler, {"clip_sample": False}, None),
        (EulerDiscreteScheduler, {}, None),
        (PNDMScheduler, {}, None),
        (FlowMatchEulerDiscreteScheduler, {}, None),
    ],
)
def test_a_setting_by_which_a_scheduler_steps_otherwise_is_told_with_its_value(
    scheduler: Any, options: dict[str, Any], says: str | None
) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tell_of_scheduler("m", scheduler(**options))
    messages = [str(each.message) for each in told]
    assert len(messages) == (says is not None)
    assert says is None or re.search(f"model 'm' comes with {scheduler.__name__} and {says}", messages[0])


@pytest.mark.filterwarnings("error")
def test_what_another_scheduler_left_in_a_configuration_gets_no_word() -> None:
    scheduler = EulerDiscreteScheduler.from_config({"clip_sample": True, "thresholding": True})
    assert scheduler.config["clip_sample"]
    tell_of_scheduler("m", scheduler)


def test_a_shift_factor_of_stable_diffusion_is_read_as_in_the_plain_pipeline() -> None:
    pipeline = stable_diffusion()
    pipeline.vae.register_to_config(shift_factor=3.0)
    policy = StableDiffusionPolicy(pipeline)
    assert (ODE(4, 5.0).draw(policy, ["red heart"]).float() - plain(policy, 5.0)).abs().max() <= 1


def test_latents_of_images_are_scaled_as_they_are_for_the_decoder() -> None:
    statistics = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [2.0, 1.0, 0.5, 3.0], "shift_factor": 0.7}
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    families = (
        (stable_diffusion, StableDiffusionPolicy),
        (stable_diffusion_xl, StableDiffusionXLPolicy),
        (flux, FluxPolicy),
    )
    for make, family in families:
        pipeline = make()
        pipeline.vae.register_to_config(**statistics)
        policy = family(pipeline)
        assert torch.allclose(policy._scaled(policy._unscaled(latents)), latents, atol=1e-5)


@pytest.mark.parametrize(
    "command", ["train", "gap", "sample", "advise", "bench", "check-model", "preferences draw", "preferences judge"]
)
@pytest.mark.parametrize("case", ["nan", "float16"])
def test_every_command_refuses_values_that_are_not_finite_and_leaves_nothing(
    command: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = not_a_number(tmp_path) if case == "nan" else scaled(tmp_path, 3e4, "float16")
    monkeypatch.chdir(tmp_path)
    place, dtype = str(arguments["model"]), arguments.get("dtype", "float32")
    sampler = {"solver": "ode", "steps": 2, "guidance": 1.0}
    protocol = {"name": "mine", "prompts": "emoji-eval", "num_prompts": 2, "images_per_prompt": 1, "sampler": sampler}
    Path("mine.yaml").write_text(json.dumps(protocol | {"dtype": dtype, "rewards": ["colorfulness"]}))
    few = ("--limit", "2", "--steps", "2", "--dtype", dtype, "--out", "run")
    lines = {
        "bench": [place, "--protocol", "mine.yaml", "--out", "run"],
        "check-model": [place, "--dtype", dtype],
        "preferences draw": [place, *few],
        "preferences judge": [place, f"{place},eta=1", "--draw-only", *few],
        "train": [
            "emoji-ddpo",
            "--model",
            place,
            *("--set", f"dtype={dtype}", "--reward", "colorfulness", "--out", "run"),
        ],
        "gap": [place, "--dtype", dtype, "--samples", "2", "--reward", "colorfulness", "--json", "run"],
        "sample": [place, "--dtype", dtype, "--prompt", "a", "--out", "run"],
        "advise": [
            place,
            *("--recipe", "emoji-ddpo", "--set", f"dtype={dtype}"),
            "--reward",
            "colorfulness",
            "--out",
            "run",
        ],
    }
    done = CliRunner().invoke(app, [*command.split(), *lines[command]])
    assert done.exit_code == 1
    assert f"in {dtype} holds NaN or infinity" in done.output
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_cut_is_told_once() -> None:
    policy = StableDiffusionPolicy(stable_diffusion())
    with pytest.warns(UserWarning, match=r"has 32 tokens, of which the text_encoder reads 16") as told:
        policy.encode(["a" * 30, "b" * 30, "red heart"])
    assert len(told) == 1


def test_the_trial_draws_no_random_number(tmp_path: Path) -> None:
    place = model(tmp_path)
    before = torch.get_rng_state()
    load_policy(place, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)

"""A model in one safetensors file is the model of its diffusers directory, and what cannot be read is one clear error."""

from __future__ import annotations

import json
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from etude.cli.app import app
from etude.config import LoraConfig, parse_config
from etude.errors import EtudeError
from etude.policies import Policy, load_policy
from etude.policies.deployment import deployment_snippet
from etude.policies.flux import FluxPolicy
from etude.policies.loading import load_source
from etude.policies.single_file import absent_parts
from etude.policies.source import ModelSource
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.policies.stable_diffusion_xl import StableDiffusionXLPolicy
from etude.policies.weight_files import _SCALES, contradictions
from etude.sampling.noise import NoiseSource
from etude.sampling.sampler import ODE
from support.single_file import write_single_file
from support.tiny import flux, stable_diffusion, stable_diffusion_xl

FAMILIES = {
    "stable-diffusion": (stable_diffusion, StableDiffusionPolicy),
    "stable-diffusion-xl": (stable_diffusion_xl, StableDiffusionXLPolicy),
}


def images(policy: Policy) -> torch.Tensor:
    return ODE(3, 3.0).draw(policy, ["red heart", "pizza"])


def without_weights(directory: Path) -> Path:
    """What a hub repository's configuration files alone are."""
    for file in directory.rglob("*.safetensors"):
        file.unlink()
    return directory


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_one_file_and_a_configuration_are_the_pipeline(name, tmp_path):
    pipeline, adapter = FAMILIES[name]
    pipeline().save_pretrained(tmp_path / "whole")
    file = write_single_file(pipeline(), tmp_path / "model.safetensors")
    expected = images(load_policy(tmp_path / "whole", device="cpu"))
    policy = load_policy(file, device="cpu", pipeline_config=without_weights(tmp_path / "whole"))
    assert type(policy) is adapter
    assert torch.equal(images(policy), expected)


def test_a_file_of_the_denoiser_alone_takes_the_other_parts_from_the_configuration(tmp_path):
    flux().save_pretrained(tmp_path / "other")
    mine = flux(seed=1).transformer
    save_file(dict(mine.state_dict()), tmp_path / "transformer.safetensors")
    policy = load_policy(tmp_path / "transformer.safetensors", device="cpu", pipeline_config=tmp_path / "other")
    assert type(policy) is FluxPolicy
    network = policy.pipeline.transformer
    assert type(network) is FluxTransformer2DModel
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in network.state_dict().items())
    other = load_policy(tmp_path / "other", device="cpu")
    assert torch.equal(
        policy.encode(["pizza"]).prompt["pooled_projections"], other.encode(["pizza"]).prompt["pooled_projections"]
    )


def test_without_a_configuration_the_hub_is_needed_and_named(tmp_path):
    file = write_single_file(stable_diffusion(), tmp_path / "model.safetensors")
    with pytest.raises(
        EtudeError, match=r"single file.*stable-diffusion-v1-5.*give pipeline_config a local diffusers directory"
    ):
        load_policy(file, device="cpu")


def test_parts_that_neither_file_nor_configuration_hold_are_asked_for(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "whole")
    weights = {f"first_stage_model.{i}": torch.zeros(1) for i in range(2)}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(EtudeError, match=r"does not hold every part|cannot be loaded"):
        load_policy(tmp_path / "model.safetensors", device="cpu", pipeline_config=without_weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("model", "content", "says"),
    [
        ("absent.safetensors", None, "there is no such file"),
        ("old.ckpt", b"", "pickled checkpoint"),
        ("flux.sft", b"", "rename it to .safetensors"),
        ("torn.safetensors", b"not a header", "cannot be loaded"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(model, content, says, tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "config")
    if content is not None:
        (tmp_path / model).write_bytes(content)
    with pytest.raises(EtudeError, match=says):
        load_policy(tmp_path / model, device="cpu", pipeline_config=tmp_path / "config")


def test_a_configuration_must_be_a_pipeline_of_a_known_class_and_belongs_to_a_file(tmp_path):
    file = write_single_file(stable_diffusion(), tmp_path / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EtudeError, match=r"pipeline_config .* has no model_index\.json"):
        load_policy(file, device="cpu", pipeline_config=tmp_path / "empty")
    (tmp_path / "empty" / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(EtudeError, match="is a KandinskyPipeline"):
        load_policy(file, device="cpu", pipeline_config=tmp_path / "empty")
    with pytest.raises(EtudeError, match="leave it out"):
        load_policy("emoji-sd", device="cpu", pipeline_config=tmp_path / "empty")


def denoiser_file(pipeline, file: Path) -> Path:
    save_file(dict(pipeline.transformer.state_dict()), file)
    return file


def without_encoder(number: int, pipeline, file: Path) -> Path:
    lost = f"conditioner.embedders.{number}."
    weights = load_file(write_single_file(pipeline, file))
    save_file({name: value for name, value in weights.items() if not name.startswith(lost)}, file)
    return file


def test_a_file_that_lacks_one_of_its_text_encoders_keeps_the_other_or_is_refused_by_run_and_dry_run(tmp_path):
    stable_diffusion_xl().save_pretrained(tmp_path / "config")
    file = without_encoder(0, stable_diffusion_xl(seed=1), tmp_path / "model.safetensors")
    load_policy(file, outline=True, pipeline_config=tmp_path / "config")
    parts = load_policy(file, device="cpu", pipeline_config=tmp_path / "config").pipeline.components
    for name, seed in (("text_encoder", 0), ("text_encoder_2", 1), ("unet", 1), ("vae", 1)):
        expected = stable_diffusion_xl(seed=seed).components[name].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in parts[name].state_dict().items())
    file = without_encoder(1, stable_diffusion_xl(), tmp_path / "model.safetensors")
    for outline in (False, True):
        with pytest.raises(
            EtudeError, match=r"the first of two text encoders .* give the file with both or with neither"
        ):
            load_policy(file, device="cpu", outline=outline, pipeline_config=tmp_path / "config")


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        ("CLIPTextModel", "text_encoders.clip_l.x"),
        ("T5EncoderModel", "text_encoders.t5xxl.x"),
        ("Qwen3Model", "text_encoders.q.x"),
    ],
)
def test_each_text_encoder_of_a_file_is_looked_for_under_its_own_name(kind, held, tmp_path):
    networks = {"text_encoder": kind, "transformer": "T", "vae": "V"}
    for name in ("text_encoders.clip_l.x", "text_encoders.t5xxl.x", held):
        save_file({name: torch.zeros(1), "vae.x": torch.zeros(1)}, tmp_path / "a.safetensors")
        absent = absent_parts(str(tmp_path / "a.safetensors"), networks, "transformer")
        assert (absent == []) == (name == held or kind == "Qwen3Model")


@pytest.mark.parametrize(
    ("pipeline", "write"),
    [(stable_diffusion, write_single_file), (flux, denoiser_file), (stable_diffusion_xl, partial(without_encoder, 0))],
    ids=["whole", "denoiser", "one encoder of two"],
)
def test_the_cards_lines_load_the_file_and_the_adapter(pipeline, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline().save_pretrained("config")
    write(pipeline(seed=1), Path("model.safetensors"))
    policy = load_policy("model.safetensors", device="cpu", pipeline_config="config")
    policy.add_lora(LoraConfig(rank=2, alpha=2.0), seed=0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1)
    policy.export(Path("lora"))
    snippet = deployment_snippet(policy, ModelSource("model.safetensors", pipeline_config="config"), 3, 3.0)
    assert snippet.count("config=") == snippet.count("from_single_file(") == 1
    noise = NoiseSource(0, "evaluation").initial([0, 1], policy.latent_shape)
    call = "['red heart', 'pizza'], latents=NOISE, output_type='np'"
    lines = snippet.replace('"a prompt"', call).replace("[0]", "")
    Path("card.py").write_text(lines)
    drawn = runpy.run_path("card.py", {"NOISE": noise})["image"]
    found = torch.from_numpy(drawn).permute(0, 3, 1, 2).mul(255).round()
    assert (found - images(policy).float()).abs().max() <= 1


def test_a_configuration_trains_from_a_file(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "config")
    file = write_single_file(stable_diffusion(), tmp_path / "model.safetensors")
    config = parse_config({"model": str(file), "pipeline_config": str(tmp_path / "config"), "dtype": "bfloat16"})
    policy = load_source(ModelSource.of(config), "cpu")
    assert policy.dtype == torch.bfloat16
    assert {p.dtype for p in policy.network.parameters()} == {torch.bfloat16}


def test_the_command_line_draws_from_a_file(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "config")
    file = write_single_file(stable_diffusion(), tmp_path / "model.safetensors")
    arguments = ["sample", file, "--prompt", "a", "--steps", 2, "--out", tmp_path / "a.png"]
    done = CliRunner().invoke(app, [str(a) for a in [*arguments, "--pipeline-config", tmp_path / "config"]])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize("outline", [True, False])
@pytest.mark.parametrize(
    ("encoder", "lost"),
    [
        ("text_encoder", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"),
        ("text_encoder_2", "conditioner.embedders.1.model.ln_final.bias"),
        ("text_encoder_2", "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"),
    ],
)
def test_each_text_encoder_of_a_file_is_complete_or_named(encoder, lost, outline, tmp_path):
    stable_diffusion_xl().save_pretrained(tmp_path / "config")
    file = write_single_file(stable_diffusion_xl(), tmp_path / "model.safetensors")
    save_file({name: value for name, value in load_file(file).items() if name != lost}, file)
    with pytest.raises(EtudeError, match=rf"lacks '.*bias'( and 2 more)? of the {encoder}"):
        load_policy(file, device="cpu", outline=outline, pipeline_config=tmp_path / "config")


@pytest.mark.filterwarnings("error::UserWarning")
def test_what_every_file_of_a_model_holds_beside_its_weights_gets_no_word(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "config")
    file = write_single_file(stable_diffusion(), tmp_path / "model.safetensors")
    beside = ("betas", "alphas_cumprod", "sqrt_recip_alphas_cumprod", "posterior_variance", "logvar", "denoiser.sigmas")
    beside += ("cond_stage_model.transformer.text_model.embeddings.position_ids", "cond_stage_model.logit_scale")
    save_file(load_file(file) | {name: torch.zeros(1) for name in beside}, file)
    load_policy(file, device="cpu", outline=True, pipeline_config=tmp_path / "config")


V, END = ("prediction_type", "v_prediction"), ("rescale_betas_zero_snr", True)
SAID = [
    ({"modelspec.prediction_type": "v"}, [V]),
    ({"modelspec.prediction_type": "v-prediction"}, [V]),
    ({"modelspec.predict_key": "v"}, [V]),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, [V]),
    ({"ss_base_model_version": "sd_v2_v"}, [V]),
    ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "1"}, [V, END]),
    ({"ss_zero_terminal_snr": "True"}, [END]),
    ({"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-v1"}, []),
    ({"ss_v2": "True", "ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, []),
]


@pytest.mark.parametrize(("metadata", "differs"), SAID)
def test_what_a_header_says_of_its_network_is_held_against_the_scheduler(metadata, differs):
    epsilon = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}
    assert [(key, value) for _, key, value, _ in contradictions((), metadata, epsilon)] == differs
    other = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    said = [(key, value) for _, key, value, _ in contradictions((), metadata, other)]
    assert said == ([("prediction_type", "epsilon")] if "epsilon" in metadata.values() else [])
    assert contradictions(("v_pred",), metadata, {"_class_name": "FlowMatchEulerDiscreteScheduler"}) == []


def test_an_average_in_the_names_of_compvis_is_no_quantised_weight():
    average = "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn1to_qweight"
    assert not _SCALES.fullmatch(average)
    for name in ("layer.qweight", "qzeros", "to_q.weight_scale", "to_q.weight.absmax", "layer.SCB", "scaled_fp8"):
        assert _SCALES.fullmatch(name)

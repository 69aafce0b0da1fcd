"""Kinds of models that etude reads or refuses: one row a kind, each with the input that shows it.

`tests/policies/test_what_etude_reads.py` runs every row, and compares the table with the page of the
documentation. `python tests/support/readable.py` prints the table.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from etude.sampling.schedulers import GDDIMScheduler
from support.single_file import write_single_file
from support.tiny import flux, stable_diffusion, stable_diffusion_3

Arguments = dict[str, Any]
"""Arguments of `load_policy`."""


@dataclass(frozen=True)
class Row:
    """A kind of input.

    Attributes:
        what: the input, as the page names it.
        outcome: what etude does with it, as the page says.
        make: writes an example into a directory.
        says: expression that the one sentence of the refusal matches; None for what is read.
        only_loading: whether the refusal needs numbers, so that a dry run does not know it.
    """

    what: str
    outcome: str
    make: Callable[[Path], Arguments]
    says: str | None = None
    only_loading: bool = False


def model(place: Path, pipeline: Any = None, **how: Any) -> Path:
    (pipeline or stable_diffusion()).save_pretrained(place / "model", **how)
    return place / "model"


def edit(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def unet(like: UNet2DConditionModel | None = None, **options: Any) -> UNet2DConditionModel:
    """A UNet with other options than `like`, or than that of the tiny Stable Diffusion."""
    config = dict((like or stable_diffusion().unet).config) | options
    torch.manual_seed(0)
    config.pop("_use_default_values")  # else an option that was left at its default goes back to it
    return UNet2DConditionModel.from_config(config)


def with_parts(place: Path, pipeline: Any, **parts: Any) -> Arguments:
    pipeline.register_modules(**parts)
    return {"model": model(place, pipeline)}


def with_scheduler(place: Path, kind: Any, **options: Any) -> Arguments:
    """Stable Diffusion with a scheduler of another class."""
    pipeline = stable_diffusion()
    return with_parts(place, pipeline, scheduler=kind.from_config(pipeline.scheduler.config, **options))


def tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4)


def consistency_decoder() -> ConsistencyDecoderVAE:
    torch.manual_seed(0)
    return ConsistencyDecoderVAE(
        sample_size=8,
        encoder_block_out_channels=(8, 16),
        encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_layers_per_block=1,
        encoder_norm_num_groups=8,
        decoder_block_out_channels=(32, 32),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        decoder_layers_per_block=1,
    )


def single(place: Path, change: Callable[[dict[str, Any]], dict[str, Any]], **metadata: str) -> Arguments:
    """One file, changed, beside a directory with its configuration and other weights."""
    stable_diffusion(7).save_pretrained(place / "config")
    file = write_single_file(stable_diffusion(), place / "model.safetensors")
    save_file(change(load_file(file)), file, metadata=metadata or None)
    return {"model": file, "pipeline_config": place / "config"}


def without(*ends: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda weights: {name: value for name, value in weights.items() if not any(end in name for end in ends)}


def rewritten(place: Path, part: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Arguments:
    """A directory with one weight file changed."""
    directory = model(place)
    file = next((directory / part).glob("*.safetensors"))
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return {"model": directory}


def reshaped(end: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda weights: {name: value[:4].clone() if name.endswith(end) else value for name, value in weights.items()}


def null(place: Path, pipeline: Any, *parts: str) -> Arguments:
    directory = model(place, pipeline)
    for part in parts:
        shutil.rmtree(directory / part)
    edit(directory / "model_index.json", **{part: [None, None] for part in parts})
    return {"model": directory}


def changed(place: Path, file: str, **changes: Any) -> Arguments:
    directory = model(place)
    edit(directory / file, **changes)
    return {"model": directory}


def longer_vocabulary(place: Path) -> Arguments:
    pipeline = stable_diffusion()
    pipeline.tokenizer.add_tokens(["<cat-toy>"])
    return {"model": model(place, pipeline)}


def shard_absent(place: Path) -> Arguments:
    directory = model(place, max_shard_size="100KB")
    next((directory / "unet").glob("*-of-*.safetensors")).unlink()
    return {"model": directory}


def scaled(place: Path, part: float, dtype: str = "float32") -> Arguments:
    """A pipeline whose decoder starts with weights so many times as large."""
    pipeline = stable_diffusion()
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(part)
    return {"model": model(place, pipeline), "dtype": dtype}


def not_a_number(place: Path) -> Arguments:
    return rewritten(place, "unet", lambda weights: weights | {"conv_out.bias": torch.full((4,), float("nan"))})


def fp8(place: Path) -> Arguments:
    return single(place, lambda w: {k: v.to(torch.float8_e4m3fn) if v.ndim > 1 else v for k, v in w.items()})


def lora_as_model(place: Path) -> Arguments:
    arguments = single(place, dict)
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, arguments["model"])
    return arguments


def incomplete_configuration(place: Path) -> Arguments:
    """A file of the denoiser, beside a configuration with a text encoder that lacks tensors."""
    arguments = single(place, without("first_stage_model.", "cond_stage_model."))
    file = place / "config" / "text_encoder" / "model.safetensors"
    save_file(without("q_proj")(load_file(file)), file, metadata={"format": "pt"})
    return arguments


ROWS = (
    Row("a diffusers directory of any family", "read", lambda at: {"model": model(at, stable_diffusion_3())}),
    Row(
        "weight files with a suffix (`fp16`)",
        "read with `variant`",
        lambda at: {"model": model(at, variant="fp16"), "variant": "fp16"},
    ),
    Row("a pipeline without T5 (SD3)", "read", lambda at: {"model": model(at, stable_diffusion_3(with_t5=False))}),
    Row(
        "a UNet that embeds guidance (LCM)",
        "read: the scale is an input, as in the plain pipeline",
        lambda at: with_parts(at, stable_diffusion(), unet=unet(time_cond_proj_dim=8)),
    ),
    Row(
        "a scheduler of etude in the pipeline",
        "read",
        lambda at: with_parts(
            at, stable_diffusion(), scheduler=GDDIMScheduler.from_config(stable_diffusion().scheduler.config, eta=1.2)
        ),
    ),
    Row(
        "LCM and TCD schedulers",
        "read with a word: the ODE takes their place",
        lambda at: with_parts(
            at, stable_diffusion(), scheduler=LCMScheduler.from_config(stable_diffusion().scheduler.config)
        ),
    ),
    Row(
        "schedulers of other solvers (Euler ancestral, DPM-Solver, UniPC)",
        "read: the ODE on DDIM's levels of their spacing",
        lambda at: with_scheduler(at, EulerAncestralDiscreteScheduler),
    ),
    Row(
        "their Karras, exponential and beta sigmas",
        "read with a word: the levels are those of the spacing",
        lambda at: with_scheduler(at, DPMSolverMultistepScheduler, use_karras_sigmas=True),
    ),
    Row(
        "`thresholding`, `clip_sample`, `interpolation_type`, `stochastic_sampling` of its scheduler",
        "read with a word: the ODE takes its plain steps",
        lambda at: with_scheduler(at, DDIMScheduler, clip_sample=False, thresholding=True),
    ),
    Row(
        "a scheduler with continuous timesteps under v-prediction",
        "refused",
        lambda at: with_scheduler(
            at, EulerDiscreteScheduler, timestep_type="continuous", prediction_type="v_prediction"
        ),
        r"reads log\(sigma\) / 4 in place of timesteps",
    ),
    Row("`AutoencoderTiny`", "read", lambda at: {**with_parts(at, flux(), vae=tiny_autoencoder()), "resolution": 16}),
    Row(
        "one safetensors file, whole or in parts",
        "read: every part that the file holds is the file's",
        lambda at: single(at, without("first_stage_model.")),
    ),
    Row(
        "tensors of a single file that no part reads, such as an average of the weights (`model_ema.`)",
        "read with a word",
        lambda at: single(at, lambda w: w | {"weird.weight": torch.zeros(1), "model_ema.decay": torch.zeros(1)}),
    ),
    Row("8-bit floating weights without scales", "read, and held in `dtype`", fp8),
    Row(
        "tensors that no part has a place for",
        "read with a word",
        lambda at: rewritten(at, "unet", lambda w: w | {"extra.weight": torch.zeros(1)}),
    ),
    Row(
        "a scheduler on EDM's noise levels",
        "refused",
        lambda at: with_parts(at, stable_diffusion(), scheduler=EDMEulerScheduler()),
        "EDMEulerScheduler",
    ),
    Row(
        "pipelines of another kind (Kandinsky, DeepFloyd)",
        "refused",
        lambda at: changed(at, "model_index.json", _class_name="KandinskyPipeline"),
        "is a KandinskyPipeline; the supported pipelines are",
    ),
    Row(
        "parts whose channels differ (inpainting, other autoencoders)",
        "refused",
        lambda at: with_parts(at, stable_diffusion(), unet=unet(in_channels=9)),
        r"unet\.in_channels is 9, but vae\.latent_channels is 4",
    ),
    Row(
        "parts whose widths differ",
        "refused",
        lambda at: with_parts(at, stable_diffusion(), unet=unet(cross_attention_dim=24)),
        r"unet\.cross_attention_dim is 24, but text_encoder\.hidden_size is 16",
    ),
    Row(
        "a denoiser with inputs that the pipeline does not give",
        "refused",
        lambda at: with_parts(at, stable_diffusion(), unet=unet(num_class_embeds=3)),
        "fails at its first prediction at 8 x 8 pixels",
    ),
    Row(
        "a tokenizer without `model_max_length`, or beyond the encoder's",
        "refused",
        lambda at: changed(at, "tokenizer/tokenizer_config.json", model_max_length=None),
        "its tokenizer gives no model_max_length, but the text_encoder reads 16 tokens",
    ),
    Row(
        "tokens without a row in the text encoder",
        "refused",
        longer_vocabulary,
        r"knows '<cat-toy>' as token \d+, but the text_encoder has \d+ rows",
    ),
    Row(
        "parts that are null",
        "refused, those apart that a family can lack",
        lambda at: null(at, flux(), "text_encoder_2", "tokenizer_2"),
        "has no text_encoder_2",
    ),
    Row(
        "missing tensors",
        "refused",
        lambda at: rewritten(at, "text_encoder", without("q_proj")),
        r"lacks '.*q_proj\.bias' and 1 more of the text_encoder",
    ),
    Row(
        "tensors of another shape",
        "refused",
        lambda at: rewritten(at, "vae", reshaped("decoder.conv_in.weight")),
        r"has another shape .*decoder\.conv_in\.weight",
    ),
    Row(
        "a single file that lacks a tensor",
        "refused",
        lambda at: single(at, without("attn1.to_q")),
        r"lacks '.*attn1\.to_q\.weight' and 3 more of the unet",
    ),
    Row(
        "a single file whose text encoder lacks a tensor",
        "refused",
        lambda at: single(at, without("layers.0.mlp.fc1.bias")),
        r"lacks '.*mlp\.fc1\.bias' of the text_encoder",
    ),
    Row(
        "a single file whose text encoder has another shape",
        "refused",
        lambda at: single(at, reshaped("mlp.fc1.bias")),
        r"mlp\.fc1\.bias is \[4\] in the file and \[32\] in the configuration",
    ),
    Row(
        "a single file with a text encoder under names that diffusers does not read",
        "refused",
        lambda at: single(at, lambda w: {name.replace("cond_stage_model.transformer.", "te."): w[name] for name in w}),
        r"holds a text_encoder \(CLIPTextModel\) under names that diffusers does not read",
    ),
    Row(
        "a single file beside a configuration whose parts lack a tensor",
        "refused",
        incomplete_configuration,
        r"lacks '.*q_proj\.bias' and 1 more of the text_encoder",
    ),
    Row("an adapter in place of a model", "refused", lora_as_model, "holds no weights of the unet"),
    Row(
        "shards that an index lists and that are not there",
        "refused",
        shard_absent,
        r"lists the shard 'diffusion_pytorch_model.*', which is not there",
    ),
    Row(
        "weight files with a suffix alone",
        "refused without `variant`",
        lambda at: {"model": model(at, variant="fp16")},
        "give variant = fp16",
    ),
    Row(
        "a suffix that no file has",
        "refused",
        lambda at: {"model": model(at), "variant": "fp16"},
        "no part of .* has weights with the suffix 'fp16'",
    ),
    Row(
        "quantised repositories (bitsandbytes)",
        "refused",
        lambda at: changed(at, "unet/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "unet is quantised \\('bitsandbytes'\\)",
    ),
    Row(
        "quantised files with scales (fp8, nf4)",
        "refused",
        lambda at: single(at, lambda w: w | {"scaled_fp8": torch.zeros(2)}),
        "holds quantised weights \\('scaled_fp8'",
    ),
    Row(
        "weights that are whole numbers",
        "refused",
        lambda at: rewritten(at, "vae", lambda w: w | {"decoder.conv_in.bias": w["decoder.conv_in.bias"].int()}),
        "holds quantised weights \\('decoder.conv_in.bias', I32\\)",
    ),
    Row(
        "a file that says v-prediction beside a scheduler that says epsilon",
        "refused",
        lambda at: single(at, lambda w: w | {"v_pred": torch.zeros(1)}),
        r"predicts v_prediction \(tensor 'v_pred'\), but the scheduler",
    ),
    Row(
        "a file that says zero terminal SNR beside a scheduler that does not",
        "refused",
        lambda at: single(at, dict, **{"modelspec.zero_terminal_snr": "true"}),
        "zero terminal SNR",
    ),
    Row(
        "a file on EDM's noise levels",
        "refused",
        lambda at: single(at, lambda w: w | {"edm_mean": torch.zeros(1)}),
        "EDM's noise levels",
    ),
    Row(
        "a decoder that draws noise (`ConsistencyDecoderVAE`)",
        "refused",
        lambda at: with_parts(at, stable_diffusion(), vae=consistency_decoder()),
        "draws noise of its own",
    ),
    Row(
        "weights that are NaN",
        "refused",
        not_a_number,
        r"the unet's prediction at step 1 of 1 in float32 holds NaN",
        only_loading=True,
    ),
    Row(
        "values beyond float16",
        "refused in float16",
        lambda at: scaled(at, 3e4, "float16"),
        "the vae's image at decoding in float16 holds NaN or infinity",
        only_loading=True,
    ),
)


def table() -> str:
    """The rows as the page shows them."""
    rows = [f"| {row.what} | {row.outcome} |" for row in ROWS]
    return "\n".join(["| input | etude |", "| --- | --- |", *rows]) + "\n"


if __name__ == "__main__":
    print(table(), end="")

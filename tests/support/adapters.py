"""Adapter files as several programs write them, and the rows on adapters of the page on what etude reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from etude.policies.adapter_file import METADATA, WEIGHTS
from support.tiny import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

Tensors = dict[str, Tensor]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "v_proj", "out_proj", "fc1")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def write(place: Path, tensors: Mapping[str, Tensor], configuration: Mapping[str, Any] | None = None) -> Path:
    """A directory with an adapter of these tensors."""
    place.mkdir(parents=True, exist_ok=True)
    metadata = None if configuration is None else {METADATA: json.dumps(configuration)}
    own = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(own, place / WEIGHTS, metadata)
    return place


def layers(network: nn.Module, ends: Sequence[str]) -> dict[str, nn.Linear]:
    return {n: m for n, m in network.named_modules() if n.endswith(tuple(ends)) and isinstance(m, nn.Linear)}


def factors(layer: nn.Linear, rank: int, number: int) -> tuple[Tensor, Tensor]:
    return rand(rank, layer.in_features, seed=number), rand(layer.out_features, rank, seed=number + 100)


def kohya(
    network: nn.Module,
    prefix: str,
    ends: Sequence[str] = ATTENTION,
    ranks: Sequence[int] = (4,),
    alphas: Sequence[float | None] = (2.0,),
) -> Tensors:
    """kohya's names; ranks and alphas in turn."""
    tensors: Tensors = {}
    for number, (name, layer) in enumerate(layers(network, ends).items()):
        key = f"{prefix}_{name.removeprefix('text_model.').replace('.', '_')}"
        rank, alpha = ranks[number % len(ranks)], alphas[number % len(alphas)]
        down, up = factors(layer, rank, number)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors |= {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def kohya_text(encoder: nn.Module, prefix: str = "lora_te", **options: Any) -> Tensors:
    return kohya(encoder, f"{prefix}_text_model", TEXT, **options)


def peft(
    network: nn.Module, part: str, ends: Sequence[str] = ATTENTION, **options: Any
) -> tuple[Tensors, dict[str, Any]]:
    """peft's names under a part's, and peft's configuration; every weight is drawn at random."""
    network.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=list(ends), **options), adapter_name="default")
    state = get_peft_model_state_dict(network, adapter_name="default")
    tensors = {f"{part}.{name}": value.clone() for name, value in state.items()}
    for number, (name, value) in enumerate(sorted(tensors.items())):
        if "magnitude" not in name:
            tensors[name] = rand(*value.shape, seed=number)
        else:
            tensors[name] = value + rand(*value.shape, seed=number).abs()
    config = network.peft_config["default"].to_dict()
    return tensors, {f"{part}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def old_diffusers(unet: nn.Module, encoder: nn.Module) -> Tensors:
    """diffusers' names of 2023: attention processors, and `lora_linear_layer` on the text encoder."""
    tensors: Tensors = {}
    for number, (name, layer) in enumerate(layers(unet, ATTENTION).items()):
        block, _, end = name.rpartition(".to_")
        key = f"unet.{block}.processor.to_{end.removesuffix('.0')}_lora"
        tensors[f"{key}.down.weight"], tensors[f"{key}.up.weight"] = factors(layer, 4, number)
    for number, (name, layer) in enumerate(layers(encoder, ("q_proj", "k_proj", "v_proj", "out_proj")).items()):
        key = f"text_encoder.text_model.{name}.lora_linear_layer"
        tensors[f"{key}.down.weight"], tensors[f"{key}.up.weight"] = factors(layer, 4, number)
    return tensors


def xlabs(transformer: nn.Module) -> Tensors:
    """XLabs' names of FLUX: fused queries, keys and values of the double blocks."""
    width, tensors = transformer.inner_dim, Tensors()
    for number, (kind, outputs) in enumerate(
        {"qkv_lora1": 3, "qkv_lora2": 3, "proj_lora1": 1, "proj_lora2": 1}.items()
    ):
        key = f"double_blocks.0.processor.{kind}"
        tensors[f"{key}.down.weight"] = rand(4, width, seed=number)
        tensors[f"{key}.up.weight"] = rand(outputs * width, 4, seed=number)
    return tensors


def dropped(tensors: Tensors, end: str) -> Tensors:
    """The tensors without the last one of that end."""
    last = [name for name in tensors if name.endswith(end)][-1]
    return {name: value for name, value in tensors.items() if name != last}


@dataclass(frozen=True)
class AdapterRow:
    """A kind of adapter file.

    Attributes:
        what: the input, as the page names it.
        outcome: what etude does with it, as the page says.
        pipeline: makes the model.
        make: writes an example for a pipeline into a directory, and returns what `lora` is given.
        says: expression that the one sentence of the refusal matches; None for what is read.
        as_plain: whether the plain pipeline does the same with the file.
    """

    what: str
    outcome: str
    pipeline: Callable[[], Any]
    make: Callable[[Any, Path], Path]
    says: str | None = None
    as_plain: bool = True


def _with_text(
    pipe: Any, *parts: str, configured: bool = False, **options: Any
) -> tuple[Tensors, dict[str, Any] | None]:
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    tensors, configuration = peft(getattr(pipe, denoiser), denoiser, **options)
    for part in parts:
        more, its = peft(getattr(pipe, part), part, TEXT)
        tensors, configuration = tensors | more, configuration | its
    return tensors, configuration if configured else None


def _refused(
    what: str, outcome: str, change: Callable[[Any], Mapping[str, Tensor]], says: str, pipe: Any = None
) -> AdapterRow:
    return AdapterRow(what, outcome, pipe or stable_diffusion, lambda p, place: write(place, change(p)), says)


def _dora_scale(pipe: Any) -> Tensors:
    tensors = kohya(pipe.unet, "lora_unet")
    return tensors | {
        name.replace("lora_up.weight", "dora_scale"): torch.ones(len(value), 1)
        for name, value in tensors.items()
        if "lora_up" in name
    }


def _renamed(pipe: Any, old: str, new: str) -> Tensors:
    return {name.replace(old, new): value for name, value in _with_text(pipe)[0].items()}


def _with_alphas(tensors: Tensors) -> Tensors:
    layers = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    return tensors | {f"{layer}.alpha": torch.tensor(1.0 + number % 3) for number, layer in enumerate(layers)}


def _one_file(pipe: Any, place: Path) -> Path:
    return (write(place, _with_text(pipe)[0]) / WEIGHTS).rename(place / "style.sft")


ROWS = [
    AdapterRow(
        "peft's names, SD with its text encoder",
        "read; the base model is without all of it",
        stable_diffusion,
        lambda p, place: write(place, *_with_text(p, "text_encoder", configured=True)),
    ),
    AdapterRow(
        "peft's names, SDXL with its text encoders",
        "read; the base model is without all of it",
        stable_diffusion_xl,
        lambda p, place: write(place, _with_text(p, "text_encoder", "text_encoder_2")[0]),
    ),
    AdapterRow(
        "peft's names, SD3 with its CLIP encoders",
        "read; the base model is without all of it",
        stable_diffusion_3,
        lambda p, place: write(place, _with_text(p, "text_encoder", "text_encoder_2")[0]),
    ),
    AdapterRow(
        "peft's names, FLUX with CLIP",
        "read; the base model is without all of it",
        flux,
        lambda p, place: write(place, *_with_text(p, "text_encoder", configured=True)),
    ),
    AdapterRow(
        "text encoders alone",
        "read; the base model is without all of it",
        stable_diffusion,
        lambda p, place: write(place, peft(p.text_encoder, "text_encoder", TEXT)[0]),
    ),
    AdapterRow(
        "DoRA in peft's names",
        "read",
        stable_diffusion,
        lambda p, place: write(place, *_with_text(p, "text_encoder", use_dora=True)),
    ),
    AdapterRow(
        "DoRA in peft's names, with its configuration",
        "read",
        flux,
        lambda p, place: write(place, *_with_text(p, configured=True, use_dora=True)),
    ),
    AdapterRow(
        "biases (`lora_B.bias`)",
        "read",
        stable_diffusion,
        lambda p, place: write(place, *_with_text(p, lora_bias=True)),
    ),
    AdapterRow(
        "kohya's names, SD with its text encoder",
        "read",
        stable_diffusion,
        lambda p, place: write(place, kohya(p.unet, "lora_unet") | kohya_text(p.text_encoder)),
    ),
    AdapterRow(
        "kohya's names, SDXL with its text encoders",
        "read",
        stable_diffusion_xl,
        lambda p, place: write(
            place,
            kohya(p.unet, "lora_unet")
            | kohya_text(p.text_encoder, "lora_te1")
            | kohya_text(p.text_encoder_2, "lora_te2"),
        ),
    ),
    AdapterRow(
        "kohya's names with ranks and alphas that differ by layer",
        "read, each layer at its own strength",
        stable_diffusion,
        lambda p, place: write(
            place,
            kohya(p.unet, "lora_unet", ranks=(4, 2), alphas=(2.0, 1.0, None))
            | kohya_text(p.text_encoder, alphas=(2.0, 6.0)),
        ),
        as_plain=False,
    ),
    AdapterRow(
        "peft's names with alphas as tensors, SD",
        "read, each layer at its own strength",
        stable_diffusion,
        lambda p, place: write(place, _with_alphas(_with_text(p, "text_encoder")[0])),
        as_plain=False,
    ),
    AdapterRow(
        "peft's names with alphas as tensors, FLUX",
        "read, each layer at its own strength",
        flux,
        lambda p, place: write(place, _with_alphas(_with_text(p)[0])),
        as_plain=False,
    ),
    AdapterRow(
        "diffusers' older names (attention processors)",
        "read",
        stable_diffusion,
        lambda p, place: write(place, old_diffusers(p.unet, p.text_encoder)),
    ),
    AdapterRow("XLabs' names of FLUX", "read", flux, lambda p, place: write(place, xlabs(p.transformer))),
    AdapterRow("one file, `.safetensors` or `.sft`", "read", stable_diffusion, _one_file),
    _refused(
        "DoRA in kohya's names (`dora_scale`)",
        "refused: diffusers drops the magnitudes",
        _dora_scale,
        r"would leave out '.*dora_scale' and \d+ more: it reads DoRA in peft's names only",
    ),
    _refused(
        "tensors of another kind beside a LoRA (`diff`, `diff_b`)",
        "refused, unless they are zero",
        lambda p: kohya(p.unet, "lora_unet") | {"lora_unet_conv_in.diff": torch.ones(16, 4, 3, 3)},
        "lora_unet_conv_in.diff",
    ),
    _refused(
        "layers that the model lacks",
        "refused",
        lambda p: (
            kohya(p.unet, "lora_unet") | kohya(nn.ModuleDict({"to_q": nn.Linear(4, 4)}), "lora_unet_down_blocks_9")
        ),
        "has no place for 'lora_unet_down_blocks_9_to_q.lora_down.weight'",
    ),
    _refused(
        "layers that a text encoder lacks",
        "refused",
        lambda p: kohya_text(p.text_encoder, "lora_te_text_model"),
        "has no place for 'lora_te_text_model_text_model_encoder_layers_0_mlp_fc1.lora_down.weight'",
    ),
    _refused(
        "a text encoder that the model lacks",
        "refused",
        lambda p: _with_text(p)[0] | {f"text_encoder_2.x.lora_{f}.weight": torch.ones(4, 4) for f in "AB"},
        "no part of the pipeline .* takes 'text_encoder_2.x.lora_A.weight'",
    ),
    _refused(
        "half a product",
        "refused",
        lambda p: dropped(kohya(p.unet, "lora_unet"), "lora_up.weight"),
        "without the other factor",
    ),
    _refused(
        "an adapter of another family",
        "refused",
        lambda p: _renamed(p, "unet.", "transformer."),
        "of another kind of model, or in names",
    ),
    _refused(
        "names of `save_pretrained` of peft (`base_model.model.`), or without `unet.`",
        "refused",
        lambda p: _renamed(p, "unet.", "base_model.model."),
        r"no part of the pipeline \(text_encoder\., unet\.\) takes 'base_model\.model\.",
    ),
    _refused(
        "LoHa, LoKr, IA3 and other kinds of adapters",
        "refused",
        lambda p: {f"unet.mid_block.attentions.0.proj_in.{n}": torch.ones(4, 4) for n in ("lokr_w1", "lokr_w2")},
        "only LoRAs are read, and 'unet.mid_block.attentions.0.proj_in.lokr_w1' and 1 more is of no LoRA",
    ),
]
"""What etude does with an adapter. The tests run every row."""


def table() -> str:
    """The rows as a page shows them."""
    rows = [f"| {row.what} | {row.outcome} |" for row in ROWS]
    return "\n".join(["| input | etude |", "| --- | --- |", *rows]) + "\n"

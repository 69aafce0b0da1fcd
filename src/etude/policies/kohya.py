"""A LoRA in the names of kohya's tools, which ComfyUI reads too: `lora_down`, `lora_up` and `alpha` of each layer.

Those programs take a layer's strength, alpha / rank, from its `.alpha` tensor, and read no
configuration of peft. They name layers as the published single files do, where queries, keys and
values of a transformer are one layer: the LoRAs of its parts become one of the summed rank, whose
`lora_up` is block-diagonal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from etude.policies.adapter_loading import adapted_parts

KOHYA_WEIGHTS = "lora_kohya.safetensors"
"""File beside diffusers' own in an exported adapter."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
_FLUX = {
    "double_blocks.#.img_attn.qkv": ("transformer_blocks.#.attn.", "to_q", "to_k", "to_v"),
    "double_blocks.#.txt_attn.qkv": ("transformer_blocks.#.attn.", "add_q_proj", "add_k_proj", "add_v_proj"),
    "double_blocks.#.img_attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.txt_attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "double_blocks.#.img_mlp.0": ("transformer_blocks.#.ff.net.0.proj",),
    "double_blocks.#.img_mlp.2": ("transformer_blocks.#.ff.net.2",),
    "double_blocks.#.txt_mlp.0": ("transformer_blocks.#.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.2": ("transformer_blocks.#.ff_context.net.2",),
    "double_blocks.#.img_mod.lin": ("transformer_blocks.#.norm1.linear",),
    "double_blocks.#.txt_mod.lin": ("transformer_blocks.#.norm1_context.linear",),
    "single_blocks.#.linear1": ("single_transformer_blocks.#.", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.proj_out",),
    "single_blocks.#.modulation.lin": ("single_transformer_blocks.#.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_SD3 = {
    "joint_blocks.#.x_block.attn.qkv": ("transformer_blocks.#.attn.", "to_q", "to_k", "to_v"),
    "joint_blocks.#.x_block.attn2.qkv": ("transformer_blocks.#.attn2.", "to_q", "to_k", "to_v"),
    "joint_blocks.#.context_block.attn.qkv": ("transformer_blocks.#.attn.", "add_q_proj", "add_k_proj", "add_v_proj"),
    "joint_blocks.#.x_block.attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "joint_blocks.#.x_block.attn2.proj": ("transformer_blocks.#.attn2.to_out.0",),
    "joint_blocks.#.context_block.attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "joint_blocks.#.x_block.mlp.fc1": ("transformer_blocks.#.ff.net.0.proj",),
    "joint_blocks.#.x_block.mlp.fc2": ("transformer_blocks.#.ff.net.2",),
    "joint_blocks.#.context_block.mlp.fc1": ("transformer_blocks.#.ff_context.net.0.proj",),
    "joint_blocks.#.context_block.mlp.fc2": ("transformer_blocks.#.ff_context.net.2",),
    "joint_blocks.#.x_block.adaLN_modulation.1": ("transformer_blocks.#.norm1.linear",),
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
"""Layers of the published files, and the layers of diffusers that each consists of, in order: their
common beginning, and the ends. `#` is the number of the block."""


def kohya_tensors(pipeline: Any, name: str) -> dict[str, Tensor] | None:
    """The adapter of a pipeline under kohya's names, or None where these have no place for it.

    There is none for DoRA, for biases, for pipelines other than Stable Diffusion, SDXL, SD3 and
    FLUX, and for the few layers that published files hold in another order (`norm_out`).
    """
    tensors: dict[str, Tensor] = {}
    several = hasattr(pipeline, "text_encoder_2")
    for part, network in adapted_parts(pipeline, name).items():
        layers = _factors(network, name)
        if part.startswith("text_encoder"):
            number = (part.removeprefix("text_encoder_") if part != "text_encoder" else "1") if several else ""
            prefix = f"lora_te{number}_"
            named = layers and {f"text_model.{n.removeprefix('text_model.')}": value for n, value in layers.items()}
        else:
            prefix, named = "lora_unet_", layers and _published(network, layers, several)
        if named is None:
            return None
        for layer, (down, up, strength) in named.items():
            key = prefix + layer.replace(".", "_")
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(strength * down.shape[0])
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


Factors = tuple[Tensor, Tensor, float]
"""Factors A and B of a layer's product, and its strength."""


def _factors(network: nn.Module, name: str) -> dict[str, Factors] | None:
    """The factors of each layer; None where the adapter consists of more than two factors a layer."""
    state = get_peft_model_state_dict(network, adapter_name=name)
    if not all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state):
        return None
    layers, modules = {}, dict(network.named_modules())
    for key in state:
        layer, _, end = key.rpartition(".lora_A.weight")
        if layer and not end:
            module = modules[layer]
            assert isinstance(module, BaseTunerLayer)
            layers[layer] = (state[key], state[f"{layer}.lora_B.weight"], float(module.scaling[name]))
    return layers


def _published(network: nn.Module, layers: Mapping[str, Factors], is_xl: bool) -> dict[str, Factors] | None:
    """Layers of a denoiser under the names of the published files."""
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        names = {layer: _unet_name(layer, network) if is_xl else layer for layer in layers}
        return None if None in names.values() else {str(names[layer]): layers[layer] for layer in layers}
    table = {"FluxTransformer2DModel": _FLUX, "SD3Transformer2DModel": _SD3}.get(kind)
    return None if table is None else _fused(network, layers, table)


def _unet_name(layer: str, network: nn.Module) -> str | None:
    """A layer of SDXL's UNet under Stability's name."""
    per_block = network.config.layers_per_block  # type: ignore[union-attr]
    if layer in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[layer]
    match = re.fullmatch(
        r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnet|attention|downsampler|upsampler)s\.(\d+)\.(.+)", layer
    )
    if match is None or not isinstance(per_block, int):
        return None
    side, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnet":
        rest = _RESNET[rest]
    attention = int(kind == "attention")
    each = per_block + 1
    if side == "mid":
        return f"middle_block.{1 if attention else 2 * number}.{rest}"
    if kind == "downsampler":
        return f"input_blocks.{(block + 1) * each}.0.op"
    if kind == "upsampler":
        attends = hasattr(network.up_blocks[block], "attentions")  # type: ignore[index]
        return f"output_blocks.{(block + 1) * each - 1}.{2 if attends else 1}.conv"
    place = f"input_blocks.{1 + block * each + number}" if side == "down" else f"output_blocks.{block * each + number}"
    return f"{place}.{attention}.{rest}"


def _fused(
    network: nn.Module, layers: Mapping[str, Factors], table: Mapping[str, tuple[str, ...]]
) -> dict[str, Factors] | None:
    """Layers under the names of a table, several as one where the table does so."""
    blocks = {match[0] for layer in layers for match in re.finditer(r"(?<=blocks\.)\d+(?=\.)", layer)}
    published: dict[str, Factors] = {}
    taken = 0
    for name, (begin, *ends) in table.items():
        for block in sorted(blocks, key=int) if "#" in name else [""]:
            members = [(begin + end).replace("#", block) for end in ends or [""]]
            own = [member for member in members if member in layers]
            if own:
                taken += len(own)
                published[name.replace("#", block)] = (
                    layers[own[0]] if len(members) == 1 else _block_diagonal(network, layers, members)
                )
    return published if taken == len(layers) else None


def _block_diagonal(network: nn.Module, layers: Mapping[str, Factors], members: list[str]) -> Factors:
    """One product for several layers that read the same input, whose outputs follow one another."""
    own = [layers[member] for member in members if member in layers]
    strengths = {strength for _, _, strength in own}
    common = strengths.pop() if len(strengths) == 1 else None  # otherwise each is in its own block
    down = torch.cat([a for a, _, _ in own])
    rows: list[Tensor] = []
    column = 0
    for member in members:
        module: Any = network.get_submodule(member)
        row = down.new_zeros(module.out_features, len(down))
        if member in layers:
            a, b, strength = layers[member]
            row[:, column : column + len(a)] = b if common is not None else b * strength
            column += len(a)
        rows.append(row)
    return down, torch.cat(rows), 1.0 if common is None else common

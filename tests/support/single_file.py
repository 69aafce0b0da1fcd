"""Writes a tiny Stable Diffusion or SDXL pipeline as the one file that its authors publish: CompVis' and Stability's names of weights.

The inverse of what `from_single_file` does, written from the layout of the files, for one resnet a block.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
AUTOENCODER = [
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
]
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}

Weights = dict[str, torch.Tensor]


def write_single_file(pipeline: Any, file: Path) -> Path:
    """The weights of denoiser, autoencoder and text encoders in one file."""
    weights = prefixed("model.diffusion_model.", unet(pipeline.unet))
    weights |= prefixed("first_stage_model.", autoencoder(pipeline.vae))
    if hasattr(pipeline, "text_encoder_2"):
        weights |= prefixed("conditioner.embedders.0.transformer.", clip(pipeline.text_encoder))
        weights |= prefixed("conditioner.embedders.1.model.", open_clip(pipeline.text_encoder_2))
    else:
        weights |= prefixed("cond_stage_model.transformer.", clip(pipeline.text_encoder))
    save_file({name: value.detach().clone().contiguous() for name, value in weights.items()}, file)
    return file


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def unet(network: Any) -> Weights:
    each = network.config.layers_per_block + 1
    return {_unet_name(name, each): value for name, value in network.state_dict().items()}


def _unet_name(name: str, each: int) -> str:
    module, _, leaf = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{leaf}"
    side, *numbers, rest = re.match(
        r"(down_blocks|mid_block|up_blocks)\.?(\d*)\.(?:resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    ).groups()
    block, layer = int(numbers[0] or 0), int(numbers[1])
    attention = ".attentions." in name
    if not attention:
        for ours, theirs in RESNET.items():
            rest = re.sub(rf"^{ours}\b", theirs, rest)
    if side == "mid_block":
        return f"middle_block.{1 if attention else 2 * layer}.{rest}"
    if "downsamplers" in name:
        return f"input_blocks.{(block + 1) * each}.0.{rest.replace('conv', 'op')}"
    if "upsamplers" in name:
        return f"output_blocks.{(block + 1) * each - 1}.{2 if block == 0 else 1}.{rest}"
    place = (
        f"input_blocks.{1 + block * each + layer}" if side == "down_blocks" else f"output_blocks.{block * each + layer}"
    )
    return f"{place}.{int(attention)}.{rest}"


def autoencoder(vae: Any) -> Weights:
    last = len(vae.config.block_out_channels) - 1
    weights = {}
    for name, value in vae.state_dict().items():
        theirs = name
        for pattern, replacement in AUTOENCODER:
            theirs = re.sub(pattern, replacement, theirs)
        theirs = re.sub(r"\bup\.(\d+)", lambda found: f"up.{last - int(found[1])}", theirs)
        is_convolution = ".attn_1." in theirs and value.ndim == 2
        weights[theirs] = value[:, :, None, None] if is_convolution else value
    return weights


def clip(encoder: Any) -> Weights:
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in encoder.state_dict().items()}


def open_clip(encoder: Any) -> Weights:
    weights, attention = {}, {}
    for name, value in encoder.state_dict().items():
        theirs = name.removeprefix("text_model.")
        for ours, other in OPEN_CLIP.items():
            theirs = theirs.replace(ours, other)
        found = re.match(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", theirs)
        if found:
            attention.setdefault(f"{found[1]}.in_proj_{found[3]}", {})[found[2]] = value
        elif theirs == "text_projection.weight":
            weights["text_projection"] = value.T
        else:
            weights[theirs] = value
    return weights | {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in attention.items()}

"""The published architectures at their real sizes, without published weights.

Each part has the configuration of its published model, or with `tiny` a very small one. The tokenizers spell letter by letter, so
that nothing is downloaded; prompts are padded to the published lengths all the same. `save_outline`
writes directories whose weight files have headers and holes, for dry runs; `random_pipeline` draws
weights on the device itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from benchmarks.flow_models import autoencoder, flux2_klein, qwen_image, sana, scheduler, z_image
from etude.policies.weight_files import STEMS

SCALE = 0.02
"""Standard deviation of a random matrix's entries, as transformers draws them."""
ALIGNED = 8
SHARD = 5 * 10**9
"""Largest size of a weight file in bytes, that of diffusers' and transformers' own shards."""


def _clip_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(code) for code in range(33, 127))]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=512)


def _clip(tiny: bool, large: bool = False, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """CLIP ViT-L/14's text encoder, or OpenCLIP ViT-bigG/14's."""
    width, layers, heads = (
        (24, 2, 2) if tiny and large else (16, 2, 2) if tiny else (1280, 32, 20) if large else (768, 12, 12)
    )
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act="gelu" if large else "quick_gelu",
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def _t5(tiny: bool) -> T5EncoderModel:
    """The encoder of T5 v1.1 XXL."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64}
    if tiny:
        sizes = {"d_model": 40, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _stable_diffusion(tiny: bool) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=autoencoder(tiny, 4, 512, 0.18215),
        unet=UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=16 if tiny else 768,
            attention_head_dim=8,
            **({"block_out_channels": (16,) * 4, "layers_per_block": 1, "norm_num_groups": 8} if tiny else {}),
        ),
        text_encoder=_clip(tiny),
        tokenizer=_clip_tokenizer(),
        scheduler=scheduler(DDIMScheduler, **_BETAS, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(tiny: bool) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(16, 16, 16) if tiny else (320, 640, 1280),
        norm_num_groups=8 if tiny else 32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1 if tiny else (1, 2, 10),
        attention_head_dim=2 if tiny else (5, 10, 20),
        cross_attention_dim=40 if tiny else 2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + (24 if tiny else 1280),
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(tiny, 4, 1024, 0.13025),
        unet=unet,
        text_encoder=_clip(tiny),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(tiny, large=True, projected=True),
        tokenizer_2=_clip_tokenizer(),
        scheduler=scheduler(EulerDiscreteScheduler, **_BETAS, timestep_spacing="leading"),
        add_watermarker=False,
    )


def _stable_diffusion_3_5_medium(tiny: bool) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=2 if tiny else 24,
        attention_head_dim=16 if tiny else 64,
        num_attention_heads=2 if tiny else 24,
        caption_projection_dim=32 if tiny else 1536,
        joint_attention_dim=40 if tiny else 4096,
        pooled_projection_dim=40 if tiny else 2048,
        pos_embed_max_size=384,
        dual_attention_layers=(0,) if tiny else tuple(range(13)),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        scheduler=scheduler(FlowMatchEulerDiscreteScheduler, shift=3.0),
        vae=autoencoder(tiny, 16, 1024, 1.5305, 0.0609),
        text_encoder=_clip(tiny, projected=True),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(tiny, large=True, projected=True),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(tiny),
        tokenizer_3=_t5_tokenizer(),
        transformer=transformer,
    )


_TINY_FLUX: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


def _flux(tiny: bool) -> FluxPipeline:
    return FluxPipeline(
        scheduler=scheduler(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True, shift=3.0),
        vae=autoencoder(tiny, 16, 1024, 0.3611, 0.1159),
        text_encoder=_clip(tiny),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(tiny),
        tokenizer_2=_t5_tokenizer(),
        transformer=FluxTransformer2DModel(guidance_embeds=True, **(_TINY_FLUX if tiny else {})),
    )


MODELS: dict[str, Callable[[bool], DiffusionPipeline]] = {
    "sd15": _stable_diffusion,
    "sdxl": _stable_diffusion_xl,
    "sd35": _stable_diffusion_3_5_medium,
    "flux": _flux,
    "flux2-klein": flux2_klein,
    "z-image": z_image,
    "qwen-image": qwen_image,
    "sana": sana,
}
"""A pipeline of each architecture, by the first word of its recipes. Call it in a context that says where weights go."""


def networks(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a pipeline that have weights."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            yield name, part


def save_outline(name: str, directory: Path, tiny: bool = False) -> Path:
    """Writes a model as a directory whose weight files are headers in front of holes, of no size on disk."""
    with torch.device("meta"):
        pipeline = MODELS[name](tiny)
    index: dict[str, Any] = {"_class_name": type(pipeline).__name__}
    parts: dict[str, Any] = pipeline.components
    for part, component in parts.items():
        library = type(component).__module__.partition(".")[0]
        index[part] = [None, None] if component is None else [library, type(component).__name__]
        has_weights = isinstance(component, nn.Module)
        if has_weights:
            save = component.config.save_pretrained if library == "transformers" else component.save_config
            save(directory / part)
            _save_shards(component, directory / part, STEMS[library])
        elif component is not None:
            component.save_pretrained(directory / part)
    (directory / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def _save_shards(network: nn.Module, folder: Path, stem: str) -> None:
    """Writes files of at most `SHARD` bytes, with an index where there is more than one, as published."""
    tensors: dict[str, Tensor] = dict(network.named_parameters())  # tied ones once
    stored = network.state_dict()
    tensors |= {name: buffer for name, buffer in network.named_buffers() if name in stored}
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if sum(map(_stored_bytes, shards[-1].values())) + _stored_bytes(tensor) > SHARD:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        return _save_header(shards[0], folder / f"{stem}.safetensors")
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    places: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        _save_header(shard, folder / name)
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(map(_stored_bytes, tensors.values()))}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in a file, floats in bfloat16."""
    return tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size())


def _save_header(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a safetensors file with names and shapes, and a hole where the numbers would be."""
    places: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        size = _stored_bytes(tensor)
        kind = "BF16" if tensor.is_floating_point() else f"I{8 * tensor.element_size()}"
        places[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **places}).encode()
    header += b" " * (-len(header) % ALIGNED)
    with file.open("wb") as out:
        out.write(len(header).to_bytes(ALIGNED, "little") + header)
        out.truncate(ALIGNED + len(header) + end)


def random_pipeline(
    name: str, device: torch.device | str, dtype: torch.dtype, tiny: bool = False, seed: int = 0
) -> Any:
    """A pipeline with random weights, drawn on the device: matrices small, scales 1, biases 0; buffers as published."""
    with init_empty_weights(include_buffers=False):  # tables have numbers, weights have none
        pipeline = MODELS[name](tiny)
    generator = torch.Generator(device).manual_seed(seed)
    for _, network in networks(pipeline):
        drawn: dict[int, nn.Parameter] = {}
        for module in network.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:  # tied ones stay tied
                    tensor = drawn.get(id(parameter))
                    if tensor is None:
                        tensor = nn.Parameter(_drawn(key, parameter.shape, generator, dtype), requires_grad=False)
                        drawn[id(parameter)] = tensor
                    module._parameters[key] = tensor
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    kind = dtype if buffer.is_floating_point() else buffer.dtype
                    module._buffers[key] = buffer.to(device, kind)
    return pipeline


def _drawn(name: str, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """The numbers of a parameter."""
    device = generator.device
    if len(shape) < 2:
        return torch.full(shape, float("weight" in name), device=device, dtype=dtype)
    return torch.empty(shape, device=device, dtype=dtype).normal_(0, SCALE, generator=generator)

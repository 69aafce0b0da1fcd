"""The pipeline and the reward that both sides of a comparison share.

The module imports neither etude nor TRL, so that both environments can use it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOKENS = 77
WIDTH = 32


def brightness(images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
    """Mean pixel value, a reward without cost: float32 `[n]` from images `[n, 3, h, w]`."""
    return images.float().flatten(1).mean(dim=1)


def save_pipeline(
    directory: Path, channels: tuple[int, ...], latent_size: int, seed: int = 0, vae_channels: tuple[int, ...] = ()
) -> Path:
    """Saves a random StableDiffusionPipeline with the scheduler of Stable Diffusion 1.5, as safetensors.

    Args:
        channels: channels of the UNet's levels; the last level has attention.
        latent_size: height and width of the 4-channel latents; images are twice as large.
        vae_channels: channels of the autoencoder's two levels. Default: the UNet's first two.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    groups, plain, vae_channels = channels[0] // 2, len(channels) - 1, vae_channels or channels[:2]
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=vae_channels,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=vae_channels[0] // 2,
            mid_block_add_attention=False,
        ),
        unet=UNet2DConditionModel(
            sample_size=latent_size,
            block_out_channels=channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
            cross_attention_dim=WIDTH,
            norm_num_groups=groups,
        ),
        **_text(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)
    _let_transformers_4_read(directory, pipeline.tokenizer.get_vocab())
    return directory


def save_full_size(directory: Path, name: str, tiny: bool) -> Path:
    """Saves a pipeline of `full_size.MODELS` with random weights in bfloat16, so that transformers 4 reads it, too."""
    from benchmarks.full_size import random_pipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = random_pipeline(name, device, torch.bfloat16, tiny)
    if tiny:
        pipeline.unet.register_to_config(sample_size=8)
    pipeline.save_pretrained(directory)
    _let_transformers_4_read(directory, pipeline.tokenizer.get_vocab())
    return directory


def save_flux(directory: Path, heads: int, latent_size: int, seed: int = 0) -> Path:
    """Saves a random FluxPipeline with FLUX.1-dev's shift and guidance embedding, as safetensors.

    Args:
        heads: number of heads, of 32 channels each, in a transformer of 1 double and 3 single
            blocks.
        latent_size: height and width of the autoencoder's 8-channel latents; images are twice as
            large.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=8,
            norm_num_groups=8,
            mid_block_add_attention=False,
            sample_size=2 * latent_size,
            shift_factor=0.0,
            scaling_factor=1.0,
        ),
        **_text(),
        **_second_text(),
        transformer=FluxTransformer2DModel(
            in_channels=32,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=heads,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
    )
    pipeline.save_pretrained(directory)
    return directory


def _second_text() -> dict[str, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    tokenizer = T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=16)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=2 * WIDTH,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return {"tokenizer_2": tokenizer, "text_encoder_2": T5EncoderModel(config)}


def _let_transformers_4_read(directory: Path, vocabulary: dict[str, int]) -> None:
    """Adds tokenizer files and CLIP's weight names for the older library; the newer accepts them."""
    from safetensors.torch import load_file, save_file

    (directory / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    weights = directory / "text_encoder" / "model.safetensors"
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})


def _text() -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=TOKENS)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return {"tokenizer": tokenizer, "text_encoder": encoder}

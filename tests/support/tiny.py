"""Tiny random pipelines of the real classes: what a test needs of Stable Diffusion, SDXL, SD3 and FLUX in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
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
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


def tokenizer() -> CLIPTokenizer:
    """Spells any lower-case ASCII text letter by letter."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=16)


def t5_tokenizer(longest: int = 12) -> T5Tokenizer:
    """Spells any printable ASCII text letter by letter."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(c) for c in range(33, 127))]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=longest)


def text_encoder(
    words: CLIPTokenizer, width: int = 16, with_projection: bool = False, layers: int | None = None
) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers or (2 if with_projection else 1),
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if with_projection else CLIPTextModel(config)


def t5_encoder(words: T5Tokenizer, width: int = 16) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(words),
            d_model=width,
            d_kv=width // 2,
            d_ff=2 * width,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,  # a pipeline made in code is in training mode
            feed_forward_proj="gated-gelu",
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
        )
    )


def autoencoder(**options: Any) -> AutoencoderKL:
    """Images 8 x 8 to latents 4 x 4 x 4."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=8,
        **options,
    )


def stable_diffusion(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """Latents 4 x 4 x 4, images 8 x 8, about 100,000 parameters."""
    torch.manual_seed(seed)
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return StableDiffusionPipeline(
        vae=autoencoder(),
        unet=unet,
        text_encoder=text_encoder(words),
        tokenizer=words,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_stable_diffusion(directory: Path, seed: int = 0) -> Path:
    stable_diffusion(seed).save_pretrained(directory)
    return directory


def stable_diffusion_xl(seed: int = 0, **options: Any) -> StableDiffusionXLPipeline:
    """Latents 4 x 4 x 4, images 8 x 8; two encoders of different widths, and the scheduler of the published model.

    Args:
        options: of the pipeline, `force_zeros_for_empty_prompt`.
    """
    torch.manual_seed(seed)
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=40,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        unet=unet,
        text_encoder=text_encoder(words, layers=2),
        tokenizer=words,
        text_encoder_2=text_encoder(words, width=24, with_projection=True),
        tokenizer_2=words,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
        **options,
    )


def flow_scheduler(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    """A dynamic shift that differs visibly between a few tokens."""
    dynamic = {"use_dynamic_shifting": True, "base_image_seq_len": 2, "max_image_seq_len": 64}
    return FlowMatchEulerDiscreteScheduler(**{**dynamic, **options})


def flux(seed: int = 0, guidance_embeds: bool = True, **scheduler: Any) -> FluxPipeline:
    """Packed latents 4 x 16, images 8 x 8; with a guidance embedding as dev, without as schnell."""
    torch.manual_seed(seed)
    words, words_2 = tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=flow_scheduler(**scheduler),
        vae=autoencoder(shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=text_encoder(words),
        tokenizer=words,
        text_encoder_2=t5_encoder(words_2),
        tokenizer_2=words_2,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def stable_diffusion_3(seed: int = 0, with_t5: bool = True, **scheduler: Any) -> StableDiffusion3Pipeline:
    """Latents 4 x 4 x 4, images 8 x 8, a static shift of 3 unless told otherwise."""
    torch.manual_seed(seed)
    words, words_3 = tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        scheduler=flow_scheduler(**{"use_dynamic_shifting": False, "shift": 3.0, **scheduler}),
        vae=autoencoder(shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=text_encoder(words, with_projection=True),
        tokenizer=words,
        text_encoder_2=text_encoder(words, with_projection=True),
        tokenizer_2=words,
        text_encoder_3=t5_encoder(words_3, width=32) if with_t5 else None,
        tokenizer_3=words_3 if with_t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        ),
    )


def save_flux(directory: Path, seed: int = 0, guidance_embeds: bool = True) -> Path:
    flux(seed, guidance_embeds).save_pretrained(directory)
    return directory


def save_stable_diffusion_3(directory: Path, seed: int = 0, with_t5: bool = True) -> Path:
    stable_diffusion_3(seed, with_t5).save_pretrained(directory)
    return directory

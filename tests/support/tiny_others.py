"""Tiny random pipelines of flow transformers that no family describes: some follow the conventions, some are refused."""

from __future__ import annotations

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from transformers import GlmConfig, GlmModel

from support.tiny import t5_encoder, t5_tokenizer
from support.tiny_parts import (
    autoencoder,
    chat_tokenizer,
    gemma,
    language,
    moved,
    qwen2_vl,
    qwen3,
    umt5,
)


def aura_flow(seed: int = 0) -> AuraFlowPipeline:
    torch.manual_seed(seed)
    words = t5_tokenizer(256)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=1,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pos_embed_max_size=256,
    )
    return AuraFlowPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=moved(autoencoder()),
        text_encoder=moved(umt5(words)),
        tokenizer=words,
        transformer=moved(transformer),
    )


def bria(seed: int = 0) -> BriaPipeline:
    torch.manual_seed(seed)
    words = t5_tokenizer(512)
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 6, 6],
    )
    return BriaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=moved(autoencoder(4)),
        text_encoder=moved(t5_encoder(words)),
        tokenizer=words,
        transformer=moved(transformer),
    )


def cogview4(seed: int = 0) -> CogView4Pipeline:
    """A pipeline that shows the padding of prompts to its network."""
    torch.manual_seed(seed)
    words = t5_tokenizer(1024)
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(4, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return CogView4Pipeline(
        scheduler=scheduler,
        vae=moved(autoencoder(4)),
        text_encoder=moved(GlmModel(GlmConfig(**language(words, head_dim=8)))),
        tokenizer=words,
        transformer=moved(transformer),
    )


def lumina_next(seed: int = 0) -> LuminaPipeline:
    """A pipeline that pads guidance's empty prompt to the length of the others."""
    torch.manual_seed(seed)
    words = t5_tokenizer(256)
    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=8,
    )
    return LuminaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=moved(autoencoder(4)),
        text_encoder=moved(gemma(words, 2)),
        tokenizer=words,
        transformer=moved(transformer),
    )


def longcat_image(seed: int = 0) -> LongCatImagePipeline:
    """Latents packed in tokens of 64; always 512 tokens of a prompt."""
    torch.manual_seed(seed)
    words = chat_tokenizer()
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 6, 6],
    )
    return LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=moved(autoencoder(channels=16)),
        text_encoder=moved(qwen2_vl(words)),
        tokenizer=words,
        text_processor=None,
        transformer=moved(transformer),
    )


def ovis_image(seed: int = 0) -> OvisImagePipeline:
    torch.manual_seed(seed)
    words = chat_tokenizer()
    transformer = OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=moved(autoencoder()),
        text_encoder=moved(qwen3(words, 1)),
        tokenizer=words,
        transformer=moved(transformer),
    )

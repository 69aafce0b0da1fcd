"""Tiny random pipelines of flow transformers with more or other parts: HiDream, Wan, and classes that no family describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLWan,
    BriaPipeline,
    BriaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    UMT5Config,
    UMT5EncoderModel,
)

from support.tiny import t5_encoder, t5_tokenizer, tokenizer
from support.tiny_flow import autoencoder, chat_tokenizer, gemma, moved, qwen3


def umt5(words: PreTrainedTokenizerBase) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def wan(seed: int = 0) -> WanPipeline:
    """Latents 4 x frames x s/2 x s/2; the published UniPC on flow levels."""
    torch.manual_seed(seed)
    words = t5_tokenizer(512)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.5, -0.3, 0.1, 1.0],
        latents_std=[1.5, 0.7, 2.0, 1.2],
        scale_factor_temporal=4,
        scale_factor_spatial=2,
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=moved(vae),
        text_encoder=moved(umt5(words)),
        tokenizer=words,
        transformer=moved(transformer),
    )


def _long_clip(words: PreTrainedTokenizerBase) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            projection_dim=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )


def hidream(seed: int = 0, side: int = 8) -> HiDreamImagePipeline:
    """Latents 4 x s/2 x s/2, of one area: `side` squared; four text encoders and a mixture of two experts."""
    torch.manual_seed(seed)
    short, sentence, words = tokenizer(), t5_tokenizer(512), chat_tokenizer()
    llama = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=words.pad_token_id,
    )
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(side, side),
        llama_layers=[0, 1],
    )
    pipeline = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=moved(autoencoder()),
        text_encoder=moved(_long_clip(short)),
        tokenizer=short,
        text_encoder_2=moved(_long_clip(short)),
        tokenizer_2=short,
        text_encoder_3=moved(t5_encoder(sentence)),
        tokenizer_3=sentence,
        text_encoder_4=moved(LlamaForCausalLM(llama)),
        tokenizer_4=words,
        transformer=moved(transformer),
    )
    pipeline.default_sample_size = side
    return pipeline


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
    glm = GlmConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        pad_token_id=words.pad_token_id,
    )
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
        text_encoder=moved(GlmModel(glm)),
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


ALSO: dict[str, Callable[..., Any]] = {"hidream": hidream, "wan": wan}
"""Pipelines with a family of their own beside those in `tiny_flow`."""

"""Tiny random pipelines of the flow transformers that have a family: what a test needs of FLUX.2-klein, Z-Image and others in a second.

Every weight is moved by noise, so that no zero-initialised layer hides what a test looks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import LlamaConfig, LlamaForCausalLM

from support.tiny import t5_encoder, t5_tokenizer, tokenizer
from support.tiny_parts import (
    autoencoder,
    chat_tokenizer,
    flux2_autoencoder,
    gemma,
    language,
    long_clip,
    many_layers,
    moved,
    qwen2_vl,
    qwen3,
    qwen3_vl,
    umt5,
    video_autoencoder,
)


def flux2_klein(seed: int = 0, distilled: bool = False) -> Flux2KleinPipeline:
    """Latents 16 x s/4 x s/4, packed inside; statistics of a batch norm in the autoencoder."""
    torch.manual_seed(seed)
    words = chat_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * 8,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=moved(flux2_autoencoder()),
        text_encoder=moved(many_layers(words)),
        tokenizer=words,
        transformer=moved(transformer),
        is_distilled=distilled,
    )


def z_image(seed: int = 0) -> ZImagePipeline:
    """Latents 4 x s/2 x s/2; prompts are lists of unequal length."""
    torch.manual_seed(seed)
    words = chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=moved(autoencoder()),
        text_encoder=moved(qwen3(words, 2)),
        tokenizer=words,
        transformer=moved(transformer),
    )


def qwen_image(seed: int = 0) -> QwenImagePipeline:
    """Latents packed in tokens of 16; an autoencoder of videos with statistics of its latents."""
    torch.manual_seed(seed)
    words = chat_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=2, max_image_seq_len=64, shift_terminal=0.02
        ),
        vae=moved(video_autoencoder()),
        text_encoder=moved(qwen2_vl(words)),
        tokenizer=words,
        transformer=moved(transformer),
    )


def sana(seed: int = 0) -> SanaPipeline:
    """Latents 4 x s/2 x s/2, s a multiple of 32; the published DPM-Solver++ on flow levels."""
    torch.manual_seed(seed)
    words = chat_tokenizer()
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear",
        beta_start=0.0001,
        beta_end=0.02,
        flow_shift=3.0,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
    )
    return SanaPipeline(
        scheduler=scheduler,
        vae=moved(vae),
        text_encoder=moved(gemma(words)),
        tokenizer=words,
        transformer=moved(transformer),
    )


def lumina2(seed: int = 0) -> Lumina2Pipeline:
    """Latents 4 x s/8 x s/8; a transformer that counts time from noise to data."""
    torch.manual_seed(seed)
    words = chat_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64),
        cap_feat_dim=8,
    )
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=moved(autoencoder(4)),
        text_encoder=moved(gemma(words, 2)),
        tokenizer=words,
        transformer=moved(transformer),
    )


def chroma(seed: int = 0) -> ChromaPipeline:
    """Latents packed in tokens of 16; T5 with a mask."""
    torch.manual_seed(seed)
    words = t5_tokenizer(512)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=moved(autoencoder()),
        text_encoder=moved(t5_encoder(words)),
        tokenizer=words,
        transformer=moved(transformer),
    )


def krea2(seed: int = 0) -> Krea2Pipeline:
    """Latents packed in tokens of 16; states of several layers of the encoder."""
    torch.manual_seed(seed)
    words = chat_tokenizer()
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=moved(video_autoencoder()),
        text_encoder=moved(qwen3_vl(words)),
        tokenizer=words,
        transformer=moved(transformer),
        text_encoder_select_layers=(1, 3),
    )


def ernie_image(seed: int = 0) -> ErnieImagePipeline:
    """Latents 16 x s/4 x s/4; prompts as lists, and one timestep a call."""
    torch.manual_seed(seed)
    words = chat_tokenizer()
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    return ErnieImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=moved(flux2_autoencoder()),
        text_encoder=moved(qwen3(words, 2)),
        tokenizer=words,
        transformer=moved(transformer),
    )


def wan(seed: int = 0) -> WanPipeline:
    """Latents 4 x frames x s/2 x s/2; the published UniPC on flow levels."""
    torch.manual_seed(seed)
    words = t5_tokenizer(512)
    vae = video_autoencoder(AutoencoderKLWan, scale_factor_temporal=4, scale_factor_spatial=2)
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


def hidream(seed: int = 0, side: int = 8) -> HiDreamImagePipeline:
    """Latents 4 x s/2 x s/2, of one area: `side` squared; four text encoders and a mixture of two experts."""
    torch.manual_seed(seed)
    short, sentence, words = tokenizer(), t5_tokenizer(512), chat_tokenizer()
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
        text_encoder=moved(long_clip(short)),
        tokenizer=short,
        text_encoder_2=moved(long_clip(short)),
        tokenizer_2=short,
        text_encoder_3=moved(t5_encoder(sentence)),
        tokenizer_3=sentence,
        text_encoder_4=moved(LlamaForCausalLM(LlamaConfig(**language(words)))),
        tokenizer_4=words,
        transformer=moved(transformer),
    )
    pipeline.default_sample_size = side
    return pipeline


FIRST_CLASS: dict[str, Callable[..., Any]] = {
    "flux2-klein": flux2_klein,
    "z-image": z_image,
    "qwen-image": qwen_image,
    "sana": sana,
}
FAMILIES: dict[str, Callable[..., Any]] = FIRST_CLASS | {
    "lumina2": lumina2,
    "chroma": chroma,
    "krea2": krea2,
    "ernie-image": ernie_image,
    "hidream": hidream,
    "wan": wan,
}

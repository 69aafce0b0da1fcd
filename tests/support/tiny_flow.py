"""Tiny random pipelines of today's flow transformers: what a test needs of FLUX.2-klein, Z-Image and others in a second.

Every weight is moved by noise, so that no zero-initialised layer hides what a test looks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
)

from support.tiny import t5_encoder, t5_tokenizer

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SIDE = 16
"""Side in pixels of the images that tests draw: four latents, two tokens."""


def chat_tokenizer() -> Qwen2Tokenizer:
    """Spells any printable ASCII text letter by letter, in a chat template."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate([*letters, *special])},
        merges=[],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:2],
        model_max_length=600,
    )
    words.chat_template = CHAT
    return words


def moved(module: nn.Module, by: float = 0.05) -> nn.Module:
    """The module with every parameter moved by noise."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape))
    return module.eval()


def many_layers(words: Qwen2Tokenizer) -> GPT2Model:
    """The 27 layers of which FLUX.2-klein reads three, of a class whose layers cost little."""
    return GPT2Model(
        GPT2Config(
            vocab_size=len(words),
            n_positions=1024,
            n_embd=8,
            n_layer=27,
            n_head=1,
            n_inner=8,
            activation_function="relu",
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
        )
    )


def qwen3(words: Qwen2Tokenizer, layers: int) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3Model(config)


def autoencoder(blocks: int = 2) -> AutoencoderKL:
    """Images of side 2^(blocks - 1) s to latents of side s."""
    return AutoencoderKL(
        block_out_channels=(*(8,) * (blocks - 1), 16),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def video_autoencoder() -> AutoencoderKLQwenImage:
    """Frames of side 2 s to latents of side s, with statistics of its latents."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.5, -0.3, 0.1, 1.0],
        latents_std=[1.5, 0.7, 2.0, 1.2],
    )


def gemma(words: Qwen2Tokenizer, layers: int = 1) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            pad_token_id=words.pad_token_id,
        )
    )


def flux2_autoencoder() -> AutoencoderKLFlux2:
    """Images of side 2 s to latents of side s, with statistics of a batch norm."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


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
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
                "rope_theta": 1000000.0,
                "vocab_size": len(words),
                "pad_token_id": words.pad_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
            },
            vision_end_token_id=words.pad_token_id,
            vision_start_token_id=words.pad_token_id,
            image_token_id=words.pad_token_id,
            video_token_id=words.pad_token_id,
        )
    )
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
        text_encoder=moved(encoder),
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
    encoder = Qwen3VLModel(
        Qwen3VLConfig(
            text_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "mrope_interleaved": True},
                "vocab_size": len(words),
                "pad_token_id": words.pad_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "deepstack_visual_indexes": [0],
            },
        )
    )
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
        text_encoder=moved(encoder),
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


FIRST_CLASS: dict[str, Callable[..., Any]] = {
    "flux2-klein": flux2_klein,
    "z-image": z_image,
    "qwen-image": qwen_image,
    "sana": sana,
}
OTHERS: dict[str, Callable[..., Any]] = {
    "lumina2": lumina2,
    "chroma": chroma,
    "krea2": krea2,
    "ernie-image": ernie_image,
}

"""Today's flow transformers at their published sizes: FLUX.2-klein-4B, Z-Image, Qwen-Image and SANA 1.6B.

Sizes are those of the published configuration files of each model. The tokenizers spell letter by
letter, so a prompt that is not padded has more tokens than with the published vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

LETTERS = [chr(code) for code in range(33, 127)]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def autoencoder(tiny: bool, channels: int, side: int, scale: float, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8) if tiny else (128, 256, 512, 512),
        norm_num_groups=8 if tiny else 32,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        sample_size=side,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def scheduler(kind: Any, **options: Any) -> Any:
    """A scheduler, whose tables have numbers wherever the weights are."""
    with torch.device("cpu"):
        return kind(**options)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    spelled = [*LETTERS, "Ġ", "Ċ"]  # byte-level names of the space and the line break
    words = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*spelled, *special])},
        merges=[],
        eos_token=special[2],
        additional_special_tokens=special[1:2],
        model_max_length=131_072,
    )
    words.chat_template = CHAT
    return words


def _gemma_tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", "\n", *LETTERS]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=8192)


_TINY_LANGUAGE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def _qwen3_4b(tiny: bool) -> Qwen3Config:
    sizes = {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    return Qwen3Config(
        vocab_size=151_936,
        num_hidden_layers=28 if tiny else 36,  # FLUX.2-klein reads the 9th, the 18th and the 27th
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **(_TINY_LANGUAGE if tiny else sizes),
    )


def _qwen25_vl_7b(tiny: bool) -> Qwen2_5_VLConfig:
    language = {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_hidden_layers": 28,
    }
    vision = {"hidden_size": 1280, "depth": 32}
    if tiny:
        language = {**_TINY_LANGUAGE, "num_hidden_layers": 2}
        vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2}
    sections = [1, 1, 2] if tiny else [16, 24, 24]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return Qwen2_5_VLConfig(
        text_config={**language, "rms_norm_eps": 1e-6, "max_position_embeddings": 128_000, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": language["hidden_size"]},
        tie_word_embeddings=False,
    )


def flux2_klein(tiny: bool) -> Flux2KleinPipeline:
    """FLUX.2-klein-base-4B."""
    sizes: dict[str, Any] = {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 3 * 2560,
    }
    small: dict[str, Any] = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * 16,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return Flux2KleinPipeline(
        scheduler=scheduler(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True, shift=3.0),
        vae=AutoencoderKLFlux2(**({"block_out_channels": (8,) * 4, "norm_num_groups": 8} if tiny else {})),
        text_encoder=Qwen3ForCausalLM(_qwen3_4b(tiny)),
        tokenizer=_qwen_tokenizer(),
        transformer=Flux2Transformer2DModel(guidance_embeds=False, **(small if tiny else sizes)),
        is_distilled=False,
    )


def z_image(tiny: bool) -> ZImagePipeline:
    """Z-Image, 6B."""
    small: dict[str, Any] = {
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 6, 6],
    }
    return ZImagePipeline(
        scheduler=scheduler(FlowMatchEulerDiscreteScheduler, shift=6.0),
        vae=autoencoder(tiny, 16, 1024, 0.3611, 0.1159),
        text_encoder=Qwen3Model(_qwen3_4b(tiny)),
        tokenizer=_qwen_tokenizer(),
        transformer=ZImageTransformer2DModel(axes_lens=[1536, 512, 512], **(small if tiny else {})),
    )


def qwen_image(tiny: bool) -> QwenImagePipeline:
    """Qwen-Image, 20B."""
    small: dict[str, Any] = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    }
    levels = scheduler(
        FlowMatchEulerDiscreteScheduler,
        use_dynamic_shifting=True,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
    )
    return QwenImagePipeline(
        scheduler=levels,
        vae=AutoencoderKLQwenImage(**({"base_dim": 8, "num_res_blocks": 1} if tiny else {})),
        text_encoder=Qwen2_5_VLForConditionalGeneration(_qwen25_vl_7b(tiny)),
        tokenizer=_qwen_tokenizer(),
        transformer=QwenImageTransformer2DModel(**(small if tiny else {})),
    )


def sana(tiny: bool) -> SanaPipeline:
    """SANA 1.6B at 1024 pixels."""
    small: dict[str, Any] = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
    }
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    widths = (8,) * 5 + (32,)
    narrow = {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths, "attention_head_dim": 8}
    levels = scheduler(
        DPMSolverMultistepScheduler,
        beta_schedule="linear",
        beta_start=0.0001,
        beta_end=0.02,
        flow_shift=3.0,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
    )
    return SanaPipeline(
        scheduler=levels,
        vae=AutoencoderDC(
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
            **(narrow if tiny else {}),
        ),
        text_encoder=Gemma2Model(Gemma2Config(**({**_TINY_LANGUAGE, "num_hidden_layers": 2} if tiny else {}))),
        tokenizer=_gemma_tokenizer(),
        transformer=SanaTransformer2DModel(**(small if tiny else {})),
    )

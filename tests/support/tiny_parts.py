"""Tiny random parts of today's flow pipelines: tokenizers, text encoders and autoencoders."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    UMT5Config,
    UMT5EncoderModel,
)

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
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


def language(words: PreTrainedTokenizerBase, **own: Any) -> dict[str, Any]:
    """Settings of a small language model."""
    return {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": words.pad_token_id,
        **own,
    }


def qwen3(words: Qwen2Tokenizer, layers: int) -> Qwen3Model:
    own = {"num_hidden_layers": layers, "intermediate_size": 32, "head_dim": 8}
    return Qwen3Model(Qwen3Config(**language(words, eos_token_id=words.eos_token_id, bos_token_id=None, **own)))


def qwen2_vl(words: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    tokens = ("vision_end_token_id", "vision_start_token_id", "image_token_id", "video_token_id")
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=language(words, rope_scaling=rope, rope_theta=1000000.0),
            vision_config=VISION,
            **dict.fromkeys(tokens, words.pad_token_id),
        )
    )


def qwen3_vl(words: Qwen2Tokenizer) -> Qwen3VLModel:
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "mrope_interleaved": True}
    return Qwen3VLModel(
        Qwen3VLConfig(
            text_config=language(words, num_hidden_layers=3, head_dim=8, rope_scaling=rope),
            vision_config=VISION | {"deepstack_visual_indexes": [0]},
        )
    )


def autoencoder(blocks: int = 2, channels: int = 4) -> AutoencoderKL:
    """Images of side 2^(blocks - 1) s to latents of side s."""
    return AutoencoderKL(
        block_out_channels=(*(8,) * (blocks - 1), 16),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=SIDE,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def video_autoencoder(kind: Any = AutoencoderKLQwenImage, blocks: int = 2, **own: Any) -> Any:
    """Frames of side 2^(blocks - 1) s to latents of side s, with statistics of its latents."""
    return kind(
        base_dim=8,
        z_dim=4,
        dim_mult=[1] * (blocks - 1) + [2],
        num_res_blocks=1,
        temperal_downsample=[False] * (blocks - 1),
        latents_mean=[0.5, -0.3, 0.1, 1.0],
        latents_std=[1.5, 0.7, 2.0, 1.2],
        **own,
    )


def gemma(words: PreTrainedTokenizerBase, layers: int = 1) -> Gemma2Model:
    own = {"hidden_size": 8, "intermediate_size": 8, "num_key_value_heads": 1, "head_dim": 4}
    return Gemma2Model(Gemma2Config(**language(words, num_hidden_layers=layers, **own)))


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


def umt5(words: PreTrainedTokenizerBase) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def long_clip(words: PreTrainedTokenizerBase) -> CLIPTextModelWithProjection:
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

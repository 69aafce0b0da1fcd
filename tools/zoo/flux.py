"""Trains the denoiser of `emoji-flux`, a FLUX transformer with CLIP and T5 encoders, on latents.

There are two stages, as for FLUX.1-dev (whose guidance distillation follows Meng et al. 2023, arXiv
2210.03142):

1. Flow matching: loss = |v - (eps - x0)|^2 at x = (1 - sigma) x0 + sigma eps, with
   sigma = sigmoid(N(0, 1)) (Esser et al. 2024, arXiv 2403.03206). 10 % of the captions are dropped,
   and the guidance embedding is held at 1.
2. Guidance distillation: the frozen result u is the teacher, v = u(empty) + w
   (u(prompt) - u(empty)). The student learns to predict v in one evaluation from the guidance
   embedding of w, with w uniform in [1, 5].
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from tools.zoo.autoencoder import LATENT_CHANNELS
from tools.zoo.emoji_data import EmojiSet
from tools.zoo.text import (
    MAX_TOKENS,
    MAX_TOKENS_T5,
    build_t5_encoder,
    build_text_encoder,
    tokenize,
    train_t5_tokenizer,
    train_tokenizer,
)
from tools.zoo.training import Batches, Loss, OnCheckpoint, TrainingRecipe, fit, in_half_precision

LATENT_SIZE = 8
TEXT_WIDTH = 128
MATCHING = TrainingRecipe(steps=14000, batch_size=256, learning_rate=2e-3)
DISTILLATION = TrainingRecipe(steps=2000, batch_size=256, learning_rate=5e-4)


@dataclass(frozen=True)
class FluxRecipe:
    """Settings of the two stages.

    Attributes:
        matching: settings of the flow matching.
        distillation: settings of the guidance distillation; 0 steps leave it out.
        largest_guidance: upper end of the range [1, largest_guidance] from which w is drawn
            uniformly.
    """

    matching: TrainingRecipe = MATCHING
    distillation: TrainingRecipe = DISTILLATION
    largest_guidance: float = 5.0


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler: the shift of the noise levels grows with the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        shift=3.0,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def build_transformer() -> FluxTransformer2DModel:
    """A FLUX transformer of 4.7 M parameters on 16 packed tokens.

    Each block starts as the identity (adaLN-Zero).
    """
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        modulation = name.rpartition(".")[2] == "linear" and "norm" in name
        if isinstance(module, nn.Linear) and (modulation or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


class FluxNetworks(nn.Module):
    """The trained networks of the pipeline, as one velocity v(x, sigma, captions, guidance)."""

    def __init__(
        self, transformer: Any, text_encoder: Any, text_encoder_2: Any, tokenizer: Any, tokenizer_2: Any
    ) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self.text_encoder_2 = transformer, text_encoder, text_encoder_2
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        side = LATENT_SIZE // 2
        image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
        self.register_buffer("image_ids", image_ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(MAX_TOKENS_T5, 3), persistent=False)

    @classmethod
    def build(cls, data: EmojiSet) -> FluxNetworks:
        """Networks with random weights, and tokenizers learnt on the captions."""
        clip, t5 = train_tokenizer(data), train_t5_tokenizer(data)
        return cls(
            build_transformer(),
            build_text_encoder(clip, TEXT_WIDTH, layers=1),
            build_t5_encoder(t5, TEXT_WIDTH),
            clip,
            t5,
        )

    @classmethod
    def load(cls, directory: Path) -> FluxNetworks:
        """The networks and tokenizers of an earlier result."""
        earlier = FluxPipeline.from_pretrained(directory, use_safetensors=True)
        return cls(
            earlier.transformer, earlier.text_encoder, earlier.text_encoder_2, earlier.tokenizer, earlier.tokenizer_2
        )

    def pipeline(self, vae: AutoencoderKL) -> FluxPipeline:
        """The pipeline with these networks; see `training.in_half_precision` for its dtypes."""
        return FluxPipeline(
            vae=in_half_precision(vae),
            transformer=in_half_precision(self.transformer),
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            scheduler=flux_scheduler(),
        )

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """CLIP's int64 `[n, 24]` and T5's `[n, 16]`, as FluxPipeline prepares them."""
        return tokenize(self.tokenizer, captions, MAX_TOKENS), tokenize(self.tokenizer_2, captions, MAX_TOKENS_T5)

    def forward(self, x: Tensor, sigma: Tensor, clip: Tensor, t5: Tensor, guidance: Tensor) -> Tensor:
        """The velocity `[n, 16, 32]`.

        Args:
            x: packed latents, `[n, 16, 32]`.
            sigma: levels `[n]`.
            clip: CLIP's tokens of the captions.
            t5: T5's tokens of the captions.
            guidance: `[n]`.
        """
        output: Tensor = self.transformer(
            hidden_states=x,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=self.text_encoder(clip).pooler_output,
            encoder_hidden_states=self.text_encoder_2(t5)[0],
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return output


def pack(latents: Tensor) -> Tensor:
    """`[n, c, h, w]` to FLUX's packed `[n, h w / 4, 4 c]`."""
    n, channels, height, width = latents.shape
    packed: Tensor = FluxPipeline._pack_latents(latents, n, channels, height, width)
    return packed


def train_flux(
    latents: Tensor, data: EmojiSet, networks: FluxNetworks, on_checkpoint: OnCheckpoint, recipe: FluxRecipe
) -> tuple[FluxNetworks, dict[str, Any]]:
    """Trains the networks; returns their averaged weights and the figures.

    Args:
        latents: scaled latents `[n, 8, 8, 8]`, row by row those of the pictures of `data`.
    """
    packed = pack(latents)
    stages: dict[str, dict[str, Any]] = {}
    if recipe.matching.steps:
        batches = Batches(packed, data, recipe.matching, networks.tokens)
        networks, stages["flow matching"] = fit(networks, batches, _matching_loss(networks), on_checkpoint)
    if recipe.distillation.steps:
        batches = Batches(packed, data, recipe.distillation, networks.tokens)
        loss = _distillation_loss(networks, recipe.largest_guidance)
        networks, stages["guidance distillation"] = fit(networks, batches, loss, on_checkpoint)
    totals = {key: sum(stage[key] for stage in stages.values()) for key in ("steps", "seconds")}
    final = next(iter(stages.values()))["final_loss"]
    return networks, {**totals, "final_loss": final, "pictures": batches.pictures, "stages": stages}


def _matching_loss(networks: FluxNetworks) -> Loss:
    def loss(x0: Tensor, noise: Tensor, uniform: Tensor, clip: Tensor, t5: Tensor) -> Tensor:
        sigma, x = _noised(x0, noise, uniform[0])
        velocity = networks(x, sigma, clip, t5, torch.ones_like(sigma))
        return (velocity - (noise - x0)).square().mean()

    return loss


def _distillation_loss(student: FluxNetworks, largest_guidance: float) -> Loss:
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    device = next(student.parameters()).device
    empty = [tokens.to(device) for tokens in student.tokens([""])]

    def loss(x0: Tensor, noise: Tensor, uniform: Tensor, clip: Tensor, t5: Tensor) -> Tensor:
        sigma, x = _noised(x0, noise, uniform[0])
        guidance = 1 + (largest_guidance - 1) * uniform[1]
        one = torch.ones_like(sigma)
        with torch.no_grad():
            unprompted = teacher(x, sigma, *(tokens.expand(len(x), -1) for tokens in empty), one)
            target = unprompted + guidance[:, None, None] * (teacher(x, sigma, clip, t5, one) - unprompted)
        return (student(x, sigma, clip, t5, guidance) - target).square().mean()

    return loss


def _noised(x0: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Levels sigma `[n]`, and x = (1 - sigma) x0 + sigma noise.

    The normal quantile turns the uniform numbers into N(0, 1).
    """
    sigma = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)).sigmoid()
    return sigma, x0.lerp(noise, sigma[:, None, None])

"""Trains the denoiser of `emoji-sd`, a UNet with its text encoder, on cached latents.

    loss = min(SNR_t, 5) / SNR_t |eps - eps_hat|^2        SNR_t = a_t^2 / s_t^2

The loss is that of Hang et al. 2023, arXiv 2303.09556. The noise schedule is Stable Diffusion's own
(scaled linear, 0.00085 to 0.012, 1000 steps), so that findings with `emoji-sd` are findings on the
path of SD1.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from tools.zoo.autoencoder import LATENT_CHANNELS
from tools.zoo.emoji_data import EmojiSet
from tools.zoo.text import MAX_TOKENS, build_text_encoder, tokenize, train_tokenizer
from tools.zoo.training import Batches, OnCheckpoint, TrainingRecipe, fit, in_half_precision

SNR_GAMMA = 5.0


def stable_diffusion_scheduler() -> DDIMScheduler:
    """SD1.5's schedule: last alpha from the table, timesteps offset by one, leading spacing."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_unet(text_width: int) -> UNet2DConditionModel:
    """A UNet of 6.1 M parameters with cross-attention at both resolutions."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


class UNetNetworks(nn.Module):
    """The trained networks of the pipeline, seen as one noise prediction eps(x, t, captions)."""

    def __init__(self, unet: Any, text_encoder: Any, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer

    @classmethod
    def build(cls, data: EmojiSet) -> UNetNetworks:
        """Networks with random weights, and a tokenizer learnt on the captions."""
        tokenizer = train_tokenizer(data)
        text_encoder = build_text_encoder(tokenizer)
        return cls(build_unet(text_encoder.config.hidden_size), text_encoder, tokenizer)

    @classmethod
    def load(cls, directory: Path) -> UNetNetworks:
        """The networks and the tokenizer of an earlier result."""
        pipeline = StableDiffusionPipeline.from_pretrained(directory, use_safetensors=True, safety_checker=None)
        return cls(pipeline.unet, pipeline.text_encoder, pipeline.tokenizer)

    def tokens(self, captions: list[str]) -> tuple[Tensor]:
        """int64 `[n, 24]`, as StableDiffusionPipeline prepares them."""
        return (tokenize(self.tokenizer, captions, MAX_TOKENS),)

    def forward(self, x: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predicted noise `[n, 8, 8, 8]`, the captions encoded as StableDiffusionPipeline does."""
        prediction: Tensor = self.unet(x, timesteps, self.text_encoder(tokens).last_hidden_state).sample
        return prediction

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        """The pipeline with these networks; see `training.in_half_precision` for its dtypes."""
        return StableDiffusionPipeline(
            vae=in_half_precision(vae),
            unet=in_half_precision(self.unet),
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            scheduler=stable_diffusion_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def train_unet(
    latents: Tensor, data: EmojiSet, networks: UNetNetworks, on_checkpoint: OnCheckpoint, recipe: TrainingRecipe
) -> tuple[UNetNetworks, dict[str, Any]]:
    """Trains the networks; returns their averaged weights and the figures.

    Args:
        latents: scaled latents `[n, 8, 8, 8]`, row by row those of the pictures of `data`.
    """
    alphas = stable_diffusion_scheduler().alphas_cumprod.to(next(networks.parameters()).device)
    snr = alphas / (1 - alphas)
    batches = Batches(latents, data, recipe, networks.tokens)

    def loss(x0: Tensor, noise: Tensor, uniform: Tensor, tokens: Tensor) -> Tensor:
        t = (uniform[0] * len(alphas)).long()
        a, s = (v[t].sqrt()[:, None, None, None] for v in (alphas, 1 - alphas))
        error = (networks(a * x0 + s * noise, t, tokens) - noise).square().mean((1, 2, 3))
        return (error * (snr[t].clamp(max=SNR_GAMMA) / snr[t])).mean()

    networks, figures = fit(networks, batches, loss, on_checkpoint)
    return networks, {**figures, "pictures": batches.pictures}

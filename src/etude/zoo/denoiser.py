"""Trains the denoiser of `emoji-sd`, a UNet with its text encoder, on cached latents.

loss = min(SNR_t, 5) / SNR_t |eps - eps_hat|^2 (Hang et al. 2023, arXiv 2303.09556), SNR_t = a_t^2 / s_t^2, on Stable Diffusion's
own noise schedule (scaled linear, 0.00085 to 0.012, 1000 steps), so that what holds for `emoji-sd` is tried on SD1.5's path.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from rich.progress import track
from transformers import CLIPTokenizer

from etude.zoo.autoencoder import LATENT_CHANNELS, warmup_cosine
from etude.zoo.emoji_data import EmojiSet
from etude.zoo.text import MAX_TOKENS, CaptionSampler, build_text_encoder


@dataclass(frozen=True)
class DenoiserRecipe:
    """How the denoiser is trained.

    Attributes:
        steps: optimiser steps.
        batch_size: latents per step.
        learning_rate: peak of a warm-up and cosine schedule that ends at 0.
        ema_decay: of the weights that are kept.
        snr_gamma: the 5 of the loss above.
        people_weight: how often the many variants of people are drawn, against 1 for everything else.
    """

    steps: int = 8000
    batch_size: int = 64
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    snr_gamma: float = 5.0
    people_weight: float = 0.35
    seed: int = 0


def stable_diffusion_scheduler() -> DDIMScheduler:
    """SD1.5's noise schedule and its quirks: last alpha from the table, timesteps offset by one, leading spacing."""
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


def sampling_weights(data: EmojiSet, people_weight: float) -> np.ndarray:
    """Probability `[n]` of drawing each picture: no flags, fewer of the many variants of people."""
    people = ("man", "woman", "men", "women", "person", "people", "family", "couple", "kiss:", "deaf")
    per_emoji = np.array([people_weight if name.startswith(people) else 1.0 for name in data.names])
    per_emoji[data.is_flag] = 0.0
    weights = per_emoji[data.emoji]
    return weights / weights.sum()


def train_denoiser(
    latents: torch.Tensor,
    data: EmojiSet,
    tokenizer: CLIPTokenizer,
    recipe: DenoiserRecipe,
    on_checkpoint: Callable[[int, UNet2DConditionModel, Any], None] = lambda step, unet, text_encoder: None,
    checkpoint_every: int = 500,
    initial: tuple[UNet2DConditionModel, Any] | None = None,
) -> tuple[UNet2DConditionModel, Any, dict]:
    """Trains on scaled `latents` `[n, 8, 8, 8]`, row by row the pictures of `data`; returns the averaged weights and figures.

    `initial` is a UNet and a text encoder to go on from instead of random weights, with a fresh optimiser and schedule.
    """
    torch.manual_seed(recipe.seed)
    if initial is None:
        text_encoder = build_text_encoder(tokenizer)
        unet = build_unet(text_encoder.config.hidden_size)
    else:
        unet, text_encoder = initial
    model = torch.nn.ModuleList([unet, text_encoder]).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(recipe.steps, warmup=300))
    alphas = stable_diffusion_scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    generator = torch.Generator().manual_seed(recipe.seed)
    rng, captions = np.random.default_rng(recipe.seed), CaptionSampler(data, recipe.seed)
    weights = sampling_weights(data, recipe.people_weight)
    losses: list[float] = []
    start = time.monotonic()
    for step in track(range(recipe.steps), "denoiser"):
        rows = rng.choice(len(latents), size=recipe.batch_size, p=weights)
        x0 = latents[rows]
        t = torch.randint(len(alphas), (len(rows),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        a, s = (v[t].sqrt()[:, None, None, None] for v in (alphas, 1 - alphas))
        prediction = unet(a * x0 + s * noise, t, encode_captions(text_encoder, tokenizer, captions(rows))).sample
        error = (prediction - noise).square().mean((1, 2, 3))
        loss = (error * (snr[t].clamp(max=recipe.snr_gamma) / snr[t])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % checkpoint_every == 0:
            seconds = time.monotonic() - start
            print(f"step {step + 1}  loss {np.mean(losses[-checkpoint_every:]):.4f}  {seconds:.0f} s", flush=True)
            on_checkpoint(step + 1, average[0], average[1])
    figures = {
        "steps": recipe.steps,
        "seconds": round(time.monotonic() - start),
        "final_loss": float(np.mean(losses[-500:])),
        "loss_every_500_steps": [round(float(np.mean(losses[i : i + 500])), 4) for i in range(0, len(losses), 500)],
        "pictures": int((weights > 0).sum()),
    }
    return average[0].eval(), average[1].eval(), figures


def encode_captions(text_encoder: Any, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Last hidden states `[n, 24, width]`, as StableDiffusionPipeline computes them."""
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids).last_hidden_state

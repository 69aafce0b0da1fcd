"""Trains the autoencoder of the embedded models: 64 x 64 pixels to 8 x 8 latents of 8 channels.

    loss = |x - y| + 2 (x - y)^2 + kl_weight KL(q(z | x) || N(0, I))

Each term is a mean over its own dimensions; pixels are in [-1, 1].
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track

from tools.zoo.training import warmup_cosine

LATENT_CHANNELS = 8


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Settings of the autoencoder's training.

    Attributes:
        steps: optimiser steps.
        batch_size: pictures per step, each mirrored with probability 1/2.
        learning_rate: peak of a warm-up and cosine schedule that ends at 0.
        kl_weight: weight of the KL, which keeps the latents bounded and the decoder smooth.
        held_out: share of the emoji that are left out of training, for the quality figure.
        seed: seed of the weights, the batches and the split.
    """

    steps: int = 2600
    batch_size: int = 32
    learning_rate: float = 2e-3
    kl_weight: float = 1e-4
    held_out: float = 0.1
    seed: int = 0


def build_autoencoder() -> AutoencoderKL:
    """An AutoencoderKL of 2.7 M parameters, narrow at full resolution, which takes most time."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
    )


def to_model_range(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 pictures to fp32 in [-1, 1]."""
    return torch.as_tensor(images).float().div_(127.5).sub_(1.0)


def train_autoencoder(
    images: np.ndarray, held_out: np.ndarray, recipe: AutoencoderRecipe, device: str = "cpu"
) -> tuple[Any, dict]:
    """Trains on `images[~held_out]`; returns the model and its figures."""
    torch.manual_seed(recipe.seed)
    model = build_autoencoder().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(recipe.steps))
    train = torch.as_tensor(images[~held_out])
    generator = torch.Generator().manual_seed(recipe.seed)
    losses, start = [], time.monotonic()
    for step in track(range(recipe.steps), "autoencoder"):
        x = to_model_range(train[torch.randint(len(train), (recipe.batch_size,), generator=generator)]).to(device)
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x[mirrored] = x[mirrored].flip(-1)
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (y - x).abs().mean() + 2 * (y - x).square().mean() + recipe.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            quality = reconstruction_psnr(model, images[held_out])
            seconds = time.monotonic() - start
            print(
                f"step {step + 1}  loss {np.mean(losses[-200:]):.4f}  held-out PSNR {quality:.2f} dB  {seconds:.0f} s",
                flush=True,
            )
    latents = encode(model, images[~held_out])
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    figures = {
        "steps": recipe.steps,
        "seconds": round(time.monotonic() - start),
        "final_loss": float(np.mean(losses[-200:])),
        "psnr_held_out_db": reconstruction_psnr(model, images[held_out]),
        "held_out_pictures": int(held_out.sum()),
        "scaling_factor": model.config.scaling_factor,
    }
    return model.eval(), figures


@torch.no_grad()
def encode(model: AutoencoderKL, images: np.ndarray, batch_size: int = 64) -> torch.Tensor:
    """Posterior means, fp32 `[n, 8, 8, 8]` on the CPU, not yet scaled."""
    batches = torch.as_tensor(images).split(batch_size)
    return torch.cat([model.encode(to_model_range(b).to(model.device)).latent_dist.mean.cpu() for b in batches])


@torch.no_grad()
def reconstruction_psnr(model: AutoencoderKL, images: np.ndarray, batch_size: int = 64) -> float:
    """Mean over pictures of 10 log10(4 / mse), reconstructed from the posterior mean.

    Pixels are in [-1, 1].
    """
    psnr = []
    for batch in torch.as_tensor(images).split(batch_size):
        x = to_model_range(batch).to(model.device)
        y = model.decode(model.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        psnr.append(10 * torch.log10(4 / (y - x).square().mean((1, 2, 3))))
    return float(torch.cat(psnr).mean())

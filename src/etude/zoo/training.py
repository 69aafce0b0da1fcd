"""The training loop of the embedded models: AdamW, warm-up and cosine, averaged weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from etude.zoo.emoji_data import EmojiSet
from etude.zoo.text import CaptionSampler

Networks = TypeVar("Networks", bound=nn.Module)
OnCheckpoint = Callable[[Any], None]
"""Is given the averaged networks."""


@dataclass(frozen=True)
class TrainingRecipe:
    """How a denoiser is trained.

    Attributes:
        steps: optimiser steps.
        batch_size: latents per step.
        learning_rate: peak of a warm-up and cosine schedule that ends at 0.
        ema_decay: of the weights that are kept.
        seed: of the weights, the batches and the noise.
        checkpoint_every: steps between calls of `on_checkpoint`.
    """

    steps: int = 13500
    batch_size: int = 64
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    seed: int = 0
    checkpoint_every: int = 500


def sampling_weights(data: EmojiSet, people_weight: float = 0.35) -> np.ndarray:
    """Probability `[n]` of drawing each picture: no flags, fewer of the many variants of people."""
    people = ("man", "woman", "men", "women", "person", "people", "family", "couple", "kiss:", "deaf")
    per_emoji = np.array([people_weight if name.startswith(people) else 1.0 for name in data.names])
    per_emoji[data.is_flag] = 0.0
    weights = per_emoji[data.emoji]
    return weights / weights.sum()


class Batches:
    """Draws latents with their captions, and holds the generator for the noise that goes with them.

    Args:
        latents: `[n, ...]`, row by row the pictures of `data`.
        recipe: its batch size and seed.

    Attributes:
        generator: of levels and noise.
        pictures: how many can be drawn.
    """

    def __init__(self, latents: Tensor, data: EmojiSet, recipe: TrainingRecipe) -> None:
        self.latents, self.size, self.weights = latents, recipe.batch_size, sampling_weights(data)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.rng, self.captions = np.random.default_rng(recipe.seed), CaptionSampler(data, recipe.seed)
        self.pictures = int((self.weights > 0).sum())

    def __call__(self) -> tuple[Tensor, list[str]]:
        rows = self.rng.choice(len(self.latents), size=self.size, p=self.weights)
        return self.latents[rows], self.captions(rows)


def fit(
    networks: Networks,
    loss: Callable[[], Tensor],
    recipe: TrainingRecipe,
    on_checkpoint: OnCheckpoint = lambda networks: None,
) -> tuple[Networks, dict[str, Any]]:
    """Minimises `loss()`, which draws its own batch; returns the averaged networks and the figures of the training."""
    average = copy.deepcopy(networks).requires_grad_(False)
    networks.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(networks.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warmup_cosine(recipe.steps, warmup=min(300, recipe.steps // 10))
    )
    losses: list[float] = []
    start = time.monotonic()
    for step in track(range(recipe.steps), "denoiser"):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(networks.parameters()), 1 - decay)
        losses.append(value.item())
        if (step + 1) % recipe.checkpoint_every == 0:
            mean, seconds = np.mean(losses[-recipe.checkpoint_every :]), time.monotonic() - start
            print(f"step {step + 1}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
            on_checkpoint(average)
    figures = {
        "steps": recipe.steps,
        "seconds": round(time.monotonic() - start),
        "final_loss": float(np.mean(losses[-500:])),
        "loss_every_500_steps": [round(float(np.mean(losses[i : i + 500])), 4) for i in range(0, len(losses), 500)],
    }
    return average.eval(), figures


def warmup_cosine(steps: int, warmup: int = 100) -> Callable[[int], float]:
    """Learning-rate factor: linear over `warmup` steps, then half a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def in_half_precision(network: Any) -> Any:
    """A copy for the disk, half the size; diffusers loads it as fp32. (transformers would keep fp16: text encoders stay fp32.)"""
    return copy.deepcopy(network).half()

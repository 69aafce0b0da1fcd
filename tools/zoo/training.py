"""The training loop of the embedded models: AdamW, warm-up and cosine, averaged weights.

With a network this small a GPU waits for the launch of each kernel. On a GPU a whole step, from the
forward pass to the optimiser, is therefore recorded once as a CUDA graph and replayed, and other
processes draw the batches.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tools.zoo.emoji_data import EmojiSet
from tools.zoo.text import CaptionSampler

Networks = TypeVar("Networks", bound=nn.Module)
OnCheckpoint = Callable[[Any], None]
"""A function of the averaged networks."""
Loss = Callable[..., Tensor]
"""A function of the tensors of a batch."""
LOG_EVERY = 500


@dataclass(frozen=True)
class TrainingRecipe:
    """Settings of a denoiser's training.

    Attributes:
        steps: optimiser steps.
        batch_size: latents per step.
        learning_rate: peak of a warm-up and cosine schedule that ends at 0.
        ema_decay: decay of the averaged weights, which are the result.
        seed: seed of the weights, the batches and the noise.
    """

    steps: int = 13500
    batch_size: int = 64
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    seed: int = 0

    @property
    def checkpoint_every(self) -> int:
        """Steps between calls of `on_checkpoint`: a twentieth of the training, but at least
        `LOG_EVERY`.

        So many steps take about a minute on a laptop.
        """
        return max(LOG_EVERY, self.steps // 20)


def sampling_weights(data: EmojiSet, people_weight: float = 0.35) -> np.ndarray:
    """Probability `[n]` of drawing each picture: no flags, and fewer variants of people."""
    people = ("man", "woman", "men", "women", "person", "people", "family", "couple", "kiss:", "deaf")
    per_emoji = np.array([people_weight if name.startswith(people) else 1.0 for name in data.names])
    per_emoji[data.is_flag] = 0.0
    weights = per_emoji[data.emoji]
    return weights / weights.sum()


class Batches(Dataset[tuple[Tensor, ...]]):
    """The batches of a training by their index k.

    A batch holds latents, noise of their shape, two uniform numbers per picture `[2, n]`, and the
    captions' tokens. It depends on the seed and k alone, so any number of processes may draw the
    batches.

    Args:
        latents: `[n, ...]` on the CPU, row by row those of the pictures of `data`.
        recipe: settings with the steps, the batch size and the seed.
        tokens: function from a list of captions to their tokens.

    Attributes:
        pictures: number of pictures that can be drawn.
    """

    def __init__(
        self,
        latents: Tensor,
        data: EmojiSet,
        recipe: TrainingRecipe,
        tokens: Callable[[list[str]], tuple[Tensor, ...]],
    ) -> None:
        self.latents, self.recipe, self.tokens = latents, recipe, tokens
        self.weights, self.captions = sampling_weights(data), CaptionSampler(data)
        self.pictures = int((self.weights > 0).sum())
        self._tokens_of: dict[str, tuple[Tensor, ...]] = {}  # most captions repeat

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng((self.recipe.seed, step))
        rows = rng.choice(len(self.latents), size=self.recipe.batch_size, p=self.weights)
        x0 = self.latents[rows]
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
        uniform = torch.from_numpy(rng.random((2, len(rows)), dtype=np.float32))
        return x0, noise, uniform, *self._tokens(self.captions(rows, rng))

    def _tokens(self, captions: list[str]) -> tuple[Tensor, ...]:
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self._tokens_of]:
            self._tokens_of.update(zip(new, zip(*self.tokens(new), strict=True), strict=True))
        kinds = zip(*(self._tokens_of[caption] for caption in captions), strict=True)
        return tuple(torch.stack(rows) for rows in kinds)


def fit(
    networks: Networks,
    batches: Batches,
    loss: Loss,
    on_checkpoint: OnCheckpoint = lambda networks: None,
) -> tuple[Networks, dict[str, Any]]:
    """Minimises `loss` over the batches, on the networks' device.

    Returns:
        The averaged networks, and the figures of the training.
    """
    recipe, device = batches.recipe, next(networks.parameters()).device
    average = copy.deepcopy(networks).requires_grad_(False)
    networks.requires_grad_(True).train()
    step = _Step(networks, loss, recipe, device)
    losses: list[Tensor] = []
    start = time.monotonic()
    for number, batch in enumerate(track(_loaded(batches, device), "denoiser", total=recipe.steps), start=1):
        losses.append(step(batch))
        decay = min(recipe.ema_decay, number / (9 + number))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(networks.parameters()), 1 - decay)
        if number % LOG_EVERY == 0:
            mean, seconds = torch.stack(losses[-LOG_EVERY:]).mean(), time.monotonic() - start
            print(f"step {number}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
        if number % recipe.checkpoint_every == 0:
            on_checkpoint(average)
    curve = torch.stack(losses).cpu()
    figures = {
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "seconds": round(time.monotonic() - start),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "final_loss": float(curve[-LOG_EVERY:].mean()),
        "loss_in_twenty_parts": [round(float(part.mean()), 4) for part in curve.tensor_split(20) if len(part)],
    }
    return average.eval(), figures


def _loaded(batches: Batches, device: torch.device) -> DataLoader[tuple[Tensor, ...]]:
    """The batches in order; with a GPU, processes of their own draw them ahead."""
    cuda = device.type == "cuda"
    workers = min(4, max(1, (os.cpu_count() or 1) - 1)) if cuda else 0
    return DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=cuda)


class _Step:
    """An optimiser step of AdamW on one batch, which returns the loss; batches have one shape."""

    WARM_UP = 3
    """Ordinary steps before the graph is recorded.

    In these steps the libraries choose their kernels, and the optimiser makes its state.
    """

    def __init__(self, networks: nn.Module, loss: Loss, recipe: TrainingRecipe, device: torch.device) -> None:
        self.parameters, self.loss = list(networks.parameters()), loss
        self.cuda = device.type == "cuda"
        rate: Any = torch.tensor(recipe.learning_rate, device=device) if self.cuda else recipe.learning_rate
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-2, capturable=self.cuda, fused=self.cuda
        )
        factor = warmup_cosine(recipe.steps, warmup=min(300, recipe.steps // 10))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.device, self.calls = device, 0

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        value = self._launch(batch) if self.cuda else self._update(*batch)
        self.schedule.step()
        return value

    def _update(self, *batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        value = self.loss(*batch)
        value.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return value.detach()

    def _launch(self, batch: Sequence[Tensor]) -> Tensor:
        """The same as `_update`, recorded as a graph after the warm-up."""
        self.calls += 1
        if self.calls <= self.WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                value = self._update(*(tensor.to(self.device) for tensor in batch))
            torch.cuda.current_stream().wait_stream(side)
            return value
        if self.calls == self.WARM_UP + 1:
            self.inputs = [tensor.to(self.device) for tensor in batch]
            self.graph = torch.cuda.CUDAGraph()
            # Errors are local to the thread, because another thread pins batches.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.value = self._update(*self.inputs)
        for room, tensor in zip(self.inputs, batch, strict=True):
            room.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.value.clone()


def warmup_cosine(steps: int, warmup: int = 100) -> Callable[[int], float]:
    """The learning rate's factor: linear over `warmup` steps, then half a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def in_half_precision(network: Any) -> Any:
    """A copy for the disk in half the size; diffusers loads it as fp32.

    It is not for text encoders, because transformers would load them as fp16.
    """
    return copy.deepcopy(network).half()

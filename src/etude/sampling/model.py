"""The model as a sampler sees it: encode prompts, predict, decode.

Nothing here trains. What the trainer needs beyond it is `etude.policies.trainable.TrainablePolicy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.sampling.paths import Grid
from etude.sampling.paths import Path as NoisePath


@dataclass(frozen=True)
class Conditioning:
    """What the network is told about the prompt.

    Attributes:
        prompt: named tensors, one row per sample.
        unconditional: the same tensors for the empty prompt, one row; empty where guidance does not need them.
    """

    prompt: dict[str, Tensor]
    unconditional: dict[str, Tensor]

    def take(self, rows: Tensor | slice) -> Conditioning:
        """The conditioning of some of the samples."""
        return Conditioning({name: value[rows] for name, value in self.prompt.items()}, self.unconditional)


class Policy(ABC):
    """A text-to-image model seen as a policy over denoising steps.

    Attributes:
        path: the noise path that the network was trained on.
        scheduler_config: of the pipeline's own scheduler.
        latent_shape: of one sample: `[c, h, w]`, or `[tokens, c]` where the network takes packed latents.
        device: where the networks live.
    """

    path: NoisePath
    scheduler_config: Mapping[str, Any]
    latent_shape: tuple[int, ...]
    device: torch.device

    @property
    def prediction_type(self) -> str:
        """What the network predicts, as its path says: "epsilon", "v_prediction", "sample" or "flow_prediction"."""
        return self.path.prediction_type

    @property
    def dimensions(self) -> int:
        """D, the number of latent dimensions of one sample."""
        return int(torch.Size(self.latent_shape).numel())

    def grid(self, num_steps: int) -> Grid:
        """The levels that the pipeline itself would visit in N steps at this policy's resolution."""
        return self.path.grid(num_steps)

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Conditioning of `n` prompts; each is encoded alone, and not again while there is room to keep it."""

    def encode_ahead(self, prompts: Iterable[str]) -> None:
        """Encodes prompts that `encode` will be asked for, so that little or nothing is left to encode then."""
        for prompt in prompts:
            self.encode([prompt])

    @abstractmethod
    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        """The network's output with guidance, fp32 and shaped like `x`.

        Args:
            x: fp32 latents `[n, *latent_shape]`.
            timesteps: `[n]`.
            conditioning: `n` rows.
            guidance_scale: as the plain pipeline takes it: w of `uncond + w (cond - uncond)`, where at most 1 means no
                guidance, or, for models with a guidance embedding (FLUX), what the embedding is told.
        """

    @contextmanager
    def precision(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Inside the context the network computes in `dtype`; its weights are not cast. None: the precision it was loaded in.

        Raises:
            EtudeError: this policy's network has one precision only.
        """
        if dtype is not None:
            raise EtudeError(f"{type(self).__name__} computes in one precision: leave rollout.dtype null.")
        yield

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images `[n, 3, H, W]` on the CPU."""

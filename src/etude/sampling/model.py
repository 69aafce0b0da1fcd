"""The model as a sampler sees it: encode prompts, predict, decode. Nothing here trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.sampling.paths import FlowPath, Grid, VPPath


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts as tensors by name: a row per sample, and for guidance one row of the empty prompt."""

    prompt: dict[str, Tensor]
    unconditional: dict[str, Tensor]

    def take(self, rows: Tensor | slice) -> Conditioning:
        """The conditioning of some of the samples."""
        return Conditioning({name: value[rows] for name, value in self.prompt.items()}, self.unconditional)


class Policy(ABC):
    """A text-to-image model seen as a policy over denoising steps.

    It has the noise path that the network was trained on, the config of the pipeline's own
    scheduler, and the shape of one sample's latents: `[c, h, w]`, or `[tokens, c]` if packed.
    """

    path: VPPath | FlowPath
    scheduler_config: Mapping[str, Any]
    latent_shape: tuple[int, ...]
    device: torch.device
    denoiser: str = "network"
    """Name of the network in messages."""
    compiled: bool = False
    """Whether the network is compiled: its graphs with and without gradient then round differently."""

    @property
    def computing_dtype(self) -> torch.dtype:
        """The precision in which the network computes at present."""
        return torch.float32

    @property
    def prediction_type(self) -> str:
        """The path's prediction type: "epsilon", "v_prediction", "sample" or "flow"."""
        return self.path.prediction_type

    @property
    def dimensions(self) -> int:
        """D, the number of latent dimensions of one sample."""
        return int(torch.Size(self.latent_shape).numel())

    def grid(self, num_steps: int) -> Grid:
        """The levels that the pipeline itself visits in N steps at this policy's resolution."""
        return self.path.grid(num_steps)

    def resized(self, side: int | None) -> Policy:
        """The same model, with the weights that it holds at present, for images of another side in pixels.

        None is the side that it has. Default: EtudeError for any other.
        """
        if side is not None:
            raise EtudeError(f"{type(self).__name__} makes images of one size: leave out the size {side}.")
        return self

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """The conditioning of `n` prompts, each encoded alone, and reused while there is room to keep it."""

    def encode_ahead(self, prompts: Iterable[str]) -> None:
        """Encodes prompts ahead of `encode`, which then finds most or all of them ready."""
        for prompt in prompts:
            self.encode([prompt])

    @abstractmethod
    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        """The network's output with guidance, fp32 and shaped like `x`, fp32 `[n, *latent_shape]`.

        The timesteps are `[n]`, and the conditioning has `n` rows. The guidance scale is that of
        the plain pipeline: the weight w in `uncond + w (cond - uncond)`, where w <= 1 means no
        guidance, or the value that is embedded, for models with a guidance embedding (FLUX).
        """

    @contextmanager
    def precision(self, dtype: torch.dtype | None) -> Iterator[None]:
        """A context in which the network computes in `dtype` (None: as loaded); its weights are not cast."""
        if dtype is not None:
            raise EtudeError(f"{type(self).__name__} computes in one precision: leave rollout.dtype null.")
        yield

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents into images: uint8 `[n, 3, H, W]` on the CPU."""

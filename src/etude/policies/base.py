"""What the sampler needs of a model: encode prompts, predict, decode. What the trainer needs: its weights.

A policy wraps a diffusers pipeline that stays a diffusers pipeline: nothing of it is copied or renamed, so what is trained
here is what the plain pipeline loads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.paths import Grid
from etude.paths import Path as NoisePath
from etude.sharding import part


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
        network: the denoiser, possibly wrapped by Accelerate: every forward that needs gradients goes through it.
        path: the noise path that the network was trained on.
        scheduler_config: of the pipeline's own scheduler.
        latent_shape: of one sample: `[c, h, w]`, or `[tokens, c]` where the network takes packed latents.
        device: where the networks live.
        shift: of a flow model's levels, where it is not the published pipeline's own; already part of `path`.
        revision: the commit of the hub repository that the model was read from; None for what was on disk.
    """

    network: nn.Module
    path: NoisePath
    scheduler_config: Mapping[str, Any]
    latent_shape: tuple[int, ...]
    device: torch.device
    shift: float | None = None
    revision: str | None = None

    @property
    @abstractmethod
    def export_name(self) -> str:
        """Directory that `export` fills in a run: `lora`, or `model` after full fine-tuning."""

    @property
    def pipeline_name(self) -> str:
        """The diffusers class that loads the model."""
        return "DiffusionPipeline"

    @property
    def denoiser_names(self) -> tuple[str, str]:
        """Of the trained part: its name in the pipeline, and its class in diffusers."""
        return "unet", "UNet2DConditionModel"

    def loading_arguments(self) -> dict[str, Any]:
        """What the plain pipeline's `from_pretrained` must be given beside the model's name."""
        return {}

    def call_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """What the plain pipeline must be called with, beside the prompt and the number of steps, to do as this policy does."""
        return {"guidance_scale": guidance_scale}

    @property
    def prediction_type(self) -> str:
        return self.path.prediction_type

    def grid(self, num_steps: int) -> Grid:
        """The levels that the pipeline itself would visit in N steps at this policy's resolution."""
        return self.path.grid(num_steps)

    @property
    def dimensions(self) -> int:
        """D, the number of latent dimensions of one sample."""
        return int(torch.Size(self.latent_shape).numel())

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
        """Inside, the network computes in `dtype`, from weights that stay what they are; None: as it was loaded to.

        Raises:
            EtudeError: this policy's network has one precision only.
        """
        if dtype is not None:
            raise EtudeError(f"{type(self).__name__} computes in one precision: leave rollout.dtype null.")
        yield

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images `[n, 3, H, W]` on the CPU."""

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""

    @abstractmethod
    def reference(self) -> Any:
        """Context manager inside which the network is the reference model: the one before training."""

    def enable_gradient_checkpointing(self) -> None:
        """From now on the network keeps few activations for its gradients and computes the others again.

        Raises:
            EtudeError: this policy's network cannot.
        """
        raise EtudeError(
            f"{type(self).__name__} has no gradient checkpointing: leave memory.gradient_checkpointing off."
        )

    @abstractmethod
    def add_lora(self, config: LoraConfig, seed: int) -> None:
        """Freezes the pipeline and adds a trainable fp32 adapter, drawn from `seed`."""

    @abstractmethod
    def train_everything(self, keep_reference: bool = True) -> None:
        """Full fine-tuning: every weight of the network is trained, in fp32.

        Args:
            keep_reference: keep a frozen copy of the network for `reference`, which otherwise raises EtudeError.
        """

    @abstractmethod
    def load_lora(self, directory: Path) -> None:
        """Loads an exported adapter, as the plain pipeline's `load_lora_weights(directory)` does."""

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Writes what was trained, in the form that the plain diffusers pipeline loads."""


@contextmanager
def swapped(parameters: dict[str, nn.Parameter], values: dict[str, Tensor] | None) -> Iterator[None]:
    """Inside, the parameters hold `values`; outside they are what they were, bit for bit. None swaps nothing."""
    if values is None:
        yield
        return
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assign(parameters, values)
    try:
        yield
    finally:
        assign(parameters, kept)


@torch.no_grad()
def assign(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copies `values` into the parameters of the same names.

    Raises:
        EtudeError: a value is missing or of another shape, as those of another model are; nothing is copied then.
    """
    for name, parameter in parameters.items():
        found = list(values[name].shape) if name in values else None
        if found != list(parameter.shape):
            problem = "has none" if found is None else f"has one of shape {found}"
            raise EtudeError(
                f"the model has a parameter '{name}' of shape {list(parameter.shape)}, and what was saved {problem}: it is of "
                "another model or LoRA rank; start anew in another --out."
            )
    for name, parameter in parameters.items():
        parameter.copy_(part(values[name], parameter))

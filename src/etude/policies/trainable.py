"""The model as a trainer sees it: its trained weights, its adapter, the model before training, and what it leaves for diffusers.

A policy wraps a diffusers pipeline that stays a diffusers pipeline: nothing of it is copied or renamed, so what is trained
here is what the plain pipeline loads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.policies.sharding import part
from etude.policies.source import ModelSource
from etude.sampling.model import Policy


class TrainablePolicy(Policy):
    """A policy whose network can be trained, measured against the model before training, and exported.

    Attributes:
        network: the denoiser, possibly wrapped by Accelerate: every forward that needs gradients goes through it.
        source: where the model was loaded from. None for a policy that was made around a pipeline.
        adapter: directory of the adapter that was loaded on top. None where there is none.
        shift: of a flow model's levels, where it is not the published pipeline's own; already part of `path`.
        revision: the commit of the hub repository that the model was read from; None for what was on disk.
    """

    network: nn.Module
    source: ModelSource | None = None
    adapter: Path | None = None
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

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Context manager inside which the network is the reference model: the one before training."""

    @property
    def has_reference(self) -> bool:
        """Whether `reference` is another model than the policy itself. Default: something is trained."""
        return bool(self.trainable())

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

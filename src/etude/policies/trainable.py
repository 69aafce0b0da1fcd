"""The trainer's view of a model: trained weights, adapter, model before training, and export."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.policies.attention import AttentionBackend
from etude.policies.sharding import part
from etude.policies.source import ModelSource
from etude.sampling.model import Policy


class TrainablePolicy(Policy):
    """A policy whose network can be trained, measured against the model before training, and exported.

    The pipeline stays a diffusers pipeline: no code or weight of it is copied or renamed, so the
    plain pipeline loads the weights that were trained here.

    Attributes:
        network: the denoiser, possibly wrapped by Accelerate: every forward that needs gradients goes through it.
        source: where the model was loaded from. None for a policy that was made around a pipeline.
        adapter: directory of the adapter that was loaded on top. None where there is none.
        shift: of a flow model's levels, where it is not the published pipeline's own; already part of `path`.
        revision: the commit of the hub repository that the model was read from; None for what was on disk.
        in_training: whether it was made trainable: its weights need no longer be those that were loaded.
        attention: the attention kernels that its network may take.
        compilation: how its network was compiled, in words.
        autocast: whether a half-precision network computes under autocast.
    """

    network: nn.Module
    source: ModelSource | None = None
    adapter: Path | None = None
    shift: float | None = None
    revision: str | None = None
    in_training: bool = False
    attention: AttentionBackend = AttentionBackend()
    compilation: str | None = None
    autocast: bool = True

    @property
    @abstractmethod
    def export_name(self) -> str:
        """Directory of a run that holds the export: `lora`, or `model` after full fine-tuning."""

    @property
    def pipeline_name(self) -> str:
        """The diffusers class that loads the model."""
        return "DiffusionPipeline"

    @property
    def denoiser_names(self) -> tuple[str, str]:
        """Name of the denoiser in the pipeline, and name of its class in diffusers."""
        return "unet", "UNet2DConditionModel"

    def networks(self) -> dict[str, str]:
        """Name of the class of each part with weights, by the part's name in the pipeline."""
        return dict([self.denoiser_names])

    def loading_arguments(self) -> dict[str, Any]:
        """Arguments that the plain pipeline's `from_pretrained` needs beside the model's name."""
        return {}

    picture: ClassVar[str] = ".images[0]"
    """First picture of what the plain pipeline's call returns, as Python."""

    def call_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """Arguments, beside prompt and steps, with which the plain pipeline does the same."""
        return {"guidance_scale": guidance_scale}

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Context in which the network is the reference model: the model before training."""

    @property
    def has_reference(self) -> bool:
        """Whether `reference` is another model than the policy itself. Default: something is trained."""
        return bool(self.trainable())

    def enable_gradient_checkpointing(self) -> None:
        """Lets the network keep few activations and recompute the rest. Default: EtudeError."""
        name = type(self).__name__
        raise EtudeError(f"{name} has no gradient checkpointing: leave memory.gradient_checkpointing off.")

    def check_compile(self, how: str) -> None:
        """Raises EtudeError where `compile` would. Default: always."""
        raise EtudeError(f"{type(self).__name__} cannot be compiled: set compile to off.")

    def compile(self, how: str) -> None:
        """Compiles the network after it was made trainable, as the setting `compile` says. Default: EtudeError."""
        raise EtudeError(f"{type(self).__name__} cannot be compiled: set compile to off.")

    def leave_autocast(self) -> None:
        """Computes in the network's own half precision alone, its adapter cast for each call. Default: EtudeError."""
        raise EtudeError(f"{type(self).__name__} has no adapter to cast: set autocast to true.")

    def use_channels_last(self) -> None:
        """Lays the weights of convolutions out channel by channel. Default: EtudeError."""
        raise EtudeError(f"{type(self).__name__} has no layout of channels: set channels_last to false.")

    @abstractmethod
    def add_lora(self, config: LoraConfig, seed: int) -> None:
        """Freezes the pipeline and adds a trainable float32 adapter, initialised from `seed`."""

    def continue_lora(self, place: Path) -> None:
        """Loads an adapter as `load_lora` does, and makes the network's part trainable, in float32.

        The parts of the adapter on text encoders stay as they are. The reference model is the model
        without any of it. Default: EtudeError.
        """
        raise EtudeError(f"{type(self).__name__} cannot train on from an adapter: leave out lora.init.")

    @abstractmethod
    def train_everything(self, keep_reference: bool = True) -> None:
        """Makes every weight of the network trainable, in float32: full fine-tuning.

        Without the frozen copy that `keep_reference` keeps, `reference` raises EtudeError.
        """

    @abstractmethod
    def load_lora(self, directory: Path) -> None:
        """Loads an exported adapter, as the plain pipeline's `load_lora_weights(directory)` does."""

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Writes the trained weights in the form that the plain diffusers pipeline loads."""


@contextmanager
def swapped(parameters: dict[str, nn.Parameter], values: dict[str, Tensor] | None) -> Iterator[None]:
    """Context in which the parameters hold `values`; then the old ones return, bit for bit."""
    if values is None:
        yield
        return
    backup = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assign(parameters, values)
    try:
        yield
    finally:
        assign(parameters, backup)


@torch.no_grad()
def assign(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copies `values` into the parameters of the same names.

    Raises:
        EtudeError: a value is missing or has another shape; no parameter has changed then.
    """
    for name, parameter in parameters.items():
        shape = list(values[name].shape) if name in values else None
        if shape != list(parameter.shape):
            problem = "hold none" if shape is None else f"hold one of shape {shape}"
            raise EtudeError(
                f"the model has a parameter '{name}' of shape {list(parameter.shape)}, but the saved weights {problem}: they "
                "belong to another model or LoRA rank; start anew in another --out."
            )
    for name, parameter in parameters.items():
        parameter.copy_(part(values[name], parameter))

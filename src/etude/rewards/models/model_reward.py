"""What rewards that run a network share: options inside the name, weights at first use, device, batches."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from etude.batching import MicroBatch, Progress
from etude.errors import EtudeError, brief, unknown
from etude.rewards.models.weights import check_source, revision_read

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelReward(ABC):
    """A frozen network as a reward: images uint8 `[n, 3, h, w]` and prompts to float32 `[n]`.

    Making one costs nothing: `load`, or the first call, fetches and reads the weights. Images are preprocessed one by one with
    PIL on the CPU, as the published code of each model does, and scored in batches. A batch that does not fit into the device's memory is
    halved, with a warning, and the size stays so.

    Args:
        model: the weights: a hub id (`owner/name`, `owner/name@revision`), a directory or a `.safetensors` file. Published defaults are
            pinned to a commit where one is known for certain; `revisions` tells which was read.
        base: the checkpoint that gives what `model` does not hold (tokenizer, image processor, and as each reward says).
            Default: `model` itself where it is a local directory with those files, else the published one.
        batch_size: images per forward pass.
        dtype: of the network: float32, bfloat16 or float16. Scores are computed from its outputs in float32.
        device: default: that of the images if it is no CPU, else the one that Accelerate gave to this process, else CUDA where
            there is one, so that it is the policy's.

    Raises:
        EtudeError: a path that does not exist, a pickle, a batch size below 1, an unknown dtype or device.
    """

    MODEL: ClassVar[str]
    BASE: ClassVar[str]
    BASE_FILES: ClassVar[tuple[str, ...]] = ()  # with these, a local directory is its own `base`

    def __init__(
        self, model: str = "", *, base: str = "", batch_size: int = 16, dtype: str = "float32", device: str = ""
    ) -> None:
        self.model = model or self.MODEL
        self.base = base or (self.model if self._holds_base() else self.BASE)
        for source in (self.model, self.base):
            check_source(source)
        if batch_size < 1:
            raise EtudeError(f"batch_size = {batch_size}: a forward pass takes at least 1 image.")
        if dtype not in DTYPES:
            raise unknown("dtype of a reward", dtype, DTYPES)
        try:
            self.device = torch.device(device) if device else None
        except RuntimeError as error:
            raise EtudeError(f"device = '{device}' is none: {brief(error, 100)}") from error
        self.batches = MicroBatch(batch_size, f"batch_size of the reward {type(self).__name__}")
        self.dtype = DTYPES[dtype]
        self.network: Any = None

    @classmethod
    def from_options(cls, text: str = "") -> Self:
        """From what follows the colon of a reward's name: `model`, `key=value`, or several of them with commas.

        Raises:
            EtudeError: an unknown option, or a value that cannot be one.
        """
        parameters = inspect.signature(cls).parameters
        options: dict[str, Any] = {}
        for i, part in enumerate(text.split(",") if text else []):
            key, equals, value = part.partition("=")
            if i == 0 and (not equals or "/" in key):  # a path may hold an equals sign, an option's name no slash
                key, value = "model", part
            elif key not in parameters:
                raise unknown(f"option of the reward {cls.__name__}", key, parameters)
            try:
                options[key] = int(value) if isinstance(parameters[key].default, int) else value
            except ValueError as error:
                raise EtudeError(f"{key} = '{value}' of the reward {cls.__name__} must be a whole number.") from error
        return cls(**options)

    @property
    def batch_size(self) -> int:
        """Images per forward pass: what was asked for, or what is left of it after halving."""
        return self.batches.size

    def load(self) -> None:
        """Fetches and reads the weights, once; calling it before a run makes a missing checkpoint an error before it.

        Raises:
            EtudeError: if a checkpoint is neither on disk nor on a hub within reach, or holds other weights.
        """
        if self.network is None:
            self.network = self._load().to(dtype=self.dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
        self.load()
        device = self._place(images)
        self.network.to(device)
        scores = torch.zeros(len(prompts))

        def work(rows: slice, _: Progress) -> None:
            scores[rows] = self._score(images[rows].cpu(), prompts[rows], device).float().cpu()

        self.batches.run(len(prompts), work)
        return scores

    def offload(self) -> None:
        """Moves the networks to the CPU, where they wait until the next call: what `memory.offload` asks for after each use."""
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to("cpu")
        clear_device_cache()

    def revisions(self) -> dict[str, str]:
        """The hub repositories that were read, as they were named, and the commit of each."""
        return {source: found for source in (self.model, self.base) if (found := revision_read(source))}

    def _holds_base(self) -> bool:
        path = Path(os.path.expanduser(self.model))
        return bool(self.BASE_FILES) and all((path / name).is_file() for name in self.BASE_FILES)

    def _place(self, images: Tensor) -> torch.device:
        if self.device is not None:
            return self.device
        if images.device.type != "cpu":
            return images.device
        from accelerate.state import PartialState, is_initialized

        if is_initialized():
            return torch.device(PartialState().device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @abstractmethod
    def _load(self) -> nn.Module:
        """The network, and whatever else `_score` needs kept on `self`."""

    @abstractmethod
    def _score(self, images: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        """Scores `[n]` of one batch of uint8 images on the CPU; the network is on `device`."""

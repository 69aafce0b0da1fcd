"""Base of rewards that run a network: options, weights at first use, device, batches."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from accelerate.state import PartialState, is_initialized
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from etude.batching import MicroBatch, Progress
from etude.errors import EtudeError, brief, unknown
from etude.rewards.models.weights import TEXT_FILES, check_source, revision_read

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelReward(ABC):
    """A frozen network as a reward: images uint8 `[n, 3, h, w]` and prompts to float32 `[n]`.

    The weights are read by `load`, or at the first call. Images are preprocessed one by one with
    PIL on the CPU, as in the published code of each model, and scored in batches (`MicroBatch`).

    The checkpoints of three authors are pickles, which etude does not read. There the default
    `model` is a hub repository `RE-N-Y/...` with the same tensors in safetensors, used by the
    package imscore. It is not the author's, is not pinned to a commit, and no licence is known: see
    its card.

    Args:
        model: the weights: a hub id (`owner/name`, `owner/name@revision`), a directory or a
            `.safetensors` file. Published defaults are pinned to a commit where one is known for
            certain; `revisions` tells which commit was read.
        base: the checkpoint for the parts that `model` lacks (tokenizer, image processor, and
            others that each reward names). Default: `model` itself if it is a local directory with
            those files, else the published one.
        batch_size: images per forward pass.
        dtype: dtype of the network: float32, bfloat16 or float16. Scores are computed from its
            outputs in float32.
        device: device of the network. Default: the policy's, which is the images' device if that is
            no CPU, else the device that Accelerate gave to this process, else CUDA if there is one.

    Raises:
        EtudeError: a path does not exist, a file is a pickle, the batch size is below 1, or the
            dtype or device is unknown.
    """

    MODEL: ClassVar[str]
    BASE: ClassVar[str]
    BASE_FILES: ClassVar[tuple[str, ...]] = ()  # a local directory with these is its own `base`

    def __init__(
        self, model: str = "", *, base: str = "", batch_size: int = 16, dtype: str = "float32", device: str = ""
    ) -> None:
        self.model = model or self.MODEL
        own = [Path(os.path.expanduser(self.model)) / name for name in self.BASE_FILES]
        self.base = base or (self.model if own and all(file.is_file() for file in own) else self.BASE)
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
        """Builds the reward from the text after the colon of its name: `model,key=value,...`."""
        parameters = inspect.signature(cls).parameters
        options: dict[str, Any] = {}
        for i, part in enumerate(text.split(",") if text else []):
            key, equals, value = part.partition("=")
            if i == 0 and (not equals or "/" in key):  # a path may hold '=', an option no '/'
                key, value = "model", part
            elif key not in parameters:
                raise unknown(f"option of the reward {cls.__name__}", key, parameters)
            if key in options:
                raise EtudeError(f"option {key} of the reward {cls.__name__} stands twice in '{text}': leave one out.")
            try:
                options[key] = int(value) if isinstance(parameters[key].default, int) else value
            except ValueError as error:
                raise EtudeError(f"{key} = '{value}' of the reward {cls.__name__} must be a whole number.") from error
        return cls(**options)

    @property
    def batch_size(self) -> int:
        """Images per forward pass: the configured number, or less after halving."""
        return self.batches.size

    def load(self) -> None:
        """Fetches and reads the weights, once; an `EtudeError` says what is missing."""
        if self.network is None:
            self.network = self._load().to(dtype=self.dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
        self.load()
        device = self._place(images)
        self.network.to(device)
        scores = torch.zeros(len(prompts), dtype=torch.float32)

        def work(rows: slice, _: Progress) -> None:
            scores[rows] = self._score(images[rows].cpu(), prompts[rows], device).float().cpu()

        self.batches.run(len(prompts), work)
        return scores

    def offload(self) -> None:
        """Moves the networks to the CPU until the next call, for `memory.offload`."""
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to("cpu")
        clear_device_cache()

    def sources(self) -> list[str]:
        """`model` and `base`, each once."""
        return list(dict.fromkeys([self.model, self.base]))

    def files(self) -> dict[str, Path]:
        """The files of `model` and `base`, where they are on the disk and not on the hub."""
        found: dict[str, Path] = {}
        for source in self.sources():
            place = Path(os.path.expanduser(source))
            inside = [path for pattern in (*TEXT_FILES, "*.safetensors") for path in sorted(place.glob(pattern))]
            found |= {str(path): path for path in ([place] if place.is_file() else inside)}
        return found

    def revisions(self) -> dict[str, str]:
        """The commit of each hub repository that was read, by its name in the options."""
        return {source: commit for source in self.sources() if (commit := revision_read(source))}

    def _place(self, images: Tensor) -> torch.device:
        if self.device is not None:
            return self.device
        if images.device.type != "cpu":
            return images.device
        if is_initialized():
            return torch.device(PartialState().device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @abstractmethod
    def _load(self) -> nn.Module:
        """Returns the network; sets the other attributes that `_score` needs."""

    @abstractmethod
    def _score(self, images: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        """Scores `[n]` of one batch of uint8 images on the CPU; the network is on `device`."""

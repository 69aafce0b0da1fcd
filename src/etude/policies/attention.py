"""The attention kernels that a network may take, by what is known to work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from etude.errors import EtudeError, brief

KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "math": [SDPBackend.MATH],
}
SOUND = ["flash", "efficient", "math"]
"""Kernels of `auto` on a GPU. cuDNN's fails, or gives NaN, in the backward of FLUX.1 in bfloat16 (seen with torch 2.11 on an H100)."""
_REFUSALS = ("No available kernel", "No viable backend", "mha_graph", "cuDNN Frontend", "No valid execution plans")
"""Parts of torch's errors that say that no allowed kernel computes a call."""


@dataclass(frozen=True)
class AttentionBackend:
    """The kernels from which torch chooses one for each call of `scaled_dot_product_attention`.

    auto: on a GPU flash, efficient or math, on a CPU torch's own choice. Any other name allows that
    kernel alone.
    """

    name: str = "auto"

    def kernels(self, device: torch.device) -> list[str]:
        """The names of the allowed kernels; empty: torch chooses among all."""
        if self.name == "auto":
            return SOUND if device.type == "cuda" else []
        return [self.name]

    def text(self, device: torch.device) -> str | None:
        """The choice in words, for a summary; None: torch chooses."""
        *others, last = self.kernels(device) or [""]
        return f"{self.name}: {', '.join(others)}{' or ' * bool(others)}{last}" if last else None

    @contextmanager
    def allowed(self, device: torch.device, part: str) -> Iterator[None]:
        """Context in which the network `part` takes the allowed kernels.

        Raises:
            EtudeError: none of them computes an attention of the network.
        """
        kernels = [kernel for name in self.kernels(device) for kernel in KERNELS[name]]
        try:
            with sdpa_kernel(kernels) if kernels else nullcontext():
                yield
        except RuntimeError as error:
            if any(refusal in str(error) for refusal in _REFUSALS):
                raise EtudeError(
                    f"attention.backend = {self.name} cannot compute the attention of the {part} ({brief(error, 200)}): "
                    "set attention.backend to efficient or math."
                ) from error
            raise

"""JPEG size: the two compressibility rewards of DDPO (arXiv 2305.13301, section 5.1)."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

QUALITY = 95


def jpeg_incompressibility(images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
    """Size of each image as a JPEG of quality 95, in kB of 1000 bytes: uint8 `[n, 3, h, w]` to `[n]`."""
    sizes = []
    for image in images:
        buffer = BytesIO()
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(len(buffer.getvalue()) / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


def jpeg_compressibility(images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
    """Minus the size of each image, of `jpeg_incompressibility`."""
    return -jpeg_incompressibility(images, prompts, **metadata)

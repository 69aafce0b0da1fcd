"""Preprocessing of the published scorers: resized by PIL (bicubic, antialiased), normalised as
CLIP's.

Sizes and offsets are computed as in torchvision, which the published code calls. The rounding is
part of the score: a tensor resize, or another library's centre crop, shifts some images by a pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def pictures(images: Tensor) -> list[Image.Image]:
    """uint8 `[n, 3, h, w]` to RGB pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]


def crop_to_square(images: Tensor, size: int) -> Tensor:
    """Resizes the shorter side to `size` (the longer to its floor) and crops the centre.

    Returns:
        float32 `[n, 3, size, size]`.
    """
    return _normalise(images, partial(_crop, size=size))


def pad_to_square(images: Tensor, size: int) -> Tensor:
    """Resizes the longer side to `size` (the shorter is rounded) and adds black bars.

    Returns:
        float32 `[n, 3, size, size]`.
    """
    return _normalise(images, partial(_pad, size=size))


def _normalise(images: Tensor, fit: Callable[[Image.Image], Image.Image]) -> Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(fit(picture)) for picture in pictures(images)]))
    unit = pixels.permute(0, 3, 1, 2).float() / 255
    return (unit - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _crop(picture: Image.Image, size: int) -> Image.Image:
    width, height = picture.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def _pad(picture: Image.Image, size: int) -> Image.Image:
    scale = size / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    square = Image.new("RGB", (size, size))
    square.paste(picture.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return square

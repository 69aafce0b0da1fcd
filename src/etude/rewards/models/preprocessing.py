"""Preprocessing of the published scorers: bicubic by PIL (antialiased), normalised as CLIP's.

Sizes and offsets are computed as in torchvision, which the published code calls. The rounding is
part of the score: a tensor resize, or another library's centre crop, shifts some images by a pixel.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def pictures(images: Tensor) -> list[Image.Image]:
    """Converts uint8 images `[n, 3, h, w]` to PIL's RGB pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]


def crop_to_square(images: Tensor, size: int) -> Tensor:
    """Resizes the shorter side to `size` (the longer to its floor), crops the centre, normalises."""
    squares = []
    for picture in pictures(images):
        width, height = picture.size
        short = min(width, height)
        width, height = size * width // short, size * height // short
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        squares.append(resized.crop((left, top, left + size, top + size)))
    return _normalise(squares)


def pad_to_square(images: Tensor, size: int) -> Tensor:
    """Resizes the longer side to `size` (the shorter is rounded), adds black bars, normalises."""
    squares = []
    for picture in pictures(images):
        scale = size / max(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        square = Image.new("RGB", (size, size))
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        square.paste(resized, ((size - width) // 2, (size - height) // 2))
        squares.append(square)
    return _normalise(squares)


def _normalise(squares: list[Image.Image]) -> Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares]))
    unit = pixels.permute(0, 3, 1, 2).float() / 255
    return (unit - torch.tensor(MEAN, dtype=torch.float32).view(3, 1, 1)) / torch.tensor(STD, dtype=torch.float32).view(
        3, 1, 1
    )

"""Image files of a pool: pixels as PNG, and pictures from anywhere as pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from etude.errors import EtudeError, brief

LARGEST_FILE = 64 << 20
LARGEST_SIDE = 8192
"""Bytes of an image's file and pixels of its side, at most."""


def encode_pictures(pixels: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> list[bytes]:
    """uint8 images `[n, 3, h, w]` as PNG files, without a word of where they come from."""
    files = []
    for each in pixels:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(each.transpose(1, 2, 0))).save(buffer, format="PNG", compress_level=4)
        files.append(buffer.getvalue())
    return files


def open_picture(data: bytes, name: str) -> Image.Image:
    """An image file from anywhere as RGB pixels, its size checked before it is unpacked.

    It is turned as its EXIF orientation says, and what is transparent shows white.

    Raises:
        EtudeError: the file is no PNG, JPEG or WebP image of 8 bits a channel, is damaged, or is too large.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"])
        if max(picture.size) > LARGEST_SIDE:
            raise EtudeError(
                f"the image {name} is of size {picture.size}: sides of at most {LARGEST_SIDE} pixels are read; make it smaller."
            )
        if picture.mode[0] in "IF":
            raise EtudeError(f"the image {name} has more than 8 bits a channel: save it with 8.")
        picture = ImageOps.exif_transpose(picture)
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, EtudeError):
            raise
        raise EtudeError(f"the image {name} cannot be read as PNG, JPEG or WebP ({brief(error, 80)}).") from None

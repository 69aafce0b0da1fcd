"""Pairs of images that people compared, from a file with the field names of Pick-a-Pic.

One JSON object a line:

    caption              the prompt
    image_0, image_1     image files, relative to the file of pairs; or
    jpg_0, jpg_1         the encoded images themselves (JPEG, PNG, WebP) in base64
    label_0, label_1     1 for the preferred image, 0 for the other, 0.5 each for a tie

Other fields are ignored. A tie prefers neither image and is left out.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from etude.errors import EtudeError, brief, brief_value

LONGEST = 1 << 30
"""Largest size of a file of pairs in bytes."""
LARGEST_IMAGE = 1 << 26
"""Largest number of pixels of an image."""
_LABELS = {(1.0, 0.0): 0, (0.0, 1.0): 1, (0.5, 0.5): None}


@dataclass(frozen=True)
class Pair:
    """A preference: the prompt and two images, files or encoded bytes; `place`, file and line, is for errors."""

    caption: str
    preferred: Path | bytes
    other: Path | bytes
    place: str

    def images(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Both images as uint8 `[height, width, 3]`, cropped in the middle and resized; EtudeError if unreadable."""
        return _pixels(self.preferred, height, width, self.place), _pixels(self.other, height, width, self.place)


def load_pairs(source: str) -> list[Pair]:
    """The preferences of a file in its order, without ties.

    EtudeError if the file cannot be read, a line is no preference, or no preference is left.
    """
    path = Path(source).expanduser()
    if "\0" in source or not path.is_file():
        raise EtudeError(f"file of pairs '{source}' does not exist: give a JSONL file of preferences.")
    if path.stat().st_size > LONGEST:
        raise EtudeError(
            f"file of pairs '{source}' is longer than {LONGEST >> 20} MiB: name images by image_0 and image_1."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise EtudeError(f"file of pairs '{source}' cannot be read as UTF-8 text ({brief(error, 80)}).") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    found = [_pair(line, path.parent, f"file of pairs '{source}', line {number}") for number, line in lines]
    pairs = [pair for pair in found if pair is not None]
    if not pairs:
        raise EtudeError(f"file of pairs '{source}' holds no preference: all of its {len(found)} lines are ties.")
    return pairs


def _pair(line: str, folder: Path, place: str) -> Pair | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EtudeError(f"{place}: it is not JSON ({brief(error, 80)}); write one object a line.") from None
    if not isinstance(record, dict):
        raise EtudeError(f"{place}: it is {brief_value(record)}; write an object with caption, images and labels.")
    caption = record.get("caption")
    if not isinstance(caption, str) or not caption.strip() or "\0" in caption:
        raise EtudeError(f"{place}: its caption is {brief_value(caption)}; give a text that is not empty.")
    labels = record.get("label_0"), record.get("label_1")
    if not all(isinstance(label, int | float) for label in labels) or labels not in _LABELS:
        raise EtudeError(
            f"{place}: label_0 and label_1 are {brief_value(list(labels))}; give 1 and 0, 0 and 1, or 0.5 twice."
        )
    images = [_image(record, k, folder, place) for k in (0, 1)]
    best = _LABELS[labels]  # type: ignore[index]
    return None if best is None else Pair(caption.strip(), images[best], images[1 - best], place)


def _image(record: dict[str, Any], k: int, folder: Path, place: str) -> Path | bytes:
    name, encoded = record.get(f"image_{k}"), record.get(f"jpg_{k}")
    if isinstance(name, str) and name and "\0" not in name:
        path = folder / name
        if not path.is_file():
            raise EtudeError(f"{place}: image_{k} = {brief_value(name)} is no file beside the file of pairs.")
        return path
    if isinstance(encoded, str) and encoded:
        try:
            return base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise EtudeError(f"{place}: jpg_{k} is not base64 ({brief(error, 60)}).") from None
    raise EtudeError(f"{place}: it has neither image_{k}, a file, nor jpg_{k}, an image in base64.")


def _pixels(image: Path | bytes, height: int, width: int, place: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            if opened.width * opened.height > LARGEST_IMAGE:
                raise ValueError(f"{opened.width} x {opened.height} pixels are too many")
            fitted = ImageOps.fit(opened.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except Exception as error:  # Pillow's readers raise whatever their formats do
        name = "an image in base64" if isinstance(image, bytes) else f"image '{image.name}'"
        raise EtudeError(f"{place}: {name} cannot be read ({brief(error, 80)}).") from None
    return np.asarray(fitted)

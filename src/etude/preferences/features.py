"""Frozen features of images and prompts, in which a reward is linear; computed once for a pool.

    embedded    EfficientNet-Lite0's pooled features; the products of the `alignment` heads' image
                and text embeddings (text by MiniLM); 11 statistics of colour and sharpness
    pickscore   PickScore's image embedding, and its products with the text embedding
    clip:MODEL  the same of any CLIP in a directory or on the hub

The products let the reward depend on how an image shows its prompt: their sum is the cosine. Each
kind of features is a block; a fit gives every block the same share of the variance, so that few
features are heard beside many.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etude.batching import Progress
from etude.errors import EtudeError, unknown
from etude.files import atomic_write_bytes
from etude.preferences.pool import Pool, PoolImage
from etude.rewards.alignment import BATCH_SIZE, Alignment
from etude.rewards.models.clip import Cosine, PickScore, image_embedding
from etude.rewards.models.weights import read_tensors

BACKBONES = ("embedded", "pickscore", "clip")
_CHUNK, _SAVE_EVERY = 64, 2048


class Backbone(Protocol):
    """Frozen networks: `describe` maps uint8 images `[n, 3, h, w]` and n prompts to blocks, float32
    `[n, D_1]`, `[n, D_2]`...
    """

    def describe(self, images: Tensor, prompts: list[str]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Features:
    """Features of a pool's images.

    Attributes:
        images: numbers of the images in the pool, ascending, `[n]`.
        values: float32 `[n, D]`.
        blocks: number of features of each kind; their sum is D.
    """

    images: NDArray[np.int64]
    values: NDArray[np.float32]
    blocks: tuple[int, ...]

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.intp]:
        """The rows of images by their numbers."""
        return np.searchsorted(self.images, numbers)


def load_backbone(name: str) -> Backbone:
    """The networks of a name of `BACKBONES`.

    Raises:
        EtudeError: the name is unknown, or the weights cannot be read.
    """
    kind, _, model = name.partition(":")
    if kind not in BACKBONES or (model and kind != "clip"):
        raise unknown("backbone of preferences", name, BACKBONES)
    if kind == "embedded":
        return _Embedded()
    if kind == "clip" and not model:
        raise EtudeError("the backbone clip needs a model: give clip:DIRECTORY or clip:owner/name.")
    backbone = _Clip(model, base=model)
    backbone.load()
    return backbone


def pool_features(pool: Pool, name: str, advance: Callable[[int, int], None] = lambda done, total: None) -> Features:
    """The features of all images of a pool, from its cache; new images are added to it.

    Args:
        pool: the images.
        name: the backbone.
        advance: called with the number of images just done, and of all.

    Raises:
        EtudeError: as in `load_backbone`, or an image or the cache cannot be read.
    """
    path = pool.root / "features" / f"{_file_name(name)}.safetensors"
    images = pool.images()
    numbers = np.array([image.id for image in images], np.int64)
    cached = read_tensors(path) if path.is_file() else {}
    done: NDArray[np.int64] = cached["images"].numpy() if "images" in cached else np.zeros(0, np.int64)
    whole = not cached or cached.keys() == {"images", "values", "blocks"}
    if not whole or not np.array_equal(done, numbers[: len(done)]):
        raise EtudeError(f"the cache '{path}' is of other images: remove it, and it is computed anew.")
    values = [cached["values"].numpy()] if cached else []
    blocks = tuple(cached["blocks"].tolist()) if cached else ()
    advance(len(done), len(images))
    if len(done) < len(images):
        backbone = load_backbone(name)
        for start in range(len(done), len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            rows, blocks = _describe(pool, backbone, chunk)
            values.append(rows)
            advance(len(chunk), len(images))
            end = start + len(chunk)
            if end == len(images) or (end - len(done)) % _SAVE_EVERY == 0:
                values = [np.concatenate(values)]
                _save(path, numbers[:end], values[0], blocks)
    return Features(numbers, np.concatenate(values) if values else np.zeros((0, 0), np.float32), blocks)


def _file_name(backbone: str) -> str:
    """A file name for a backbone: its own name, or a part of it and a digest that no other name has."""
    plain = re.sub(r"[^a-zA-Z0-9.-]+", "-", backbone)
    return plain if plain == backbone else f"{plain[:80]}-{hashlib.sha256(backbone.encode()).hexdigest()[:12]}"


def _describe(pool: Pool, backbone: Backbone, images: list[PoolImage]) -> tuple[NDArray[np.float32], tuple[int, ...]]:
    pixels = [pool.pixels(image.digest) for image in images]
    rows: list[NDArray[Any]] = []
    sizes: tuple[int, ...] = ()
    for _, group in groupby(range(len(images)), key=lambda i: pixels[i].shape):
        chosen = list(group)
        batch = torch.from_numpy(np.stack([pixels[i] for i in chosen]))
        blocks = backbone.describe(batch, [images[i].prompt for i in chosen])
        sizes = tuple(block.shape[1] for block in blocks)
        rows.append(torch.cat(blocks, dim=1).float().numpy())
    return np.concatenate(rows), sizes


def _save(path: Any, numbers: NDArray[np.int64], values: NDArray[np.float32], blocks: tuple[int, ...]) -> None:
    from safetensors.torch import save

    path.parent.mkdir(exist_ok=True)
    tensors = {"images": torch.from_numpy(numbers), "values": torch.from_numpy(values), "blocks": torch.tensor(blocks)}
    atomic_write_bytes(path, save(tensors))


def statistics(images: Tensor) -> Tensor:
    """Mean and standard deviation of red, green, blue and of the opponent channels R - G and (R + G)
    / 2 - B, and the mean step between neighbouring pixels: `[n, 11]`, of uint8 images `[n, 3, h, w]`.
    """
    x = images.float() / 255
    red, green, blue = x.unbind(1)
    channels = torch.stack([red, green, blue, red - green, (red + green) / 2 - blue], dim=1).flatten(2)
    grey = x.mean(dim=1)
    steps = grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))
    return torch.cat([channels.mean(dim=2), channels.std(dim=2), steps[:, None]], dim=1)


class _Embedded(Alignment):
    @torch.no_grad()
    def describe(self, images: Tensor, prompts: list[str]) -> list[Tensor]:
        self._embed_new([p for p in dict.fromkeys(prompts) if p not in self.embeddings])
        text = torch.stack([self.embeddings[p] for p in prompts])
        features, heads = self.features.to(images.device), self.heads.to(images.device)
        rows = [features(batch) for batch in images.split(BATCH_SIZE)]
        image = torch.cat([heads.embed_image(each) for each in rows]).cpu()
        return [torch.cat(rows).cpu(), image * text, statistics(images.cpu())]


class _Clip(Cosine):
    MODEL, BASE = PickScore.MODEL, PickScore.BASE

    def _scale(self, cosine: Tensor) -> Tensor:
        return cosine

    @torch.no_grad()
    def describe(self, images: Tensor, prompts: list[str]) -> list[Tensor]:
        self.load()
        device = self._place(images)
        self.network.to(device)
        rows: dict[int, list[Tensor]] = {}

        def work(part: slice, _: Progress) -> None:
            image = image_embedding(self.network, self._pixels(images[part].cpu()).to(device, self.dtype))
            unique = list(dict.fromkeys(prompts[part]))
            text = self._text(unique, device)[[unique.index(prompt) for prompt in prompts[part]]]
            rows[part.start] = [image.float().cpu(), (image * text).float().cpu()]

        self.batches.run(len(prompts), work)
        return [torch.cat(blocks) for blocks in zip(*(rows[start] for start in sorted(rows)), strict=True)]

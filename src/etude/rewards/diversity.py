"""Diversity of the images of one prompt: what a tuned model loses when it collapses.

For the n images of a prompt with frozen features f_i:

    diversity    d_i = 1 / (n - 1) sum_{j != i} (1 - cos(f_i, f_j)),      range [0, 2]
    vendi        exp(-sum_k l_k log l_k),  l the eigenvalues of K / n,  K_ij = cos(f_i, f_j),  range [1, n]

Every image gets a number, so that diversity is measured as a reward is: under any sampler, paired,
with intervals clustered by prompt, before and after training, with a stop on its fall. The mean of
d_i over a prompt's images is their mean pairwise distance, whose expectation does not depend on n.
The Vendi score (Friedman and Dieng 2022, arXiv 2210.02410) is the effective number of different
images. It grows with n, so only scores of equal n compare.

    diversity, vendi                 EfficientNet-Lite0's pooled features, which come with etude
    diversity:pixels                 root mean square difference of pixels in [0, 1], in place of 1 - cos
    diversity:clip, vendi:clip       CLIP ViT-B/32's image embedding
    diversity:dino, vendi:dino       DINOv2 ViT-B/14's class token (arXiv 2304.07193, Apache-2.0)
    diversity:clip:MODEL, :dino:...  that of any CLIP or DINOv2 in a directory or on the hub
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from etude.batching import Progress
from etude.errors import EtudeError, unknown
from etude.rewards.alignment import BATCH_SIZE, ImageFeatures
from etude.rewards.models.clip import CLIPScore, companion, image_embedding, preprocess
from etude.rewards.models.model_reward import ModelReward
from etude.rewards.models.weights import WEIGHT_FILES, fetch, load_pretrained

FEATURES = ("embedded", "pixels", "clip", "dino")


class EmbeddedFeatures:
    """EfficientNet-Lite0's pooled features as unit vectors, float32 `[n, 1280]`."""

    def __init__(self) -> None:
        self.network = ImageFeatures()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        network = self.network.to(images.device)
        rows = torch.cat([network(batch) for batch in images.split(BATCH_SIZE)])
        return nn.functional.normalize(rows, dim=-1).cpu()


class NetworkFeatures(ModelReward):
    """The features of a network from a checkpoint, which is found and held as that of a reward."""

    processor: Any

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Embed uint8 images `[n, 3, h, w]`, in batches, as unit vectors, float32 `[n, d]`."""
        self.load()
        device, rows = self._place(images), {}
        self.network.to(device)

        def work(part: slice, _: Progress) -> None:
            pixels = preprocess(self.processor, images[part].cpu()).to(device, self.dtype)
            rows[part.start] = self._vectors(pixels).cpu()

        self.batches.run(len(images), work)
        return torch.cat([rows[start] for start in sorted(rows)])

    @abstractmethod
    def _vectors(self, pixels: Tensor) -> Tensor:
        """Unit vectors, float32 `[n, d]`."""

    def _score(self, images: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        raise EtudeError(f"{type(self).__name__} are no scores: name diversity or vendi.")


class ClipFeatures(NetworkFeatures, CLIPScore):
    """The image embedding of a CLIP."""

    def _vectors(self, pixels: Tensor) -> Tensor:
        return image_embedding(self.network, pixels)


class DinoFeatures(NetworkFeatures):
    """The class token of a DINOv2."""

    MODEL = BASE = "facebook/dinov2-base@f9e44c814b77203eaa57a6bdbbd535f21ede1415"

    def __init__(self, model: str = "") -> None:
        super().__init__(model, base=model)

    def _load(self) -> nn.Module:
        from transformers import Dinov2Model

        network: nn.Module = load_pretrained(Dinov2Model, fetch(self.model, WEIGHT_FILES))
        self.processor = companion("image processor", self.base)
        return network

    def _vectors(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.network(pixel_values=pixels).pooler_output.float(), dim=-1)


NETWORKS: dict[str, type[NetworkFeatures]] = {"clip": ClipFeatures, "dino": DinoFeatures}
"""The features that are read from a checkpoint."""


class Spread(ABC):
    """A reward that compares the images of a prompt in a frozen feature space.

    Args:
        features: `embedded`, `pixels`, `clip`, `dino`, `clip:MODEL` or `dino:MODEL`.

    Raises:
        EtudeError: the features are unknown; from a call, a prompt has one image only.
    """

    whole_groups = True
    least_images = 2
    FEATURES: ClassVar[tuple[str, ...]] = FEATURES

    def __init__(self, features: str = "embedded") -> None:
        kind, _, model = features.partition(":")
        if kind not in self.FEATURES or (model and kind not in NETWORKS):
            raise unknown(f"features of {type(self).__name__.lower()}", features, self.FEATURES)
        self.kind = kind
        self.model = NETWORKS[kind](model) if kind in NETWORKS else None
        self.embedded = EmbeddedFeatures() if kind == "embedded" else None

    @classmethod
    def from_options(cls, text: str = "") -> Self:
        """Builds the reward from the text after the colon of its name."""
        return cls(text or "embedded")

    def load(self) -> None:
        """Loads the network's weights, if one from a checkpoint compares."""
        if self.model is not None:
            self.model.load()

    def offload(self) -> None:
        """Moves the network to the CPU until the next call."""
        if self.model is not None:
            self.model.offload()

    def sources(self) -> list[str]:
        """The places from which the network is read."""
        return [] if self.model is None else self.model.sources()

    def files(self) -> dict[str, Path]:
        """The files of the network on the disk."""
        return {} if self.model is None else self.model.files()

    def revisions(self) -> dict[str, str]:
        """The commit of the network that was read from the hub."""
        return {} if self.model is None else self.model.revisions()

    def __call__(self, images: Tensor, prompts: list[str], groups: list[int], **metadata: Any) -> Tensor:
        features, scores = self._features(images), torch.zeros(len(prompts))
        for group in dict.fromkeys(groups):
            rows = [i for i, each in enumerate(groups) if each == group]
            if len(rows) < 2:
                raise EtudeError(
                    f"there is one image of the prompt {prompts[rows[0]]!r}, and diversity compares the images of a prompt: "
                    "draw at least 2 of each, by images_per_prompt."
                )
            scores[rows] = self.spread(features[rows].double()).float()
        return scores

    def _features(self, images: Tensor) -> Tensor:
        if self.model is not None:
            return self.model.embed(images)
        return images.cpu().flatten(1).float() / 255 if self.embedded is None else self.embedded(images)

    @abstractmethod
    def spread(self, features: Tensor) -> Tensor:
        """The number of each image, fp64 `[n]`, from the features of a prompt's images, `[n, d]`."""


class Diversity(Spread):
    """Mean distance of an image to the other images of its prompt."""

    def spread(self, features: Tensor) -> Tensor:
        if self.kind == "pixels":
            distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
            distances = distances / features.shape[1] ** 0.5
        else:
            distances = (1 - features @ features.T).clamp(min=0).fill_diagonal_(0)
        return distances.sum(dim=1) / (len(features) - 1)


class Vendi(Spread):
    """Effective number of different images of a prompt, the same for each of them."""

    FEATURES = ("embedded", "clip", "dino")

    def spread(self, features: Tensor) -> Tensor:
        weights = torch.linalg.eigvalsh(features @ features.T / len(features)).clamp(min=0)
        weights = weights / weights.sum()
        entropy = -torch.special.xlogy(weights, weights).sum()
        return entropy.exp().expand(len(features))

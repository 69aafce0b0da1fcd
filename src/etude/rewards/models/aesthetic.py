"""LAION's aesthetic predictor: how pleasing a picture is by itself, whatever the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from etude.errors import EtudeError
from etude.rewards.models.clip import image_embedding, image_processor, processed
from etude.rewards.models.model_reward import ModelReward
from etude.rewards.models.weights import WEIGHT_FILES, fetch, pretrained, read_tensors, strip_prefix, weights_of


class ScoreHead(nn.Module):
    """The five linear layers d-1024-128-64-16-1 that the aesthetic predictor and ImageReward share.

    There is no non-linearity between them, and the dropout is for training; layers are numbered as published.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
        self.layers = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})

    def forward(self, features: Tensor) -> Tensor:
        """float32 `[n, d]` to `[n]`."""
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)

    @classmethod
    def of(cls, width: int, tensors: Mapping[str, Tensor], origin: Path) -> ScoreHead:
        """The head whose tensors are among `tensors`, under `layers.0.weight` or with anything before it.

        Raises:
            EtudeError: if they are not there or have other shapes.
        """
        head, found = cls(width), strip_prefix(tensors, "layers.7.weight")
        wanted = head.state_dict()
        for name, tensor in wanted.items():
            if name not in found or found[name].shape != tensor.shape:
                there = list(found[name].shape) if name in found else "nothing"
                raise EtudeError(
                    f"'{origin}' does not hold the score head {width}-1024-128-64-16-1: "
                    f"'{name}' must be {list(tensor.shape)}, and there is {there}."
                )
        head.load_state_dict({name: found[name].float() for name in wanted})
        return head.eval().requires_grad_(False)


class Aesthetic(ModelReward):
    """LAION's improved aesthetic predictor (sac+logos+ava1-l14-linearMSE), the aesthetic reward of DDPO, arXiv 2305.13301.

        score = MLP(f(image) / |f(image)|), MLP of ScoreHead with d = 768

    f is the projected image embedding of `openai/clip-vit-large-patch14` (`base`; the code of CLIP is MIT, the card of the weights states
    none) with its image processor; the head is by C. Schuhmann (github.com/christophschuhmann/improved-aesthetic-predictor, Apache-2.0). It
    regresses ratings of 1 to 10 and is not bounded; generated pictures score about 4.5 to 7. Prompts are ignored. The head is computed in
    float32.

    The published head is a pickle, which etude does not read; the default `model` is a hub repository that carries the same tensors in
    safetensors (`RE-N-Y/laion-aesthetic`, used by the package imscore; not the author's, not pinned, and no licence of its own is known:
    see its card), of which only the head is used.
    """

    MODEL = "RE-N-Y/laion-aesthetic"
    BASE = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"

    def _load(self) -> nn.Module:
        from transformers import CLIPModel

        weights = weights_of(fetch(self.model, ["*.safetensors"]))
        network = pretrained(CLIPModel, fetch(self.base, WEIGHT_FILES))
        self.head = ScoreHead.of(network.config.projection_dim, read_tensors(weights), weights)
        self.processor = image_processor(self.base)
        return nn.ModuleDict({"vision_model": network.vision_model, "visual_projection": network.visual_projection})

    def _score(self, images: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        pixels = processed(self.processor, images).to(device, self.dtype)
        return self.head.to(device)(image_embedding(self.network, pixels))

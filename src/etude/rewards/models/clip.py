"""Rewards that are the cosine of a CLIP image and text embedding: CLIPScore and PickScore."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from etude.errors import EtudeError, brief
from etude.rewards.models.model_reward import ModelReward
from etude.rewards.models.preprocessing import pictures
from etude.rewards.models.weights import TEXT_FILES, WEIGHT_FILES, fetch, load_pretrained

VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495b28150b8a4922ee1c8edee224c284c0c"


class Cosine(ModelReward):
    """cos(f(image), g(prompt)) of a `transformers.CLIPModel`, scaled as each subclass says.

    Prompts are cut to the text encoder's length (77 tokens in every published CLIP). Embeddings are
    normalised in float32.
    """

    BASE_FILES = ("preprocessor_config.json", "tokenizer_config.json")

    def _load(self) -> nn.Module:
        from transformers import CLIPModel

        network: nn.Module = load_pretrained(CLIPModel, fetch(self.model, WEIGHT_FILES))
        self.tokenizer, self.processor = (companion(what, self.base) for what in ("tokenizer", "image processor"))
        return network

    def _score(self, images: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        image = image_embedding(self.network, self._pixels(images).to(device, self.dtype))
        unique = list(dict.fromkeys(prompts))
        text = self._text(unique, device)[[unique.index(prompt) for prompt in prompts]]
        return self._scale((image * text).sum(-1))

    def _pixels(self, images: Tensor) -> Tensor:
        return preprocess(self.processor, images)

    def _text(self, prompts: list[str], device: torch.device) -> Tensor:
        # Padded to the full length, so that a row does not depend on the other prompts; the tokens
        # of a prompt do not see the padding behind them.
        tokens = tokenize(self.tokenizer, prompts, self.network.config.text_config.max_position_embeddings, device)
        pooled = self.network.text_model(**tokens).pooler_output
        return nn.functional.normalize(self.network.text_projection(pooled).float(), dim=-1)

    @abstractmethod
    def _scale(self, cosine: Tensor) -> Tensor:
        """The reward from the cosines `[n]`."""


class CLIPScore(Cosine):
    """CLIPScore, Hessel et al. 2021, arXiv 2104.08718.

        score = 2.5 max(cos(f(image), g("A photo depicts " + prompt)), 0)

    Model: `openai/clip-vit-base-patch32`, the paper's ViT-B/32, with its own image processor. The
    pinned commit holds a conversion to safetensors; the main branch has pickles only. Licence: the
    code of CLIP is MIT; the repository's card states none for the weights. Range [0, 2.5]; captions
    of photographs score about 0.6 to 0.9.

    Work on text-to-image models often reports 100 max(cos, 0) of another CLIP without the prefix.
    This is `clip_score:openai/clip-vit-large-patch14,prefix=` times 40.

    Args:
        prefix: text in front of each prompt.
    """

    MODEL = BASE = "openai/clip-vit-base-patch32@c237dc49a33fc61debc9276459120b7eac67e7ef"

    def __init__(
        self,
        model: str = "",
        *,
        base: str = "",
        batch_size: int = 16,
        dtype: str = "float32",
        device: str = "",
        prefix: str = "A photo depicts",
    ) -> None:
        base = base or model  # a CLIP checkpoint holds its own tokenizer, and no other fits it
        super().__init__(model, base=base, batch_size=batch_size, dtype=dtype, device=device)
        self.prefix = f"{prefix.strip()} " if prefix.strip() else ""

    def _text(self, prompts: list[str], device: torch.device) -> Tensor:
        return super()._text([self.prefix + prompt for prompt in prompts], device)

    def _scale(self, cosine: Tensor) -> Tensor:
        return 2.5 * cosine.clamp(min=0)


class PickScore(Cosine):
    """PickScore v1 (Kirstain et al. 2023, arXiv 2305.01569).

        score = exp(logit_scale) cos(f(image), g(prompt))

    Model: `yuvalkirstain/PickScore_v1`, a CLIP-ViT-H-14 tuned on Pick-a-Pic (licence: its model
    card states none). Tokenizer and image processor (`base`) are those of
    `laion/CLIP-ViT-H-14-laion2B-s32B-b79K` (MIT). exp(logit_scale) is about 100: range [-100, 100],
    in practice about 15 to 25. Some work divides the score by 26 to bring it near 1;
    group-normalised advantages do not change by this.
    """

    MODEL = "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800"
    BASE = VIT_H

    def _scale(self, cosine: Tensor) -> Tensor:
        scale: Tensor = self.network.logit_scale.float().exp()
        return scale * cosine


def image_embedding(network: Any, pixels: Tensor) -> Tensor:
    """The normalised projected image embedding of a CLIP network, float32 `[n, d]`."""
    pooled = network.vision_model(pixel_values=pixels).pooler_output
    return nn.functional.normalize(network.visual_projection(pooled).float(), dim=-1)


def preprocess(processor: Any, images: Tensor) -> Tensor:
    """Resizes, crops and normalises uint8 images as CLIP's processor does: float32 `[n, 3, size, size]`."""
    pixels: Tensor = processor(images=pictures(images), return_tensors="pt")["pixel_values"]
    return pixels


def tokenize(tokenizer: Any, prompts: list[str], length: int, device: torch.device) -> dict[str, Tensor]:
    """The ids and the attention mask of prompts that are cut or padded to a length."""
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


def companion(what: str, source: str) -> Any:
    """The "tokenizer" or the "image processor" (in its PIL form) of a checkpoint, or an `EtudeError`."""
    import transformers

    path = fetch(source, TEXT_FILES)
    try:
        kind = transformers.AutoTokenizer if what == "tokenizer" else transformers.CLIPImageProcessorPil
        return kind.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        remedy = "name a checkpoint that does by the reward's option `base`"
        raise EtudeError(f"'{path}' holds no {what} ({brief(error, 80)}); {remedy}.") from error

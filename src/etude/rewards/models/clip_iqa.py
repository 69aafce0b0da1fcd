"""CLIP-IQA: the quality of a picture without a reference, from a pair of opposite descriptions."""

from __future__ import annotations

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.rewards.models.clip import CLIPScore, Cosine, image_embedding


class CLIPIQA(Cosine):
    """CLIP-IQA, Wang, Chan and Loy 2022, arXiv 2207.12396.

        score = e^p / (e^p + e^n),    p, n = exp(logit_scale) cos(f(image), g(positive or negative))

    Prompts are ignored. Model: `openai/clip-vit-base-patch32`, at the commit of `clip_score` (licence:
    as there). The paper takes CLIP's ResNet-50 without its position embedding, on pictures of any
    size; here they are resized and cropped by the checkpoint's own processor, and the numbers are
    not the paper's. Range [0, 1].

    Args:
        positive: description of a good picture. Default: the paper's.
        negative: its opposite. "Sharp photo." and "Blurry photo." ask for sharpness alone.
    """

    MODEL = BASE = CLIPScore.MODEL

    def __init__(
        self,
        model: str = "",
        *,
        base: str = "",
        batch_size: int = 16,
        dtype: str = "float32",
        device: str = "",
        positive: str = "Good photo.",
        negative: str = "Bad photo.",
    ) -> None:
        super().__init__(model, base=base or model, batch_size=batch_size, dtype=dtype, device=device)
        if not positive.strip() or positive == negative:
            raise EtudeError(
                f"positive = '{positive}' and negative = '{negative}' of clip_iqa must be two descriptions."
            )
        self.descriptions = [positive, negative]

    def _score(self, images: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        image = image_embedding(self.network, self._pixels(images).to(device, self.dtype))
        return self._scale(image @ self._text(self.descriptions, device).T).softmax(dim=-1)[:, 0]

    def _scale(self, cosine: Tensor) -> Tensor:
        scale: Tensor = self.network.logit_scale.float().exp()
        return scale * cosine

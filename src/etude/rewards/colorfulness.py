"""Colourfulness: Hasler and Suesstrunk, "Measuring colourfulness in natural images", SPIE 5007, 2003."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def colorfulness(images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
    """Colourfulness of uint8 images `[n, 3, h, w]`: float32 `[n]`, 0 for any grey image.

        sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2),    rg = R - G,    yb = (R + G) / 2 - B

    This is the authors' metric M-hat(3), with population variances, on values 0..255.
    """
    red, green, blue = images.flatten(2).to(torch.float64).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])  # [2, n, pixels]
    spread = opponents.var(dim=-1, correction=0).sum(0).sqrt()
    offset = opponents.mean(dim=-1).square().sum(0).sqrt()
    return (spread + 0.3 * offset).float()

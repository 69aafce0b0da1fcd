"""`style:NAME`: the log odds that a picture is drawn in one of three art styles, without a download.

    style:s = log p_s / (1 - p_s) = z_s - log sum_{t != s} exp z_t,      z = W f(image) + b

f are means and standard deviations over the positions of four layers of the frozen EfficientNet-Lite0
that `alignment` has, too: as in style transfer (arXiv 1701.01036), statistics of shallow layers tell
texture and shading, and not what is shown. W and b are a logistic regression on the art of three emoji
sets (`python -m tools.zoo.style`), on which the embedded models were trained. Range: all numbers, in
nats; 0 where the style is as likely as not.

    style:noto       Noto Emoji, flat with shading
    style:twemoji    Twemoji, flat
    style:3d         Fluent Emoji, rendered
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from etude.errors import EtudeError, unknown
from etude.rewards.alignment import BATCH_SIZE, ImageFeatures

WEIGHTS = Path(__file__).parent.parent / "zoo" / "checkpoints" / "style" / "style.safetensors"
STYLES = ("noto", "twemoji", "3d")
LAYERS = (0, 2, 4, 10)
"""Blocks of the network, the last before each change of resolution, whose outputs are summed up."""


class StyleFeatures(ImageFeatures):
    """Mean and standard deviation of each channel of four layers, float32 `[n, 384]`, of uint8 images of any size."""

    def forward(self, images: Tensor) -> Tensor:
        x, rows = self.backbone._swish(self.backbone._bn0(self.backbone._conv_stem(self.pixels(images)))), []
        for index, block in enumerate(self.backbone._blocks[: LAYERS[-1] + 1]):
            x = block(x)
            if index in LAYERS:
                rows += [x.mean((2, 3)), x.std((2, 3))]
        return torch.cat(rows, dim=1)


def log_odds(logits: Tensor, style: int) -> Tensor:
    """`z_s - log sum_{t != s} exp z_t` of logits `[n, k]`, for the class s: `[n]`."""
    others = torch.cat([logits[:, :style], logits[:, style + 1 :]], dim=1)
    return logits[:, style] - others.logsumexp(1)


class Style:
    """The reward of one style: images uint8 `[n, 3, h, w]`, on whose device the network runs, to float32 `[n]`.

    Raises:
        EtudeError: the style is unknown, or the weights are missing.
    """

    def __init__(self, style: str) -> None:
        if not style:
            raise EtudeError(
                f"the reward 'style' needs the name of a style: {', '.join(f'style:{s}' for s in STYLES)}."
            )
        if style not in STYLES:
            raise unknown("art style", style, STYLES)
        if not WEIGHTS.is_file():
            raise EtudeError(f"the style reward finds no weights in '{WEIGHTS.parent}': reinstall etude.")
        tensors = load_file(WEIGHTS)
        self.style, self.weight, self.bias = STYLES.index(style), tensors["weight"].float(), tensors["bias"].float()
        self.features = StyleFeatures()

    @classmethod
    def from_options(cls, text: str = "") -> Style:
        """The reward from the text after the colon of its name."""
        return cls(text)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
        network = self.features.to(images.device)
        features = torch.cat([network(batch) for batch in images.split(BATCH_SIZE)]).cpu()
        return log_odds(features @ self.weight.T + self.bias, self.style)

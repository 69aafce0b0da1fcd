"""A reward that compares the images of a group: the distance of an image to the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def distinctness(images: Tensor, prompts: list[str], groups: list[int], **metadata: Any) -> Tensor:
    """The mean distance of an image to the other images of its group.

    The distance is the root mean square in grey levels. An image alone in its group has 0.

    Args:
        images: uint8 `[n, 3, h, w]`.
        prompts: n texts.
        groups: the group of each image; every group is whole.

    Returns:
        float32 `[n]`.
    """
    flat = images.flatten(1).double()
    scores = torch.zeros(len(images))
    for group in set(groups):
        rows = [row for row, other in enumerate(groups) if other == group]
        if len(rows) > 1:
            distances = torch.cdist(flat[rows], flat[rows]) / flat.shape[1] ** 0.5
            scores[rows] = (distances.sum(1) / (len(rows) - 1)).float()
    return scores


# Every call gets all images of a group.
distinctness.whole_groups = True  # type: ignore[attr-defined]

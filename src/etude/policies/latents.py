"""Latents of images for a pipeline that tells how it decodes latents, and not how images become latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from etude.policies.self_check import relative_difference


def encoded(vae: Any, pixels: Tensor, axes: int) -> Tensor:
    """The autoencoder's latents of pixels in [-1, 1], `[n, 3, H, W]`: the posterior's mean, in its own layout.

    An autoencoder of 5 axes takes each image as a video of one frame.
    """
    result = vae.encode(pixels.unsqueeze(2) if axes == 5 else pixels)
    latents: Tensor = result.latent_dist.mode() if hasattr(result, "latent_dist") else result.latent
    return latents


def inverse(
    decoder_input: Callable[[Tensor], Tensor], encode: Callable[[int], Tensor], zeros: Tensor
) -> tuple[Tensor, float]:
    """The latents x whose decoder's input is what the autoencoder encodes, and by how much they differ in the end.

    The input is `z(x) = J x + b`, where J reorders and scales, so that each row and column of J has
    one entry: `J^T 1` is the scale of each number of x, and `x = J^T (z - b) / (J^T 1)^2`.

    Args:
        decoder_input: z, differentiable.
        encode: gives the autoencoder's own latents, with so many axes.
        zeros: latents of the shape of x.
    """
    with torch.enable_grad():
        x = zeros.detach().requires_grad_()
        offset = decoder_input(x)
        wanted = encode(offset.ndim).detach()
        (scale,) = torch.autograd.grad(offset, x, torch.ones_like(offset), retain_graph=True)
        (back,) = torch.autograd.grad(offset, x, (wanted.float() - offset.float()).to(offset.dtype))
    latents = back / scale**2
    return latents, relative_difference(decoder_input(latents).float(), wanted.float())

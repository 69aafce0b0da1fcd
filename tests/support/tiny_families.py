"""A tiny random pipeline for each model that a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffusers import DiffusionPipeline

from support.tiny import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from support.tiny_flow import flux2_klein, qwen_image, z_image

FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
    "stabilityai/stable-diffusion-xl-base-1.0": stable_diffusion_xl,
    "stabilityai/stable-diffusion-3.5-medium": stable_diffusion_3,
    "black-forest-labs/FLUX.1-dev": flux,
    "black-forest-labs/FLUX.2-klein-base-4B": flux2_klein,
    "Tongyi-MAI/Z-Image": z_image,
    "Qwen/Qwen-Image": qwen_image,
    "emoji-sd": stable_diffusion,
    "emoji-flux": flux,
}
"""Models that recipes name, and what makes a small one of the same class."""


def save_families(directory: Path) -> dict[str, Path]:
    """A checkpoint of every class in `FAMILIES`, and where the one of each model is."""
    places = {model: directory / make.__name__ for model, make in FAMILIES.items()}
    for make in set(FAMILIES.values()):
        make().save_pretrained(directory / make.__name__)
    return places

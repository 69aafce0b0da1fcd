"""Saves the shared pipeline in a process of its own, so that the measuring process never loads torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.protocol import serve
from benchmarks.workload import save_flux, save_full_size, save_pipeline


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[..., dict[str, Any]]]]:
    """Saves a pipeline: `full_size`, by `save_flux` if the settings have `heads`, else by `save_pipeline`."""
    if "full_size" in settings:
        save_full_size(Path(settings["directory"]), settings["full_size"], settings["tiny"])
        return {}, {}
    directory, size, seed = Path(settings["directory"]), settings.get("latent_size", 8), settings.get("seed", 0)
    if "heads" in settings:
        save_flux(directory, settings["heads"], size, seed)
    else:
        save_pipeline(directory, tuple(settings["channels"]), size, seed, tuple(settings.get("vae_channels", ())))
    return {}, {}


if __name__ == "__main__":
    serve(start)

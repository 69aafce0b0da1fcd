"""Saves the shared pipeline in a process of its own, so that the process that measures never loads torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.protocol import serve
from benchmarks.workload import save_pipeline


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[..., dict[str, Any]]]]:
    """Settings: the arguments of `save_pipeline`."""
    save_pipeline(Path(settings["directory"]), tuple(settings["channels"]), settings["latent_size"], settings["seed"])
    return {}, {}


if __name__ == "__main__":
    serve(start)

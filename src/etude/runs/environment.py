"""The software and the processor that computed a result, on which its last bits depend."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("etude", "torch", "diffusers", "transformers", "accelerate", "peft", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def gpu() -> str | None:
    """The name of the GPU in use; None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()

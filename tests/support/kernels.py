"""The built-in kernels by name."""

from __future__ import annotations

from etude import registry
from etude.sampling.kernels import Kernel

KERNELS: dict[str, type[Kernel]] = {name: registry.KERNELS.get(name) for name in registry.KERNELS.builtin}

"""The optimiser of a run, by its name in the configuration."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from etude.errors import EtudeError
from etude.settings import OptimizerConfig


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises EtudeError for an optimiser whose package is missing."""
    if config.kind == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise EtudeError(
            "optimizer.kind = adamw8bit needs the package bitsandbytes: pip install 'etude[bitsandbytes]', or use adamw."
        )


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or with its two moments in 8 bits (arXiv 2110.02861), a quarter of their memory.

    The 8-bit one keeps the moments of parameters of fewer than 4096 numbers in float32.

    Raises:
        EtudeError: for the 8-bit one without bitsandbytes.
    """
    check_optimizer(config)
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "eps": config.epsilon,
    }
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, **options)
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **options)
    return optimizer

"""Compilation of a network by torch.compile: as a whole, or by its repeated blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from etude.errors import EtudeError

BACKEND = "inductor"
"""Backend of torch.compile: torch's default."""
GRAPHS = 64
"""Graphs of one piece of code: with and without gradient or adapter, whole and last micro-batches. Beyond them torch compiles no more."""


def check_blocks(network: nn.Module, how: str) -> None:
    """Raises EtudeError if a network is to be compiled by its repeated blocks and does not name them."""
    if how == "regional" and not getattr(network, "_repeated_blocks", None) and not _blocks(network):
        raise EtudeError(
            f"compile = regional: a {type(network).__name__} does not say which of its blocks repeat; set compile to full or off."
        )


def compile_network(network: Any, how: str) -> None:
    """Compiles a network in place, after `check_blocks`; its class and the names of its weights stay.

    Args:
        how: "regional" compiles each repeated block once (diffusers' `compile_repeated_blocks`, or
            the classes that the model does not split), which takes seconds; "full" compiles the whole
            network, which takes minutes.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    options: dict[str, Any] = {"backend": BACKEND, "dynamic": False}
    if how == "full":
        network.compile(**options)
    elif getattr(network, "_repeated_blocks", None):
        network.compile_repeated_blocks(**options)
    else:
        for block in _blocks(network):
            block.compile(**options)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The modules that the network's class names as units that are not to be divided."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    return [module for module in network.modules() if type(module).__name__ in names]

"""The optimiser of a run, by its name in the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from etude.config import OptimizerConfig
from etude.errors import EtudeError
from etude.policies.sharding import part, whole


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises EtudeError if the optimiser's package is missing."""
    if config.kind == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise EtudeError(
            "optimizer.kind = adamw8bit needs the package bitsandbytes: pip install 'etude[bitsandbytes]', or use adamw."
        )


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or AdamW with its two moments in 8 bits (arXiv 2110.02861).

    The moments of a parameter with fewer than 4096 numbers stay in float32.
    """
    check_optimizer(config)
    kind: Any = torch.optim.AdamW
    more: dict[str, Any] = {"fused": True} if config.fused else {}
    if config.kind == "adamw8bit":
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit
    settings = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    return kind(parameters, **settings, eps=config.epsilon, **more)


_LIKE_THE_PARAMETER = {"exp_avg", "exp_avg_sq", "state1", "state2"}
"""Entries of an optimiser's state in torch and bitsandbytes that have the shape of the parameter."""

_ANOTHER = "the checkpoint belongs to another model or LoRA rank, start anew in another --out"


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """AdamW's state as `{"<name>.exp_avg": ..., "<name>.exp_avg_sq": ..., "<name>.step": ...}` on the CPU.

    The names are distinct and in the order of the parameter groups. What is on the CPU is no copy.
    """
    return {
        f"{name}.{key}": whole(torch.as_tensor(value).detach()).cpu()
        for name, parameter in _named(optimizer, names).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: Mapping[str, Tensor]
) -> None:
    """Restores the result of `optimizer_tensors` exactly. Hyper-parameters stay those of `optimizer`.

    A parameter without an entry loses its state, as after a save before the first step.
    """
    parameters = _named(optimizer, names)
    on_device = any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)
    states: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for entry, value in tensors.items():
        name, _, key = entry.rpartition(".")
        if name not in parameters:
            raise EtudeError(f"optimiser state '{entry}' belongs to no parameter: {_ANOTHER}.")
        parameter = parameters[name]
        if key in _LIKE_THE_PARAMETER and value.shape != parameter.shape:
            raise EtudeError(
                f"optimiser state of '{name}' has shape {list(value.shape)}, its parameter {list(parameter.shape)}: {_ANOTHER}."
            )
        if not value.ndim and not value.is_floating_point():  # a Python number, as bitsandbytes counts its steps
            states[name][key] = value.item()
            continue
        # AdamW keeps `step` on the CPU unless told otherwise; the moments live with the parameter.
        device = parameter.device if value.ndim or on_device else torch.device("cpu")
        value = value.to(device, copy=True)
        states[name][key] = part(value, parameter) if key in _LIKE_THE_PARAMETER else value
    for name, parameter in parameters.items():
        optimizer.state[parameter] = states[name]


def _named(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    listed = list(names)
    if not len(set(listed)) == len(listed) == len(parameters):
        raise EtudeError(
            f"the optimiser has {len(parameters)} parameters, not {len(set(listed))} as the distinct names given: "
            "give each parameter one name of its own."
        )
    return dict(zip(listed, parameters, strict=True))

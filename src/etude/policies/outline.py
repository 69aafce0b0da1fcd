"""The outline of a pipeline: networks built from their configurations, with shapes as weights.

A `ShapeTensor` has no numbers, so a model of any size takes hardly any memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from etude.sampling.shapes import META, ShapeTensor

if TYPE_CHECKING:
    from etude.policies.trainable import TrainablePolicy


def names_part(value: Any) -> bool:
    """Whether a value of model_index.json names a part: its library and its class, which is a text or null."""
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], str | None)


def outline_pipeline(
    location: str,
    index: Mapping[str, Any],
    kind: Any,
    dtype: torch.dtype,
    left_out: Mapping[str, Any],
    at: Mapping[str, str] | None = None,
) -> Any:
    """The outline of a pipeline, on the CPU.

    Args:
        location: diffusers directory or hub id. From the hub, configurations and tokenizers are
            fetched, but no weights.
        index: content of its model_index.json, whose libraries are diffusers and transformers alone.
        left_out: arguments for the pipeline's class; components named here are not built.
        at: revision of a hub id, as a keyword argument.
    """
    parts: dict[str, Any] = dict(left_out)
    for name, value in index.items():
        if name.startswith("_") or name in parts:
            continue
        parts[name] = value
        if names_part(value):
            library, cls = str(value[0]), str(value[1])
            parts[name] = None if None in value else _component(location, name, library, cls, at or {})
        if isinstance(parts[name], nn.Module):
            _fill(parts[name], dtype)
    return kind(**parts)


def _component(location: str, name: str, library: str, kind: str, at: Mapping[str, str]) -> Any:
    cls: Any = getattr(importlib.import_module(library), kind)
    is_network = isinstance(cls, type) and issubclass(cls, nn.Module)
    if not is_network:  # a scheduler or tokenizer, which has no weights
        return cls.from_pretrained(location, subfolder=name, **at)
    with torch.device("meta"):
        if library == "diffusers":
            return cls.from_config(cls.load_config(location, subfolder=name, **at))
        return cls(cls.config_class.from_pretrained(location, subfolder=name, **at))


def _fill(network: nn.Module, dtype: torch.dtype) -> None:
    """Replaces meta tensors, on which autocast does not work, by shapes on the CPU."""

    def shape(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return ShapeTensor(torch.empty(tensor.shape, dtype=kind, device=META))

    _replace(network, shape)
    network._apply = partial(_replace, network)  # type: ignore[method-assign]  # torch's own swaps tensors in place


def _replace(network: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replaces `nn.Module._apply`, which `to` and `float` call; shared tensors stay shared."""
    changed: dict[int, Tensor] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in changed:
                changed[id(parameter)] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
            module._parameters[name] = changed[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
    return network


def is_outline(policy: TrainablePolicy) -> bool:
    """Whether a policy is an outline, not a model with weights."""
    return any(isinstance(parameter, ShapeTensor) for parameter in policy.network.parameters())


class known_masks(TorchDispatchMode):  # noqa: N801  # a context, used as a function
    """Context in which an outline is indexed by masks whose numbers are known, as those of tokenizers are."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.index.Tensor and isinstance(args[0], ShapeTensor):
            indices: list[Any] = []
            for index in args[1]:
                known = index is not None and index.dtype == torch.bool and not isinstance(index, ShapeTensor)
                indices += index.nonzero(as_tuple=True) if known else [index]
            args = (args[0], indices)
        return function(*args, **(kwargs or {}))

"""Sharded tensors: the processes of a run hold parts of them (FSDP2's `DTensor`).

Unless it says otherwise, a function is collective on these: all processes must call it, in the same
order. Whole tensors are returned unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any of the tensors is held in parts."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held_here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, or the whole. Not collective."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, in the layout of `like` (which may be whole). Not collective."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def most(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    largest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


@contextmanager
def assembled(network: nn.Module) -> Iterator[None]:
    """Context in which sharded trained parameters are whole, on the CPU: for `state_dict` only."""
    parts: dict[tuple[nn.Module, str], nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor) and parameter.requires_grad:
                parts[module, name] = parameter
    # One after the other, so that the device holds at most one whole parameter beside its parts.
    wholes = {place: nn.Parameter(whole(parameter.detach()).cpu()) for place, parameter in parts.items()}
    _place(wholes)
    try:
        yield
    finally:
        _place(parts)


def _place(parameters: Mapping[tuple[nn.Module, str], nn.Parameter]) -> None:
    with torch.no_grad():
        for (module, name), parameter in parameters.items():
            module._parameters[name] = parameter

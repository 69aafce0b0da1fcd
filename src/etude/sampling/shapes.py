"""Tensors that have a shape, a dtype and a place on the CPU, and no numbers.

Networks compute on them what they compute on numbers, autocast and gradients included. torch's meta
device says what an operation gives for inputs of a layout, once: the blocks of a network repeat one
another. torch's own fake tensors do more, and take several times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
_READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero")
"""Operations whose result is not a matter of shapes."""


class NumbersNeededError(NotImplementedError):
    """A computation asked for the numbers of a tensor that has none."""


class ShapeTensor(Tensor):
    """A tensor on the CPU without numbers; `twin` is its like on the meta device."""

    twin: Tensor

    @staticmethod
    def __new__(cls, twin: Tensor) -> ShapeTensor:
        made: ShapeTensor = Tensor._make_wrapper_subclass(  # type: ignore[assignment]
            cls, twin.shape, twin.stride(), twin.storage_offset(), dtype=twin.dtype, device=torch.device("cpu")
        )
        made.twin = twin
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return evaluate(function, args, kwargs or {})

    def tolist(self) -> Any:
        """Raises NumbersNeededError; torch's own refusal is a RuntimeError like many others."""
        raise NumbersNeededError("tolist needs numbers, and an outline has shapes alone")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = ShapeTensor(_twin(self))
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShapeTensor({list(self.shape)}, {self.dtype})"


def _twin(tensor: Tensor) -> Tensor:
    """A new tensor of the same layout on the meta device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


class _Operation:
    """What is asked of an operation again and again."""

    def __init__(self, function: Any) -> None:
        self.reads = function._schema.name.removeprefix("aten::") in _READS
        self.has_device = any(argument.name == "device" for argument in function._schema.arguments)
        self.allocates = not (function.is_view or function._schema.is_mutable)


_OPERATIONS: dict[Any, _Operation] = {}


def _operation(function: Any) -> _Operation:
    known = _OPERATIONS.get(function)
    if known is None:
        known = _OPERATIONS[function] = _Operation(function)
    return known


_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
_RESULTS: dict[Any, list[_Layout] | _Layout | None] = {}
"""Layouts of results by operation and inputs; None where a result shares the memory of an input."""
_MOST_RESULTS = 50_000


def _key(value: Any) -> Any:
    """An input by all that a result's layout depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def evaluate(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation of torch on tensors with or without numbers: shapes."""
    operation = _operation(function)
    if operation.reads:
        raise NumbersNeededError(f"{function} needs numbers, and an outline has shapes alone")
    if not operation.allocates:
        return _computed(operation, function, args, kwargs)[0]
    key = (function, _key(args), tuple((name, _key(value)) for name, value in kwargs.items()))
    known = _RESULTS.get(key)
    if known is not None:
        return _new(known) if isinstance(known, tuple) else tuple(map(_new, known))
    result, inputs = _computed(operation, function, args, kwargs)
    if len(_RESULTS) > _MOST_RESULTS:
        _RESULTS.clear()
    _RESULTS[key] = _layouts(result, {value.untyped_storage()._cdata for value in inputs})
    return result


def _new(layout: _Layout) -> Tensor:
    shape, stride, dtype = layout
    return ShapeTensor(torch.empty_strided(shape, stride, dtype=dtype, device=META))


def _layouts(result: Any, memory: set[int]) -> list[_Layout] | _Layout | None:
    """The layouts of new tensors; None where one is not new, or is no tensor."""
    if isinstance(result, ShapeTensor):
        own = result.twin
        return None if own.untyped_storage()._cdata in memory else (own.shape, own.stride(), own.dtype)
    if not isinstance(result, tuple):
        return None
    layouts = [_layouts(each, memory) for each in result]
    return [each for each in layouts if isinstance(each, tuple)] if all(isinstance(e, tuple) for e in layouts) else None


def _computed(operation: _Operation, function: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """The result of an operation on the meta device, and its tensors there."""
    twins: list[tuple[Tensor, Tensor]] = []
    inputs = _unwrapped(args, twins)
    named = {name: _unwrapped(value, twins) for name, value in kwargs.items()}
    if operation.has_device:
        named["device"] = META
    try:
        result = function(*inputs, **named)
    except NotImplementedError as error:  # such as an index by a mask
        raise NumbersNeededError(f"{function} needs numbers, and an outline has shapes alone") from error
    return _wrapped(result, {id(twin): value for twin, value in twins}), [twin for twin, _ in twins]


# No closures: one that calls itself would keep its tensors alive until the garbage collector comes.
def _unwrapped(value: Any, twins: list[tuple[Tensor, Tensor]]) -> Any:
    """An input with meta tensors in place of tensors, which are noted with them in `twins`."""
    if isinstance(value, Tensor):
        if not isinstance(value, ShapeTensor):
            twin = value if value.device == META else _twin(value)
        elif value.twin.dtype != value.dtype or value.twin.shape != value.shape:  # `data` was replaced
            twin = value.twin = _twin(value)
        else:
            twin = value.twin
        twins.append((twin, value))
        return twin
    return type(value)([_unwrapped(each, twins) for each in value]) if isinstance(value, list | tuple) else value


def _wrapped(value: Any, wrappers: dict[int, Tensor]) -> Any:
    """A result with shapes in place of meta tensors; a tensor that was given comes back itself."""
    if isinstance(value, Tensor):
        known = wrappers.get(id(value))
        return ShapeTensor(value) if known is None else known
    return type(value)([_wrapped(each, wrappers) for each in value]) if isinstance(value, list | tuple) else value


class Shapes(TorchDispatchMode):
    """A context in which every operation gives shapes; `on_new` gets each storage that one allocates."""

    def __init__(self, on_new: Callable[[torch.UntypedStorage], None] = lambda storage: None) -> None:
        super().__init__()
        self.on_new = on_new

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = evaluate(function, args, kwargs or {})
        if _operation(function).allocates:
            for tensor in result if isinstance(result, list | tuple) else [result]:
                if isinstance(tensor, ShapeTensor):
                    self.on_new(tensor.twin.untyped_storage())
        return result

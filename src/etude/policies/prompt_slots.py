"""The form of what a pipeline's `encode_prompt` returns, found by encoding one prompt and two.

A call of a pipeline encodes once or several times, and each result is a tree: tensors, lists with
an entry a prompt, masks that are None where no prompt is padded, constants. `Form` says of every
leaf how it depends on the number of prompts, takes one prompt's rows out of a result, and builds
the result for a batch of such rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from etude.errors import EtudeError
from etude.sampling.shapes import ShapeTensor

LENGTH = ".length"
"""Suffix of the row that counts a prompt's own entries among its padded ones."""
_READ = WeakIdKeyDictionary()
"""Numbers of the lengths that are alive."""


@dataclass(frozen=True)
class Slot:
    """A leaf of the results.

    Attributes:
        name: calls and indices that lead to it, `0.1`; the name of its rows.
        kind: `tensor` with an axis that counts prompts; `list` with a tensor a prompt; `mask` that is
            None unless prompts are padded; `constant`.
        axis: of the prompts, in a tensor.
        varies: whether prompts differ in length.
        example: the leaf for one prompt (shape and dtype); of a mask, that of two; the constant itself.
        empty: whether it belongs to guidance's unconditional side.
    """

    name: str
    kind: Literal["tensor", "list", "mask", "constant"]
    axis: int = 0
    varies: bool = False
    example: Any = None
    empty: bool = False


class Form:
    """The slots of all results of one call, as nested lists and tuples.

    Args:
        one: results for one prompt.
        two: results for two prompts of very different lengths.

    Raises:
        EtudeError: a leaf depends on the number of prompts in a way that is not known.
    """

    def __init__(self, one: Sequence[Any], two: Sequence[Any]) -> None:
        if len(one) != len(two):
            raise _not_known("the number of results")
        self.results: list[Any] = [_slots(a, b, str(i)) for i, (a, b) in enumerate(zip(one, two, strict=True))]

    def slots(self) -> list[Slot]:
        return [slot for result in self.results for slot in _leaves(result)]

    @property
    def guided(self) -> bool:
        """Whether anything belongs to guidance's unconditional side."""
        return any(slot.empty for slot in self.slots())

    def with_unconditional(self, conditional: Form) -> None:
        """Marks whatever the form of a call without guidance does not have."""
        known = {slot.name for slot in conditional.slots() if slot.kind != "constant"}
        varying = {slot.name: slot for slot in conditional.slots()}

        def mark(slot: Slot) -> Slot:
            if slot.name in known:
                return varying[slot.name]
            return slot if slot.kind == "constant" else replace(slot, empty=True)

        self.results = [_mapped(mark, result) for result in self.results]

    def rows(self, results: Sequence[Any], empty: bool = False) -> dict[str, Tensor]:
        """One prompt's rows by name, `[1, ...]` each, of the conditional or the unconditional side."""
        rows: dict[str, Tensor] = {}
        for slot in self.slots():
            if slot.empty != empty or slot.kind in ("constant", "mask"):
                continue
            leaf: Any = results
            for index in slot.name.split("."):
                leaf = leaf[int(index)]
            row = leaf[0][None] if slot.kind == "list" else leaf.movedim(slot.axis, 0)
            rows[slot.name] = row
            if slot.varies:
                rows[slot.name + LENGTH] = torch.tensor([row.shape[1]], device=row.device)
        return rows

    def encode(self, count: int, rows: Mapping[str, Tensor], empty: Mapping[str, Tensor]) -> Callable[..., Any]:
        """An `encode_prompt` that returns the results for `count` prompts, one after another.

        Args:
            rows: conditional rows, `[count, ...]`, padded with zeros where lengths differ.
            empty: unconditional rows, `[1, ...]`.
        """
        results = iter(
            [
                _mapped(lambda slot: _filled(slot, count, empty if slot.empty else rows), result)
                for result in self.results
            ]
        )
        return lambda *args, **kwargs: next(results)

    def blank(self, count: int, device: torch.device) -> Callable[..., Any]:
        """An `encode_prompt` whose tensors are zeros in the form of a prompt."""

        def zeros(slot: Slot) -> Any:
            if slot.kind == "mask":
                return None
            if slot.kind == "constant":
                return slot.example
            one = slot.example[0][None] if slot.kind == "list" else slot.example.movedim(slot.axis, 0)
            rows = torch.zeros((), dtype=one.dtype, device=device).expand(count, *one.shape[1:])
            return list(rows) if slot.kind == "list" else rows.movedim(0, slot.axis)

        results = iter([_mapped(zeros, result) for result in self.results])
        return lambda *args, **kwargs: next(results)


def padded(tensors: Sequence[Tensor]) -> Tensor:
    """Rows `[1, ...]` one below another, padded with zeros to the largest."""
    shapes = {tensor.shape[1:] for tensor in tensors}
    if len(shapes) == 1:
        return torch.cat(list(tensors))
    widest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    together = tensors[0].new_zeros((len(tensors), *widest))
    for row, tensor in zip(together, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape[1:])] = tensor[0]
    return together


def _slots(one: Any, two: Any, name: str) -> Any:
    """The slots of one result, by its value for one prompt and for two."""
    if isinstance(one, list) and isinstance(two, list) and len(one) == 1 and len(two) == 2:
        return Slot(name, "list", varies=True, example=_shapes(one))
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        slots = [_slots(a, b, f"{name}.{i}") for i, (a, b) in pairs]
        if any(slot.kind == "mask" for slot in slots if isinstance(slot, Slot)):
            slots = [_padded_beside_mask(slot) for slot in slots]
        return tuple(slots) if isinstance(one, tuple) else slots
    if one is None and isinstance(two, Tensor) and two.ndim == 2 and len(two) == 2:
        return Slot(name, "mask", example=_shapes(two))
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.ndim == two.ndim:
        sizes = list(enumerate(zip(one.shape, two.shape, strict=True)))
        counting = [axis for axis, pair in sizes if pair == (1, 2)]
        if len(counting) == 1:
            varies = any(a != b for axis, (a, b) in sizes if axis != counting[0])
            return Slot(name, "tensor", counting[0], varies, _shapes(one))
        if one.shape == two.shape and (isinstance(one, ShapeTensor) or torch.equal(one, two)):
            return Slot(name, "constant", example=one)
        raise _not_known(f"a tensor of shape {list(one.shape)}")
    if isinstance(one, Tensor) or isinstance(two, Tensor) or type(one) is not type(two):
        raise _not_known(f"{type(one).__name__} for one prompt and {type(two).__name__} for two")
    return Slot(name, "constant", example=one)


def _padded_beside_mask(slot: Any) -> Any:
    """A tensor beside a mask: its length counts, even where two prompts happen to be equally long."""
    return replace(slot, varies=True) if isinstance(slot, Slot) and slot.kind == "tensor" else slot


def _not_known(what: str) -> EtudeError:
    return EtudeError(
        f"encode_prompt returns {what} in a form that depends on the number of prompts in an unknown way."
    )


def _shapes(leaf: Any) -> Any:
    """The leaf as shapes and dtypes alone."""
    return [_shapes(entry) for entry in leaf] if isinstance(leaf, list) else leaf.to("meta")


def _leaves(tree: Any) -> Iterator[Slot]:
    if isinstance(tree, Slot):
        yield tree
    else:
        for branch in tree:
            yield from _leaves(branch)


def _mapped(function: Callable[[Slot], Any], tree: Any) -> Any:
    if isinstance(tree, Slot):
        return function(tree)
    return type(tree)(_mapped(function, branch) for branch in tree)


def _filled(slot: Slot, count: int, rows: Mapping[str, Tensor]) -> Any:
    if slot.kind == "constant":
        return slot.example
    if slot.kind == "mask":
        beside = next((name for name in rows if name.endswith(LENGTH) and _same_call(name, slot.name)), None)
        if beside is None:
            return None
        lengths = rows[beside].expand(count)
        width = rows[beside.removesuffix(LENGTH)].shape[1]
        return (torch.arange(width, device=lengths.device) < lengths[:, None]).to(slot.example.dtype)
    tensor = rows[slot.name].expand(count, *rows[slot.name].shape[1:])
    if slot.kind == "tensor":
        return tensor.movedim(0, slot.axis)
    lengths = rows[slot.name + LENGTH]
    numbers = [tensor.shape[1]] if isinstance(lengths, ShapeTensor) else _numbers(lengths)
    every = numbers * count if len(numbers) == 1 else numbers
    return [row[:length] for row, length in zip(tensor, every, strict=True)]


def _numbers(lengths: Tensor) -> list[int]:
    """Lengths as numbers, read from the device once for all evaluations of the same samples."""
    if lengths not in _READ:
        _READ[lengths] = [int(length) for length in lengths.tolist()]
    numbers: list[int] = _READ[lengths]
    return numbers


def _same_call(name: str, other: str) -> bool:
    return name.split(".")[0] == other.split(".")[0]

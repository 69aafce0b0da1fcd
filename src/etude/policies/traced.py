"""Tensors that know which tensors of a file their numbers come from, through any translation of names and shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Traced(Tensor):
    """A tensor with the names of the tensors from which its numbers come.

    Attributes:
        sources: names of the tensors in the file.
        read: receiver of the names of those that a translation turns into a number.
    """

    sources: frozenset[str]
    read: set[str]

    @classmethod
    def of(cls, name: str, tensor: Tensor, read: set[str]) -> Tensor:
        traced = tensor.clone().as_subclass(cls)  # a clone, since some translations scale in place
        traced.sources, traced.read = frozenset([name]), read
        return traced

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Traced) and hasattr(t, "sources")]
        names = frozenset().union(*(t.sources for t in given))
        if func is Tensor.item and given[0].dtype != torch.bool:
            given[0].read.update(names)  # an alpha, of which the translation makes a number

        def mark(value: Any) -> Any:
            if isinstance(value, Traced):
                value.sources, value.read = names, given[0].read
            return value

        return tree_map(mark, result) if given else result


def sources_of(value: Any) -> frozenset[str]:
    """Names of the tensors of the file from which the tensors in a value come."""
    traced = [each for each in tree_leaves(value) if isinstance(each, Traced)]
    return frozenset().union(*(each.sources for each in traced if hasattr(each, "sources")))

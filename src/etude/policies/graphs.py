"""CUDA graphs of a network's calls, for networks whose kernels are shorter than their launches.

A call is recorded once for each kind of arguments, and afterwards played as one launch of the same
kernels. Under gradients its backward is recorded as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from etude.errors import EtudeError, brief

MOST = 24
"""Recordings of one network, each of which keeps its activations. Calls of further kinds are made plainly."""
WARM_UP = 3
"""Calls before a recording, in which libraries choose their kernels; the number of `torch.cuda.make_graphed_callables`."""

Call = Callable[..., Tensor]


class Recorded(Protocol):
    """A call of some tensors that can be made again for others of the same shapes."""

    def play(self, tensors: Sequence[Tensor]) -> Tensor:
        """The result, which the next call of `play` may overwrite."""

    def backward(self, slope: Tensor) -> Sequence[Tensor | None]:
        """The gradients by the parameters, of the last result times `slope`; None for those without."""


class Recording:
    """A call recorded on the current CUDA device.

    Args:
        call: function of tensors; its parameters may change in place only.
        tensors: arguments like those of later calls.
        parameters: parameters by which gradients will be asked for. None: no backward is recorded.
    """

    def __init__(self, call: Call, tensors: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        # A weight that autocast has cast before would not be cast anew after it has changed.
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            self._warm_up(call, parameters)
            self.forward, self.reverse = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.forward, capture_error_mode="thread_local"):
                output = call(*self.inputs)
        self.output, self.with_gradient = output.detach(), [False] * len(parameters)
        if output.requires_grad:
            self.slope = torch.empty_like(output)
            with torch.cuda.graph(self.reverse, pool=self.forward.pool(), capture_error_mode="thread_local"):
                gradients = torch.autograd.grad(output, parameters, self.slope, allow_unused=True)
                self.gradients = torch.cat([g.flatten() for g in gradients if g is not None])
            self.with_gradient = [gradient is not None for gradient in gradients]
        self.parameters = list(parameters)

    def _warm_up(self, call: Call, parameters: Sequence[nn.Parameter]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                output = call(*self.inputs)
                if output.requires_grad:
                    torch.autograd.grad(output, parameters, torch.zeros_like(output), allow_unused=True)
        torch.cuda.current_stream().wait_stream(stream)

    def play(self, tensors: Sequence[Tensor]) -> Tensor:
        torch._foreach_copy_(self.inputs, list(tensors))
        self.forward.replay()
        return self.output

    def backward(self, slope: Tensor) -> list[Tensor | None]:
        self.slope.copy_(slope)
        self.reverse.replay()
        own = [p for p, given in zip(self.parameters, self.with_gradient, strict=True) if given]
        parts = iter(self.gradients.clone().split([p.numel() for p in own]))  # one copy, which may become their `grad`
        return [
            next(parts).view_as(p) if given else None
            for p, given in zip(self.parameters, self.with_gradient, strict=True)
        ]


class GraphedForward:
    """The `forward` of a network whose calls are recorded and played again.

    A kind of call is its arguments' structure, shapes and dtypes, whether gradients are taken, the
    precision of autocast, and `state()`. A call is made plainly while one of its kind waits for
    its backward, because a recording has one set of activations. After a recording has failed all
    calls are, with one warning.

    Args:
        network: the network, called with `return_dict=False`.
        state: what else decides which operations a call makes, such as whether an adapter is on.
        record: function from a call, its tensors and the parameters to a recording.
    """

    def __init__(
        self,
        network: nn.Module,
        state: Callable[[], Hashable],
        record: Callable[[Call, Sequence[Tensor], Sequence[nn.Parameter]], Recorded] = Recording,
    ) -> None:
        self.plain, self.parameters = network.forward, network.parameters
        self.state, self.record = state, record
        self.recorded: dict[Hashable, Recorded] = {}
        self.waiting: set[Hashable] = set()
        self.failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        shapes = tuple((i, leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        precision = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        kind = structure, constants, shapes, precision, torch.is_grad_enabled(), self.state()
        full = kind not in self.recorded and len(self.recorded) >= MOST
        if self.failed or full or kind in self.waiting or any(tensor.requires_grad for tensor in tensors):
            return (self.plain(*args, **kwargs)[0],)
        trained = [p for p in self.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        if kind not in self.recorded:

            def call(*given: Tensor) -> Tensor:
                rest = iter(given)
                filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                own_args, own_kwargs = tree_unflatten(filled, structure)
                output: Tensor = self.plain(*own_args, **own_kwargs)[0]
                return output

            try:
                self.recorded[kind] = self.record(call, tensors, trained)
            except RuntimeError as error:
                self.failed = True
                warnings.warn(
                    f"compile = graphs: a call of the network cannot be recorded ({brief(error, 200)}), so each kernel is "
                    "launched by itself",
                    stacklevel=2,
                )
                return (self.plain(*args, **kwargs)[0],)
        if not trained:
            return (self.recorded[kind].play(tensors).clone(),)
        return (_Played.apply(self, kind, tensors, *trained),)  # type: ignore[no-untyped-call]


class _Played(torch.autograd.Function):
    """A recorded call as one operation of autograd, whose inputs are the trained parameters."""

    @staticmethod
    def forward(ctx: Any, calls: GraphedForward, kind: Hashable, tensors: list[Tensor], *trained: Tensor) -> Tensor:
        ctx.calls, ctx.kind = calls, kind
        calls.waiting.add(kind)
        return calls.recorded[kind].play(tensors).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        ctx.calls.waiting.discard(ctx.kind)
        return None, None, None, *ctx.calls.recorded[ctx.kind].backward(slope)


def check_graphs(device: torch.device, in_parts: bool) -> None:
    """Raises EtudeError on a device without CUDA graphs, and for a network that processes hold in parts."""
    if in_parts:
        raise EtudeError(
            "compile = graphs cannot record a network that the processes hold in parts (FSDP): set compile to off."
        )
    if device.type != "cuda":
        raise EtudeError(f"compile = graphs records CUDA graphs, which a {device.type} has not: set compile to off.")


def graph_calls(network: nn.Module, state: Callable[[], Hashable]) -> None:
    """Lets the calls of a network be recorded and played again, in place."""
    network.forward = GraphedForward(network, state)

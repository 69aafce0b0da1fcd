"""The bare network time of an iteration: its denoiser and VAE calls, recorded and run again alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from etude.policies.pipeline import PipelinePolicy

KINDS = ("forward", "forward_backward", "decode")


@dataclass(frozen=True)
class Call:
    """One network call: the function, its tensors, and whether its gradient was computed.

    `adapted` is the network whose LoRA layers were off during this call, or None.
    """

    kind: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    adapted: Any

    @property
    def rows(self) -> int:
        """Number of rows in the call, those of guidance included."""
        return len(self.keywords["hidden_states"] if "hidden_states" in self.keywords else self.arguments[0])

    def __call__(self) -> None:
        """Runs the call again: forward, and for `forward_backward` the backward of ones."""
        if self.adapted is not None:
            self.adapted.disable_adapters()
        try:
            with torch.set_grad_enabled(self.kind == "forward_backward"):
                output: Tensor = self.function(*self.arguments, **self.keywords)[0]
            if self.kind == "forward_backward":
                output.backward(torch.ones_like(output))
        finally:
            if self.adapted is not None:
                self.adapted.enable_adapters()


@contextmanager
def record(policy: PipelinePolicy) -> Iterator[list[Call]]:
    """Context that records, in order, every call of denoiser, frozen reference and VAE decoder."""
    calls: list[Call] = []
    vae, decode = policy.pipeline.vae, policy.pipeline.vae.decode

    def on_network(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        kind = "forward_backward" if torch.is_grad_enabled() else "forward"
        calls.append(Call(kind, module, arguments, keywords, module if _adapters_off(module) else None))

    def on_decode(*arguments: Any, **keywords: Any) -> Any:
        calls.append(Call("decode", decode, arguments, keywords, None))
        return decode(*arguments, **keywords)

    networks = [network for network in (policy._trained_network, policy._initial) if network is not None]
    hooks = [network.register_forward_pre_hook(on_network, with_kwargs=True) for network in networks]
    vae.decode = on_decode
    try:
        yield calls
    finally:
        del vae.decode  # deletes the instance's attribute, so that the class's method applies again
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Timed:
    """Consecutive calls of one kind and size: number of calls, rows of each, seconds of all."""

    kind: str
    rows: int
    calls: int
    seconds: float


def run_bare(calls: list[Call], now: Callable[[], float]) -> list[Timed]:
    """Runs the calls again, in order and alone."""
    timed = []
    for (kind, rows), group in groupby(calls, key=lambda call: (call.kind, call.rows)):
        alike, started = list(group), now()
        for call in alike:
            call()
        timed.append(Timed(kind, rows, len(alike), now() - started))
    return timed


def by_kind(timed: list[Timed]) -> dict[str, float]:
    """Seconds of each kind of call."""
    return {kind: sum(one.seconds for one in timed if one.kind == kind) for kind in KINDS}


def _adapters_off(module: nn.Module) -> bool:
    layer = next((m for m in module.modules() if isinstance(m, BaseTunerLayer)), None)
    return layer is not None and bool(layer.disable_adapters)

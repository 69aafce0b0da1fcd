"""The first backward of a run: are its gradients numbers?

A kernel that fails only in training gives NaN gradients without an error. The first step of a run
waits for the device once and names the layer; later steps are watched by the gradient's norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from etude.errors import EtudeError
from etude.policies.sharding import held_here


@contextmanager
def order_of_gradients(parameters: Mapping[str, nn.Parameter]) -> Iterator[list[str]]:
    """Context that lists the parameters in the order in which a backward reaches them, the last layer first."""
    reached: dict[str, None] = {}

    def note(name: str, parameter: Tensor) -> None:
        reached.setdefault(name)

    order: list[str] = []
    hooks = [p.register_post_accumulate_grad_hook(partial(note, name)) for name, p in parameters.items()]
    try:
        yield order
    finally:
        for hook in hooks:
            hook.remove()
        order += [*reached, *(name for name in reversed([*parameters]) if name not in reached)]


def check_gradients(parameters: Mapping[str, nn.Parameter], order: list[str]) -> None:
    """Raises EtudeError if a gradient holds NaN or infinity, with the layer in which the backward met the first."""
    for name in order:
        gradient = parameters[name].grad
        if gradient is not None and not bool(held_here(gradient).isfinite().all()):
            raise EtudeError(
                f"the first backward gives NaN or infinity as the gradient of '{name}', and of no layer after it: a kernel there fails "
                "in training, most often attention; set attention.backend to efficient or math, or dtype to float32."
            )

"""Gradients of single samples, taken while they are drawn, so that no second forward is needed.

Where one optimiser step follows a rollout, every importance ratio is 1, and the gradient of a
surrogate is sum_s w_s grad log p_s with weights w_s that are known only after the rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from etude.errors import EtudeError


class SampleGradients:
    """The gradient of each sample's log-probability, summed over its trained steps.

    For a layer y = x W^T, `grad_W log p_s` is the sum over rows and tokens of sample s of
    (d log p_s / dy)^T x. A sample's log-probability depends on its own rows alone, so one backward
    of the sum over samples gives the first factor for all of them. A call on B samples has rows
    s, s + B, ... of sample s: guidance stacks two.

    Args:
        network: network whose trained parameters are weights of linear layers or of 1 x 1
            convolutions, which are linear in the channels, as a LoRA's are.
        parameters: the trained parameters, by name.
        samples: number of samples, n.
        around: makes a context for each backward. Default: none.

    Attributes:
        values: by name, fp32 `[n, *parameter.shape]`.

    Raises:
        EtudeError: a trained parameter is no such weight.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        samples: int,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._layers = [
            (names[id(module.weight)], module)
            for module in network.modules()
            if _is_linear(module) and id(module.weight) in names
        ]
        others = set(parameters) - {name for name, _ in self._layers}
        if others:
            raise EtudeError(
                f"objective.gradients = rollout needs trained weights of linear layers and 1 x 1 convolutions alone, and '{min(others)}' "
                "is none: choose other lora.targets, or set objective.gradients to replay."
            )
        self.values = {
            name: torch.zeros((samples, *parameter.shape), dtype=torch.float32, device=parameter.device)
            for name, parameter in parameters.items()
        }
        self._around = around
        self._calls: list[tuple[str, Tensor, Tensor]] = []

    def begin(self, rows: slice) -> None:
        """Forgets the gradients of some samples, which begin or begin again."""
        for value in self.values.values():
            value[rows] = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which the network's calls are recorded, with gradients; `add` must follow."""
        self._calls = []
        hooks = [layer.register_forward_hook(partial(self._note, name)) for name, layer in self._layers]
        try:
            with torch.enable_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            self._calls.append((name, inputs[0].detach(), output))

    def add(self, rows: slice, log_prob: Tensor) -> None:
        """Adds the gradients of the recorded log-probabilities `[B]` of some samples."""
        calls, self._calls = self._calls, []
        with self._around():
            ones, outputs = torch.ones_like(log_prob), [output for _, _, output in calls]
            outer = torch.autograd.grad(log_prob, outputs, ones, allow_unused=True)
        count = len(log_prob)
        for (name, x, _), delta in zip(calls, outer, strict=True):
            if delta is not None:
                value = self.values[name][rows]
                if value.ndim > 3:  # of a convolution, whose channels are not the last dimension
                    x, delta = x.movedim(1, -1), delta.movedim(1, -1)
                value += torch.einsum("sto,sti->soi", _by_sample(delta, count), _by_sample(x, count)).view_as(value)

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        """`sum_s w_s grad log p_s` by name, for weights `[n]`."""
        return {name: torch.tensordot(weights.to(value), value, dims=1) for name, value in self.values.items()}


def _is_linear(module: nn.Module) -> bool:
    """Whether a layer is linear in its last dimension, or a convolution of single points without bias to train."""
    points = isinstance(module, nn.Conv2d) and module.kernel_size == module.stride == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear) or points


def _by_sample(values: Tensor, count: int) -> Tensor:
    """fp32 `[count, t, c]` from `[k count, ..., c]`, whose rows s, s + count, ... belong to sample s."""
    width = values.shape[-1]
    return (
        values.float().reshape(-1, count, values[0].numel() // width, width).transpose(0, 1).reshape(count, -1, width)
    )

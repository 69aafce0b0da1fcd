"""The old policy: weights that draw the images and follow the trained weights from behind."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from etude.errors import EtudeError
from etude.policies.sharding import part
from etude.policies.trainable import swapped


class OldPolicy:
    """Weights that move behind the trained ones, once an iteration i, counted from 1:

        old <- d_i old + (1 - d_i) trained,        d_i = min(rate i, most)

    `rate` = 0 copies the trained weights, so that each rollout is on-policy. `weights` are None
    before the trained ones first move; `current` says whether both are known to be equal.
    """

    def __init__(self, rate: float, most: float) -> None:
        if not (rate >= 0 and 0 <= most < 1):
            raise EtudeError(
                f"objective.options: old_rate = {rate} must be at least 0, and old_most = {most} in [0, 1)."
            )
        self.rate, self.most = rate, most
        self.weights: dict[str, Tensor] | None = None
        self.current = True

    def decay(self, iteration: int) -> float:
        """The share `d_i` of themselves that the old weights keep at the end of an iteration."""
        return min(self.rate * iteration, self.most)

    def active(self, parameters: Mapping[str, nn.Parameter]) -> AbstractContextManager[None]:
        """Context in which the parameters hold the old weights."""
        return nullcontext() if self.current else swapped(dict(parameters), self.weights)

    def remember(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Holds the old weights beside the trained ones, which are about to move."""
        old = self.weights or {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.weights = {
            name: part(weight, parameters[name]).to(parameters[name].device) for name, weight in old.items()
        }

    @torch.no_grad()
    def follow(self, parameters: Mapping[str, nn.Parameter], iteration: int) -> None:
        """Moves the old weights at the end of iteration `iteration`; without any they are the trained ones."""
        decay = self.decay(iteration)
        for name, weight in (self.weights or {}).items():
            trained = parameters[name].detach()
            weight.copy_(trained) if decay == 0 else weight.lerp_(trained, 1 - decay)
        self.current = decay == 0 or self.weights is None

    def state(self) -> dict[str, Tensor]:
        """The old weights for a checkpoint; empty while they equal the trained ones."""
        return {} if self.current or self.weights is None else self.weights

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the result of `state`."""
        self.weights, self.current = dict(tensors) or None, not tensors

"""Loss scaling for float16: a factor that keeps gradients from vanishing and from overflowing.

float16 has no number between 0 and 6e-8, and none above 65504. The gradient of a mean
log-probability over D latent dimensions and m pairs is of order 1 / (D m) an element, so most of it
would become 0. The scale is the power of two nearest to D m (m for the sum over dimensions), which
changes no digit. The float32 gradients of the trained weights are divided by it before clipping.

If gradients overflow all the same, those of the whole optimiser step are computed again at 1/16 of
the scale, which stays lower until the iteration ends: a resumed run takes the same course.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

LARGEST = 2.0**32
BACK_OFF = 16.0


class LossScale:
    """The scale of one run's losses; 1 unless it is needed, by a network that computes in float16.

    `dimensions` is the number that the log-probability is a mean over, 1 for their sum. `agree`
    combines the answers of all processes to the question whether gradients are finite.
    """

    def __init__(
        self, needed: bool, dimensions: int, agree: Callable[[Tensor], Tensor] = lambda finite: finite
    ) -> None:
        self.needed, self.dimensions, self.agree = needed, dimensions, agree
        self.value = self._lowered = 1.0  # `value` multiplies the loss

    def begin_iteration(self) -> None:
        """Returns to the full scale."""
        self._lowered = 1.0

    def begin_step(self, pairs: int) -> None:
        """Chooses the scale of an optimiser step over `pairs` pairs."""
        if self.needed:
            full = 2.0 ** round(math.log2(self.dimensions * pairs))
            self.value = max(1.0, min(full, LARGEST) * self._lowered)

    def take_back(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Divides the gradients by the scale; False if they overflowed, and the step must be repeated."""
        if not self.needed:
            return True
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for gradient in gradients:
            gradient.mul_(1 / self.value)
        if self.value == 1:
            return True
        finite = [gradient.isfinite().all() for gradient in gradients]
        if bool(self.agree(torch.stack(finite).all() if finite else torch.ones((), dtype=torch.bool))):
            return True
        self._lowered /= BACK_OFF
        return False

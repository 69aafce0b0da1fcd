"""Loss scaling for float16: a factor that keeps gradients from vanishing and from overflowing.

float16 has no number between 0 and 6e-8, and none above 65504. The gradient of a mean
log-probability over D latent dimensions and m pairs is of order 1 / (D m) an element, so most of it
would become 0. The scale is the power of two nearest to D m (m for the sum over dimensions). With
it the gradients that enter the network are of order 1. The float32 gradients of the trained weights
are divided by the scale before they are clipped. A power of two changes no digit, so in a float32
network the results would be the same bits.

If gradients overflow all the same, those of the whole optimiser step are computed again at 1/16 of
the scale, which stays lower until the iteration ends. The next iteration starts at the full scale,
so that a resumed run takes the same course. bfloat16 has the range of float32 and is not scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

LARGEST = 2.0**32
BACK_OFF = 16.0


class LossScale:
    """The scale of one run's losses.

    Args:
        needed: whether losses are scaled: true if the network computes in float16.
        dimensions: number of latent dimensions that the log-probability is a mean over; 1 for their
            sum.
        agree: combines the answers of all processes to the question whether gradients are finite.

    Attributes:
        value: factor of the loss before it is differentiated; 1 if losses are not scaled.
    """

    def __init__(
        self, needed: bool, dimensions: int, agree: Callable[[Tensor], Tensor] = lambda finite: finite
    ) -> None:
        self.needed, self.dimensions, self.agree = needed, dimensions, agree
        self.value = self._lowered = 1.0

    def begin_iteration(self) -> None:
        """Returns to the full scale: forgets earlier overflows."""
        self._lowered = 1.0

    def begin_step(self, pairs: int) -> None:
        """Chooses the scale of an optimiser step over `pairs` pairs."""
        if self.needed:
            full = 2.0 ** round(math.log2(self.dimensions * pairs))
            self.value = max(1.0, min(full, LARGEST) * self._lowered)

    def take_back(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Divides the gradients by the scale.

        Returns:
            False if gradients overflowed and the step should be repeated at the next, smaller
            scale.
        """
        if not self.needed:
            return True
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for gradient in gradients:
            gradient.mul_(1 / self.value)
        if self.value == 1 or bool(self.agree(finite(gradients))):
            return True
        self._lowered /= BACK_OFF
        return False


def finite(gradients: list[Tensor]) -> Tensor:
    """Whether every number of the gradients is finite, as one boolean on their device."""
    if not gradients:
        return torch.ones((), dtype=torch.bool)
    return torch.stack([gradient.isfinite().all() for gradient in gradients]).all()

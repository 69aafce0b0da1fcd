"""What float16 needs to be trained with: a loss scaled so that gradients neither vanish nor overflow on their way back.

float16 knows no number between 0 and 6e-8, and none above 65504. The gradient of the mean log-probability over D latent dimensions and
m pairs is of order 1 / (D m) an element, so it would be 0 for the most part. The scale is the power of two next to D m (m for the sum over
dimensions), which makes the gradients that enter the network of order 1; it is taken back from the float32 gradients of the trained weights
before they are clipped. Multiplying by a power of two changes no digit, so in a network of float32 the results would be the same bits.

Where gradients overflow all the same, those of the whole optimiser step are computed again at 1/16 of the scale, which stays so until the
iteration ends. It begins anew in the next, so that a resumed run takes the same course. bfloat16 has the range of float32 and is not scaled.
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
        needed: whether anything is scaled at all: the network computes in float16.
        dimensions: latent dimensions that the log-probability is a mean over; 1 if it is their sum.
        agree: makes all processes answer as one whether the gradients are finite.

    Attributes:
        value: what the loss is multiplied with before it is differentiated; 1 where nothing is scaled.
    """

    def __init__(
        self, needed: bool, dimensions: int, agree: Callable[[Tensor], Tensor] = lambda finite: finite
    ) -> None:
        self.needed, self.dimensions, self.agree = needed, dimensions, agree
        self.value = self._lowered = 1.0

    def begin_iteration(self) -> None:
        """Forgets what overflowed before."""
        self._lowered = 1.0

    def begin_step(self, pairs: int) -> None:
        """Chooses the scale of an optimiser step over that many pairs."""
        if self.needed:
            wanted = 2.0 ** round(math.log2(self.dimensions * pairs))
            self.value = max(1.0, min(wanted, LARGEST) * self._lowered)

    def take_back(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Divides the gradients by the scale. False if they overflowed and a smaller one, which is then set, may do."""
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
    """Whether every number is, as one boolean on the gradients' device."""
    if not gradients:
        return torch.ones((), dtype=torch.bool)
    return torch.stack([gradient.isfinite().all() for gradient in gradients]).all()

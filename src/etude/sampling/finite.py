"""Values that must be finite: marked on the device while a sampler runs, and read once at its end.

`Tensor.clamp` keeps NaN, and a conversion to uint8 makes 0 of it, so a network that overflows would
give black images with ordinary rewards. A mark is one number on the device. To read it waits for
the device, so marks are read where the sampler waits anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.sampling.shapes import ShapeTensor

SHORT_OF_RANGE = torch.float16
"""The precision whose range is too small for many networks: its largest number is 65,504."""


class FiniteMarks:
    """Marks of the values that a sampler computes, in their order.

    Args:
        part: name of the part that computes the values, for the message.
        dtype: its precision.
        steps: number of steps of the sampler.
    """

    def __init__(self, part: str, dtype: torch.dtype, steps: int) -> None:
        self.part, self.dtype, self.steps = part, dtype, steps
        self._marks: list[Tensor] = []
        self._places: list[int] = []

    def add(self, values: Tensor, step: int) -> None:
        """Marks the prediction or the latents of a step, counted from 0; does not wait for the device.

        Tensors without numbers, as a dry run has, are passed over.
        """
        if not isinstance(values, ShapeTensor) and not values.is_meta:
            self._marks.append(all_finite(values))
            self._places.append(step)

    def check(self) -> None:
        """Reads the marks so far, and forgets them.

        Raises:
            EtudeError: a value was NaN or infinite; the message names the first such step.
        """
        marks, places = self._marks, self._places
        self._marks, self._places = [], []
        if not marks:
            return
        finite = torch.stack(marks).tolist()
        if not all(finite):
            step = min(place for place, mark in zip(places, finite, strict=True) if not mark)
            raise not_finite(f"the {self.part}'s prediction", f"step {step + 1} of {self.steps}", self.dtype)


def all_finite(values: Tensor) -> Tensor:
    """Whether no value is NaN or infinite, as a scalar on the device of the values."""
    return values.detach().isfinite().all()


def not_finite(what: str, where: str, dtype: torch.dtype) -> EtudeError:
    """The error for values that are NaN or infinite."""
    precision = str(dtype).removeprefix("torch.")
    remedy = (
        "use bfloat16 or float32, which have the range"
        if dtype == SHORT_OF_RANGE
        else "its weights or inputs hold NaN, infinity or numbers that overflow, so load other files or the run's last sound weights"
    )
    return EtudeError(
        f"{what} at {where} in {precision} holds NaN or infinity, of which no image can be made: {remedy}."
    )

"""A window that walks to the last step and back instead of beginning again."""

from __future__ import annotations

from dataclasses import dataclass

from etude.sampling.windows import WindowSchedule


@dataclass(frozen=True)
class PingPongWindow(WindowSchedule):
    """A left edge that goes from `start` to `stop - size` and back, one step at a time.

    Attributes:
        iters_per_shift: iterations between two moves.
    """

    iters_per_shift: int = 25

    def start_at(self, iteration: int) -> int:
        last = self.stop - self.size - self.start
        move = (iteration - 1) // self.iters_per_shift % max(1, 2 * last)
        return self.start + min(move, 2 * last - move)

"""The exchange between the processes of a run: who makes which sample, and how their rows come together."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor


def share(count: int, processes: int, index: int) -> list[int]:
    """The samples 0..count - 1 that process `index` makes: consecutive, and equally many for every process.

    Where they do not divide, the last sample is made again to fill up; `gather` in order and cut to `count` drops it.
    """
    size = -(-count // processes)
    return [min(i, count - 1) for i in range(index * size, (index + 1) * size)]


def gather(accelerator: Accelerator, values: Tensor, count: int) -> Tensor:
    """All processes' rows in the order of the samples (`share`), on the CPU: `[count, ...]`."""
    gathered: Tensor = accelerator.gather(values.to(accelerator.device))
    return gathered.cpu()[:count]

"""The exchange between the processes of a run: their shares of the samples, and gathering their rows."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor


def share(count: int, processes: int, index: int) -> list[int]:
    """The samples in 0..count - 1 of process `index`: consecutive, equally many in every process.

    To that end the last sample may be repeated; `gather` drops the copies.
    """
    size = -(-count // processes)
    return [min(i, count - 1) for i in range(index * size, (index + 1) * size)]


def gather(accelerator: Accelerator, values: Tensor, count: int) -> Tensor:
    """The rows of all processes in the order of the samples (`share`), on the CPU: `[count, ...]`."""
    return accelerator.gather(values.to(accelerator.device)).cpu()[:count]

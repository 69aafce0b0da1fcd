"""Micro-batches: as many samples in a network call as fit into memory, found by halving.

No result depends on their size, last bits apart (kernels of another shape round differently):
noise is keyed by sample, and gradients are sums over samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from etude.errors import EtudeError

Progress = Callable[[int], None]
Size = int | Literal["auto"]
AUTO: Literal["auto"] = "auto"
UNTRIED = 8
"""Size for `auto` where sizes cannot be tried: on a CPU, where running out of memory ends the process."""
_LIBRARY_STATUSES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, of a device's library or of Python says that memory is used up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    by_library = isinstance(error, RuntimeError) and any(status in str(error) for status in _LIBRARY_STATUSES)
    return by_library or (isinstance(error, Exception) and should_reduce_batch_size(error))


def silent(done: int) -> None:
    """A progress callback that does nothing."""


class MicroBatch:
    """The size of one phase's micro-batches, named `setting` in messages.

    A size that runs out of memory is halved, with a warning, and stays so; one that cannot be
    halved is an `EtudeError`. `adaptive` is False, and no size is halved, where the network's calls
    are collective, because every process must then make the same number of calls. `automatic`:
    `find` may change the size, which was not given.
    """

    def __init__(self, size: int, setting: str, adaptive: bool = True, automatic: bool = False) -> None:
        self.size, self.setting, self.adaptive, self.automatic = size, setting, adaptive, automatic

    @classmethod
    def of(cls, size: Size | MicroBatch, setting: str = "batch_size", untried: int = UNTRIED) -> MicroBatch:
        """A `MicroBatch` as it is, or a new one: of a number, or for `auto` of the size `untried`."""
        if isinstance(size, MicroBatch):
            return size
        return cls(untried, setting, automatic=True) if size == AUTO else cls(size, setting)

    def find(self, work: Callable[[int], object], largest: int) -> None:
        """Sets the size to the largest of 1, 2, 4, ... and `largest` at which `work` fits into memory.

        Sizes grow until one does not fit. `work` leaves nothing behind. Raises EtudeError if a
        single sample does not fit.
        """
        fit, size = 0, 1
        while fit < largest and _runs(partial(work, size)):
            fit, size = size, min(2 * size, largest)
        if not fit:
            raise self._nothing_fits()
        self.size = fit

    def run(self, count: int, work: Callable[[slice, Progress], None], on_step: Progress = silent) -> None:
        """Calls `work` with consecutive slices of `count` rows, at most `size` at a time.

        Rows that run out of memory are repeated in smaller slices, so `work` must be able to start
        over. It gets the rows and a callback for its progress, which `on_step` receives; a negative
        number takes back the progress of a failed attempt.
        """
        start = 0
        while start < count:
            rows, reported = slice(start, min(start + self.size, count)), 0

            def report(done: int) -> None:
                nonlocal reported
                reported += done
                on_step(done)

            if self.fits(partial(work, rows, report), rows.stop - rows.start):
                start = rows.stop
            else:
                on_step(-reported)

    def fits(self, work: Callable[[], None], largest: int) -> bool:
        """Calls `work`, which has at most `largest` samples in a network call.

        Returns False if `work` ran out of memory; `size` is then half of `largest`, and the caller
        must undo what `work` changed.
        """
        try:
            work()
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not self.adaptive:
                raise self._too_large(largest) from error
            if largest == 1:
                raise self._nothing_fits() from error
        # Not inside the handler: there the traceback still holds the tensors of the failed attempt.
        clear_device_cache(garbage_collection=True)
        self.size = largest // 2
        problem, consequence = f"{self.setting} = {largest} does not fit into memory", "the speed and not the result"
        warnings.warn(f"{problem}: going on with {self.size}, which changes {consequence}", stacklevel=2)
        return False

    @contextmanager
    def settled(self) -> Iterator[None]:
        """A context inside which the size is not halved: running out of memory is an error."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise self._too_large(self.size) from error
            raise

    def _nothing_fits(self) -> EtudeError:
        return EtudeError(
            f"a single sample does not fit into memory ({self.setting} is down to 1): lower the resolution, use "
            "bfloat16, or switch on memory.gradient_checkpointing and memory.offload."
        )

    def _too_large(self, failed: int) -> EtudeError:
        return EtudeError(
            f"{self.setting} = {failed} does not fit into memory, and is not lowered where several processes depend on "
            f"one another: set {self.setting} to less."
        )


def _runs(work: Callable[[], object]) -> bool:
    """Whether `work` runs without running out of memory, which is then cleared."""
    try:
        work()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    clear_device_cache(garbage_collection=True)
    return False

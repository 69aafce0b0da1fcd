"""How many samples go through a network at once: what fits into memory, found by halving, without changing any result.

Noise is keyed by sample, gradients are sums over samples: the size of a micro-batch is a matter of memory and speed alone (and of
the last bits, since kernels of another shape round otherwise).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from etude.errors import EtudeError

Progress = Callable[[int], None]
_LIBRARIES_SAY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of torch, a device's library or Python, says that memory is used up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    told = isinstance(error, RuntimeError) and any(status in str(error) for status in _LIBRARIES_SAY)
    return told or (isinstance(error, Exception) and should_reduce_batch_size(error))


def silent(done: int) -> None:
    """Ignore progress: the callback where nobody watches."""


class MicroBatch:
    """The size of one phase's micro-batches. A size that runs out of memory is halved, with a warning, and stays so.

    Args:
        size: the most samples at once.
        setting: where the user sets it, for messages.
        adaptive: whether to halve at all. It must be False where the network's calls are collective, since every process must make
            as many.

    Raises:
        EtudeError: from `run` and `fits`, when one sample alone does not fit, or when it does not and may not adapt.
    """

    def __init__(self, size: int, setting: str, adaptive: bool = True) -> None:
        self.size, self.setting, self.adaptive = size, setting, adaptive

    @classmethod
    def of(cls, size: int | MicroBatch, setting: str = "batch_size") -> MicroBatch:
        """The size itself, or one that starts from a number."""
        return size if isinstance(size, MicroBatch) else cls(size, setting)

    def run(self, count: int, work: Callable[[slice, Progress], None], on_step: Progress = silent) -> None:
        """Calls `work` with consecutive slices of `count` rows, at most `size` at a time.

        Rows that run out of memory are worked through again in smaller slices, so `work` must be able to start over.

        Args:
            work: takes the rows, and what it reports its progress to.
            on_step: receives that progress; a negative number takes back that of an attempt that failed.
        """
        start = 0
        while start < count:
            rows, reported = slice(start, min(start + self.size, count)), 0

            def report(done: int) -> None:
                nonlocal reported
                reported += done
                on_step(done)

            if self.fits(lambda rows=rows, report=report: work(rows, report), rows.stop - rows.start):  # type: ignore[misc]
                start = rows.stop
            else:
                on_step(-reported)

    def fits(self, work: Callable[[], None], largest: int) -> bool:
        """Does `work` on at most `largest` samples at once; False if it ran out of memory, whereupon `size` is smaller.

        What `work` changed by then is for the caller to undo.
        """
        try:
            work()
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._halve(largest, error)
        # After the handler: while it runs, the traceback holds the tensors of the failed attempt.
        clear_device_cache(garbage_collection=True)
        return False

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, the size is not halved: what does not fit is an error."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise self._too_large(self.size) from error
            raise

    def _too_large(self, failed: int) -> EtudeError:
        return EtudeError(
            f"{self.setting} = {failed} does not fit into memory, and is not lowered where several processes depend on one another: "
            f"set {self.setting} to less."
        )

    def _halve(self, failed: int, error: Exception) -> None:
        if not self.adaptive:
            raise self._too_large(failed) from error
        if failed == 1:
            raise EtudeError(
                f"a single sample does not fit into memory ({self.setting} is down to 1): lower the resolution, use bfloat16, "
                "or switch on memory.gradient_checkpointing and memory.offload."
            ) from error
        self.size = failed // 2
        warnings.warn(
            f"{self.setting} = {failed} does not fit into memory: going on with {self.size}, which changes the speed and not the result",
            stacklevel=3,
        )

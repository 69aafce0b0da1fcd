"""Scoring in the background: an event loop for requests, and threads for code of this process.

All threads are daemons, because a reward that never returns cannot be stopped from outside and must
not keep the process alive. If such a thread is inside torch when Python exits, Python aborts (the
thread is unwound through C++). A program therefore ends by `leave`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_LOCAL = "local-rewards"
_starting = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None


def in_event_loop(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Runs the coroutine, which a cancelled future cancels, on the loop of all remote rewards."""
    global _loop, _thread
    with _starting:
        # A forked process inherits the variables, but no thread.
        if _loop is None or _thread is None or not _thread.is_alive():
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_loop.run_forever, name="remote-rewards", daemon=True)
            _thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, _loop)


class InTurn:
    """Runs calls one after another, in the order of submission, on threads beside the caller's.

    Networks on one device would otherwise compete for its memory.
    """

    def __init__(self) -> None:
        self._last: threading.Thread | None = None

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """A future of `work()`; `Future.result` raises what `work` raises."""
        import torch

        future: Future[T] = Future()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        arguments = (future, work, self._last, device)
        self._last = threading.Thread(target=_work, args=arguments, name=_LOCAL, daemon=True)
        self._last.start()
        return future


def leave(code: int) -> NoReturn:
    """Ends the program with an exit code, also while a reward is still running."""
    if any(thread.name == _LOCAL for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _work(future: Future[T], work: Callable[[], T], before: threading.Thread | None, cuda_device: int | None) -> None:
    if before is not None:
        before.join()
    if not future.set_running_or_notify_cancel():
        return
    try:
        if cuda_device is not None:  # in a new thread the current device is the first one
            import torch

            torch.cuda.set_device(cuda_device)
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)

"""Scores that are computed while something else goes on: an event loop for requests, and threads for code of this process.

All threads are daemons. A reward that never returns cannot be stopped from outside, and must not keep the process from ending. One that is
inside torch then would make Python abort on its way out (its thread is unwound through C++), so a program leaves by `leave`.
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
    """Runs the coroutine on the one event loop that all remote rewards share. Cancelling the future cancels the coroutine."""
    return asyncio.run_coroutine_threadsafe(coroutine, _running_loop())


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop, _thread
    with _starting:
        if _loop is None or _thread is None or not _thread.is_alive():  # a forked process inherits no threads
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_loop.run_forever, name="remote-rewards", daemon=True)
            _thread.start()
        return _loop


class InTurn:
    """Does one thing after another, in the order in which they were given, on a thread beside the caller's.

    One at a time, because networks that share a device would compete for its memory.
    """

    def __init__(self) -> None:
        self._last: threading.Thread | None = None

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """The result of `work()`, once it is there; whatever it raises is raised by `Future.result`."""
        future: Future[T] = Future()
        self._last = threading.Thread(
            target=_work, args=(future, work, self._last, _cuda_device()), name=_LOCAL, daemon=True
        )
        self._last.start()
        return future


def leave(code: int) -> NoReturn:
    """Ends the program with an exit code, whatever a reward is still doing."""
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
        if cuda_device is not None:  # each thread has its own current device, which begins as the first
            import torch

            torch.cuda.set_device(cuda_device)
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _cuda_device() -> int | None:
    import torch

    return torch.cuda.current_device() if torch.cuda.is_initialized() else None

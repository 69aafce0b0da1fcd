"""Scoring in the background: an event loop for requests, and one thread for all local rewards.

Local rewards are built, loaded and called on that thread, so that a reward may hold what belongs to
a thread, such as a connection of sqlite. Both threads are daemons, because a reward that never
returns cannot be stopped from outside and must not keep the process alive. If its thread is inside
torch when Python exits, Python aborts (the thread is unwound through C++). A program therefore ends
by `leave`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_running: set[Future[Any]] = set()  # on this thread or on one that it has replaced
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


class Turn(Future[Any]):
    """A call of local code that waits for its turn, runs or has ended.

    Attributes:
        given_up: whether nobody waits for it any more. If it still runs when the next call is
            submitted, it counts as hung.
    """

    given_up = False


Work = tuple[Turn, Callable[[], Any], Any]


class LocalThread:
    """Runs calls one after another, in the order of submission, all on one thread beside the caller's.

    Networks on one device would otherwise compete for its memory. The thread is replaced only if it
    hangs in a call that was given up, or was lost by a fork.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._waiting: SimpleQueue[Work | None] = SimpleQueue()
        self.running: set[Turn] = set()

    def submit(self, work: Callable[[], Any]) -> Turn:
        """A future of `work()`; a call from the thread itself runs at once."""
        import torch

        turn = Turn()
        if threading.current_thread() is self._thread:
            _run(turn, work)
            return turn
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        with _starting:
            if (
                self._thread is None
                or not self._thread.is_alive()
                or any(each.given_up for each in tuple(self.running))
            ):
                self._begin()
            self._waiting.put((turn, work, device))
        return turn

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of `function(*arguments)`, computed on the thread."""
        turn = self.submit(lambda: function(*arguments))
        try:
            result: T = turn.result()
            return result
        finally:
            turn.given_up = not turn.done()

    def _begin(self) -> None:
        """Starts a thread, which takes over the calls that wait."""
        before, self._waiting = self._waiting, SimpleQueue()
        while True:
            try:
                self._waiting.put(before.get_nowait())
            except Empty:
                break
        before.put(None)
        self.running = set()
        arguments = self._waiting, self.running
        self._thread = threading.Thread(target=_work, args=arguments, name="local-rewards", daemon=True)
        self._thread.start()


LOCAL = LocalThread()
"""The thread of this process's local rewards."""


def leave(code: int) -> NoReturn:
    """Ends the program with an exit code, also while a reward is still running."""
    if _running:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _work(waiting: SimpleQueue[Work | None], running: set[Turn]) -> None:
    while (work := waiting.get()) is not None:
        turn, function, cuda_device = work
        running.add(turn)
        _running.add(turn)
        try:
            if cuda_device is not None:  # in a new thread the current device is the first one
                import torch

                torch.cuda.set_device(cuda_device)
            _run(turn, function)
        finally:
            running.discard(turn)
            _running.discard(turn)
        del work, turn, function


def _run(turn: Turn, work: Callable[[], Any]) -> None:
    if not turn.set_running_or_notify_cancel():
        return
    try:
        turn.set_result(work())
    except BaseException as error:
        turn.set_exception(error)

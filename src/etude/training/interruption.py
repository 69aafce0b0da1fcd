"""Ctrl-C and SIGTERM: the first asks a run to stop where nothing is lost, the second ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from etude.learning.exchange import gather

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run ended because a signal asked for it. The message is one sentence that says how to continue.

    Attributes:
        signum: number of the signal. A program that ends by a signal has the exit code 128 +
            signum: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class Interruption:
    """Context in which the first SIGINT or SIGTERM is noted and the second ends the process at once.

    The run must look at `signum` and stop. A signal that the parent process had switched off
    (`nohup`, background jobs) stays off. Outside the main thread, where Python cannot handle
    signals, nothing changes.

    Attributes:
        signum: signal that arrived in this process or in another one of the run; None before any.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def name(self) -> str:
        """Name of the signal that arrived."""
        assert self.signum is not None
        return signal.Signals(self.signum).name

    def share(self, accelerator: Accelerator) -> bool:
        """Whether any process has received a signal. All must call this; all get the same answer."""
        own = torch.tensor([self.signum or 0])
        anywhere = int(gather(accelerator, own, accelerator.num_processes).max())
        # A signal that arrives during the exchange is known here alone; the next exchange reports it.
        self.signum = anywhere or self.signum
        return anywhere > 0

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received:
            _say("ended at once; what is on the disk is intact, and --resume continues from it.\n")
            os._exit(128 + signum)
        # Only a signal to this process counts as the first. A launcher forwards one Ctrl-C to its
        # processes in turn; the copy that arrives late must not be taken for a second Ctrl-C.
        self._received, self.signum = True, signum
        if sys.stderr is not None and sys.stderr.isatty():
            _say("stopping where nothing is lost; once more ends at once.\n")


def _say(text: str) -> None:
    """Writes straight to the terminal: a handler may interrupt any code, also that of buffers."""
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""
    try:
        os.write(2, f"{show_cursor}\n{text}".encode())
    except OSError:
        return  # the terminal is gone, and nobody is left to read it

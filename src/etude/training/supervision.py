"""The supervision of a run: it times and shows phases, obeys signals, and explains failures."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed import DistError

from etude import terminal
from etude.errors import EtudeError
from etude.learning.exchange import gather
from etude.training.durability import Durability
from etude.training.processes import SharedFailureError
from etude.training.progress import Display

COMMANDS = (signal.SIGINT, signal.SIGTERM)
"""Signals by which somebody ends a run; the second one ends it at once."""
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals by which a terminal that goes, or a scheduler before its limit, tells a run to end. They may come several times."""


class Interrupted(KeyboardInterrupt):
    """A run ended because a signal asked for it. The message is one sentence that says how to continue."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum  # the exit code is 128 + signum: 130 for SIGINT, 143 for SIGTERM


class Interruption:
    """Context in which signals are noted, for the run to end where nothing is lost.

    The second of `COMMANDS` ends the `etude` program at once. In another program, such as a
    notebook's kernel, it does there what it did before the run: SIGINT raises KeyboardInterrupt.

    A signal that the parent process had switched off (`nohup`, background jobs) stays off, and one
    of `WARNINGS` for which the program has a handler stays the program's. Outside the main thread,
    where Python cannot handle signals, nothing changes.
    """

    def __init__(self) -> None:
        self.signum: int | None = None  # the signal that arrived, in this process or in another one of the run
        self._received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (*COMMANDS, *WARNINGS):
                present = signal.getsignal(number)
                # None: a handler that is not Python's, which could not be put back.
                if present is signal.SIG_DFL or (number in COMMANDS and present not in (signal.SIG_IGN, None)):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def arrived(self, accelerator: Accelerator) -> bool:
        """Whether any process has received a signal. All must call this; all get the same answer."""
        if accelerator.num_processes == 1:
            return self.signum is not None
        own = torch.tensor([self.signum or 0])
        anywhere = int(gather(accelerator, own, accelerator.num_processes).max())
        # A signal that arrives during the exchange is known here alone; the next exchange reports it.
        self.signum = anywhere or self.signum
        return anywhere > 0

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received and signum in COMMANDS:
            if terminal.own_program:
                _say("ended at once; what is on the disk is intact, and --resume continues from it.\n")
                os._exit(128 + signum)
            signal.signal(signum, self._before[signum])
            signal.raise_signal(signum)
            return
        if self.signum is not None and signum in WARNINGS:
            return  # the run is ending already
        # Only a signal to this process counts as the first. A launcher forwards one Ctrl-C to its
        # processes in turn; the copy that arrives late must not be taken for a second Ctrl-C.
        self._received, self.signum = signum in COMMANDS, signum
        if sys.stderr is not None and sys.stderr.isatty():
            _say(f"stopping where nothing is lost{'; once more ends at once' * self._received}.\n")


def _say(text: str) -> None:
    """Writes straight to the terminal: a handler may interrupt any code, also that of buffers."""
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""
    with suppress(OSError):  # the terminal may be gone, and nobody is left to read it
        os.write(2, f"{show_cursor}\n{text}".encode())


class Supervisor:
    """Times the phases of a run (`seconds`, by name), ends it on a signal, and explains its failures."""

    def __init__(self, accelerator: Accelerator, durability: Durability, display: Display) -> None:
        self.accelerator, self.durability, self.display = accelerator, durability, display
        self.interruption = Interruption()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Context that times and shows a phase. The run may end before the phase begins."""
        self.end_if_asked()
        self.display.phase(name, total)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def advance(self, done: int) -> None:
        """Shows progress, and ends a run of one process here if a signal asked for it."""
        self.display.advance(done)
        if self.accelerator.num_processes == 1:
            self.end_if_asked()  # several processes end only together: between phases and optimiser steps

    def end_if_asked(self) -> None:
        """Ends the run here (Interrupted) if a signal asked for it and no finished iteration would be lost.

        If the last finished iteration is not yet in a checkpoint and the weights have moved on, the
        run does not end here: the present iteration is finished and saved first.
        """
        ledger, asked = self.durability.ledger, self.interruption.arrived(self.accelerator)
        signum = self.interruption.signum
        if asked and signum is not None and ledger.may_stop:
            name = signal.Signals(signum).name
            raise Interrupted(f"interrupted by {name} in iteration {ledger.iteration}", signum)

    @contextmanager
    def failures_explained(self) -> Iterator[None]:
        """Context that saves an unsaved iteration after a failure and names the checkpoint that is left."""
        checkpoints = self.durability.checkpoints
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            unsaved, known_to_all = self.durability.ledger.unsaved, isinstance(error, Interrupted | SharedFailureError)
            # Sharded tensors can only be assembled by all processes together.
            if unsaved is not None and (known_to_all or not self.durability.in_parts):
                self.durability.save(unsaved)
            if known_to_all:
                self.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
            if isinstance(error, Interrupted):
                raise Interrupted(f"{error}: {checkpoints.advice()}.", error.signum) from None
            # The error of NCCL or the store, or of gloo, if another process is gone.
            of_a_lost_process = isinstance(error, DistError) or (
                isinstance(error, RuntimeError) and "gloo" in str(error)
            )
            if self.accelerator.num_processes > 1 and of_a_lost_process:
                raise EtudeError(
                    "another process of the run has ended, and its own message or the launcher's says why "
                    f"({checkpoints.remaining()})."
                ) from error
            if not isinstance(error, EtudeError):
                raise
            kind = SharedFailureError if isinstance(error, SharedFailureError) else EtudeError
            raise kind(f"{str(error).rstrip('.')} ({checkpoints.remaining()}).") from error

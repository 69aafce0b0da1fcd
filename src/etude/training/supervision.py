"""The supervision of a run: it times and shows phases, obeys signals, and explains failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from etude.errors import EtudeError
from etude.runs.checkpoint import Checkpoints
from etude.training.interruption import Interrupted, Interruption
from etude.training.ledger import Ledger
from etude.training.processes import SharedFailureError, is_of_a_lost_process
from etude.training.progress import Display


class Supervisor:
    """Times the phases of a run, ends it on a signal, and explains its failures.

    Args:
        accelerator: processes of the run.
        ledger: stage of the run, which decides whether it may end.
        checkpoints: checkpoints that the run can continue from.
        display: display of the progress.

    Attributes:
        seconds: seconds of each phase of the present iteration.
    """

    def __init__(self, accelerator: Accelerator, ledger: Ledger, checkpoints: Checkpoints, display: Display) -> None:
        self.accelerator, self.ledger, self.checkpoints, self.display = accelerator, ledger, checkpoints, display
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

    def asked_to_end(self) -> bool:
        """Whether any process has received a signal."""
        if self.accelerator.num_processes > 1:
            return self.interruption.share(self.accelerator)
        return self.interruption.signum is not None

    def end_if_asked(self) -> None:
        """Ends the run here if a signal asked for it and no finished iteration would be lost.

        If the last finished iteration is not yet in a checkpoint and the weights have moved on, the
        run does not end here: the present iteration is finished and saved first.

        Raises:
            Interrupted: the run ends.
        """
        may_stop = self.ledger.may_stop
        if self.asked_to_end() and may_stop:
            assert self.interruption.signum is not None
            raise Interrupted(
                f"interrupted by {self.interruption.name} in iteration {self.ledger.iteration}",
                self.interruption.signum,
            )

    @contextmanager
    def failures_explained(self, save: Callable[[int], None], in_parts: bool) -> Iterator[None]:
        """Context that saves an unsaved iteration after a failure and names the checkpoint that is left.

        Args:
            save: writes the checkpoint of an iteration.
            in_parts: whether parameters are sharded, so that all processes must take part in
                `save`.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            # Sharded tensors can only be assembled by all processes together.
            reachable = not in_parts or isinstance(error, Interrupted | SharedFailureError)
            if self.ledger.unsaved is not None and reachable:
                save(self.ledger.unsaved)
            if isinstance(error, Interrupted | SharedFailureError):
                self.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
            if isinstance(error, Interrupted):
                raise Interrupted(f"{error}: {self.checkpoints.advice()}.", error.signum) from None
            if self.accelerator.num_processes > 1 and is_of_a_lost_process(error):
                raise EtudeError(
                    "another process of the run has ended, and its own message or the launcher's says why "
                    f"({self.checkpoints.remaining()})."
                ) from error
            if not isinstance(error, EtudeError):
                raise
            kind = SharedFailureError if isinstance(error, SharedFailureError) else EtudeError
            raise kind(f"{str(error).rstrip('.')} ({self.checkpoints.remaining()}).") from error

"""What surrounds the work of a run: phases are timed and shown, signals are obeyed, failures say what is left."""

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
    """Watches over a run.

    Args:
        accelerator: the processes of the run.
        ledger: says whether the run may end.
        checkpoints: say what it can go on from.
        display: shows the progress.

    Attributes:
        seconds: of each phase of the present iteration.
    """

    def __init__(self, accelerator: Accelerator, ledger: Ledger, checkpoints: Checkpoints, display: Display) -> None:
        self.accelerator, self.ledger, self.checkpoints, self.display = accelerator, ledger, checkpoints, display
        self.interruption = Interruption()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Times what happens inside, and shows it; the run may end before it."""
        self.end_if_asked()
        self.display.phase(name, total)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def advance(self, done: int) -> None:
        """Tells of progress, and ends the run here if a signal asked for it."""
        self.display.advance(done)
        if self.accelerator.num_processes == 1:
            self.end_if_asked()  # several processes end where all of them pass: between phases and optimiser steps

    def asked_to_end(self) -> bool:
        """Whether a signal came, to whichever process."""
        if self.accelerator.num_processes > 1:
            return self.interruption.share(self.accelerator)
        return self.interruption.signum is not None

    def end_if_asked(self) -> None:
        """Ends the run here if a signal asked for it and no finished iteration would be lost.

        If the last finished iteration is not yet in a checkpoint and the weights have moved on, the present iteration is finished
        and saved first.

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
        """Saves after a failure what would be lost, and says which checkpoint is left.

        Args:
            save: writes the checkpoint of an iteration.
            in_parts: whether all processes must take part in that.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            # Parts are brought together by all processes or not at all.
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

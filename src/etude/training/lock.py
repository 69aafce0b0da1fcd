"""Who is writing a run: a lock on its directory that ends with the process, however the process ends.

It leaves no file behind that could lie. File systems without locks are left without one.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etude.errors import EtudeError

PATIENCE = 10
"""How often a lock is tried for in half a second: whoever looks whether a run is alive holds it for an instant."""


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keeps every other process from writing the run in `out`, an existing directory.

    Raises:
        EtudeError: another process is writing it.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        _take(descriptor, out)
        yield
    finally:
        os.close(descriptor)


def is_held(out: Path) -> bool | None:
    """Whether a process is writing the run in `out` now; None if the file system does not tell."""
    try:
        descriptor = os.open(out, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)


def taken(descriptor: int, patient: bool = False) -> bool:
    """Takes the lock of an open file or directory, for as long as it is open; False if another process has it.

    Args:
        patient: for half a second, so as not to take whoever only looks for the one who works.
    """
    for _ in range(PATIENCE if patient else 0):
        if taken(descriptor):
            return True
        time.sleep(0.5 / PATIENCE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _take(descriptor: int, out: Path) -> None:
    if not taken(descriptor, patient=True):
        raise EtudeError(f"another process is writing the run in '{out}': wait for it, end it, or give another --out.")

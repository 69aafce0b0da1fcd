"""Files that a kill leaves whole, and the lock of a directory.

A file is written beside its place, flushed to the disk and renamed: it is there as a whole or not at all. A lock ends with
the process that holds it, however the process ends, and leaves no file behind that could lie.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etude.errors import EtudeError

PATIENCE = 10
"""How often a lock is tried for in half a second: whoever looks whether a run is alive holds it for an instant."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps every other process from writing the run in `out`, an existing directory.

    Raises:
        EtudeError: another process is writing it.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        _lock(descriptor, out)
        yield
    finally:
        os.close(descriptor)


def is_locked(out: Path) -> bool | None:
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


def try_lock(descriptor: int, patient: bool = False) -> bool:
    """Takes the lock of an open file or directory, for as long as it is open; False if another process has it.

    Args:
        patient: for half a second, so as not to take whoever only looks for the one who works.
    """
    for _ in range(PATIENCE if patient else 0):
        if try_lock(descriptor):
            return True
        time.sleep(0.5 / PATIENCE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _lock(descriptor: int, out: Path) -> None:
    if not try_lock(descriptor, patient=True):
        raise EtudeError(f"another process is writing the run in '{out}': wait for it, end it, or give another --out.")


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or leaves the old one: a temporary sibling, flushed to the disk, then renamed.

    The sibling is this process's own: several may write one file at once, and whoever renames last wins.

    Raises:
        EtudeError: the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.writing")
    with _explained(path, len(data)):
        try:
            write_synced(temporary, data)
            os.replace(temporary, path)
            sync(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text, line ends as given."""
    atomic_write_bytes(path, text.encode("utf-8"))


def append_line(path: Path, text: str) -> None:
    """Appends one line and returns when it is on the disk. A kill can leave the line torn: see `truncate_metrics`.

    Raises:
        EtudeError: the text holds a line break, or the disk does not take it.
    """
    if "\n" in text:
        raise EtudeError(f"a line for '{path}' must not hold a line break: {text[:60]!r}.")
    data = text.encode("utf-8") + b"\n"
    with _explained(path, len(data)), open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_synced(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)


def sync(path: Path) -> None:
    """Makes the content of a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EtudeError(
            f"'{path}' could not be written ({reason(error)}, {size / 1e6:.3f} MB needed): "
            "free some space or check the permissions there."
        ) from error

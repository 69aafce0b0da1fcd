"""Files that a kill leaves whole, and the lock of a directory.

A file is written under a temporary name, flushed to the disk and renamed: it exists as a whole or
not at all. A lock ends with the process that holds it, however the process ends, and leaves no
stale file behind.
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
"""Attempts to take a lock within half a second (`is_locked` elsewhere holds it for an instant)."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps every other process from writing the run in `out`, an existing directory.

    Raises:
        EtudeError: another process is writing the run.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        if not try_lock(descriptor, patient=True):
            raise EtudeError(
                f"another process is writing the run in '{out}': wait for it, end it, or give another --out."
            )
        yield
    finally:
        os.close(descriptor)


def is_locked(out: Path) -> bool | None:
    """Whether a process is writing the run in `out` now; None if the file system has no locks."""
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
    """Takes the lock of an open file or directory, until the descriptor is closed.

    Args:
        patient: whether to try for half a second, since a process that only looks (`is_locked`)
            holds the lock for an instant. Default: False.

    Returns:
        False if another process has the lock; True also on a file system without locks.
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


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or leaves the old one.

    A temporary file beside it is written, flushed to the disk, then renamed. Each process has its
    own temporary file: several may write one file at once, and the last to rename wins.

    Raises:
        EtudeError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.writing")
    with _explain_failure(path, len(data)):
        try:
            write_synced(temporary, data)
            os.replace(temporary, path)
            sync(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of a text in UTF-8; line ends stay as they are."""
    atomic_write_bytes(path, text.encode("utf-8"))


def append_line(path: Path, text: str) -> None:
    """Appends one line and returns when it is on the disk.

    A kill can leave the line torn: see `etude.runs.layout.truncate_metrics`.

    Raises:
        EtudeError: the text holds a line break, or the file cannot be written.
    """
    if "\n" in text:
        raise EtudeError(f"a line for '{path}' must not hold a line break: {text[:60]!r}.")
    data = text.encode("utf-8") + b"\n"
    with _explain_failure(path, len(data)), open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and returns when it is on the disk."""
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
    """The operating system's words for an error, or the error's own text."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def _explain_failure(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EtudeError(
            f"'{path}' could not be written ({reason(error)}, {size / 1e6:.3f} MB needed): "
            "free some space or check the permissions there."
        ) from error

"""Files that a kill leaves whole, and the lock of a directory.

A file is written under a temporary name, flushed to the disk and renamed: it exists as a whole or
not at all. A lock ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from etude.errors import EtudeError

PATIENCE = 10
"""Attempts to take a lock within half a second (`is_locked` elsewhere holds it for an instant)."""
WHOLE = 1 << 26
"""Largest size in bytes of a file that `fingerprint` reads as a whole."""
SAMPLE, STRIDE = 1 << 12, 1 << 24
"""Bytes of a sample of a larger file, and the longest way in bytes from one sample to the next."""


@contextmanager
def made(directory: Path) -> Iterator[None]:
    """Makes a directory and its parents; those that are then still empty are removed again."""
    absent = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty, nor are its parents
            for place in absent:
                place.rmdir()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps every other process from writing the run in `out`, or raises if one is writing it."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        if not try_lock(descriptor, patient=True):
            remedy = "wait for it, end it, or give another --out"
            raise EtudeError(f"another process is writing the run in '{out}': {remedy}.")
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
    """Takes the lock of an open file or directory until it is closed; False if another process has it.

    It tries for half a second if `patient`. On a file system without locks it returns True.
    """
    for attempt in range(PATIENCE + 1 if patient else 1):
        if attempt:
            time.sleep(0.5 / PATIENCE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            continue
        except OSError:
            return True
    return False


@contextmanager
def atomically(path: Path, size: int | None = None) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what was written there takes its place as a whole, or not at all.

    Each process has its own temporary file: several may write one file at once, and the last wins.
    An `EtudeError` says why the file, of so many bytes, cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.writing")
    with _explain_failure(path, size):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or leaves the old one; an `EtudeError` says why it cannot be written."""
    with atomically(path, len(data)) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of a text in UTF-8; line ends stay as they are."""
    atomic_write_bytes(path, text.encode("utf-8"))


def append_line(path: Path, text: str) -> None:
    """Appends one line, which is then on the disk, or raises as `atomic_write_bytes`.

    A kill can leave the line torn (`etude.runs.layout.truncate_metrics`).
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


def fingerprint(path: Path) -> str:
    """SHA-256 that tells whether a file has changed, in hexadecimal digits.

    Up to `WHOLE` bytes it is that of the content. Of a larger file the size is read, the header of
    a safetensors file, and a sample of `SAMPLE` bytes at the beginning, the middle and the end of
    each tensor and wherever `STRIDE` bytes have gone by: 15 MB in 4,200 reads for FLUX's 24 GB. Training or
    merging changes a tensor all over and is seen; a change of a few bytes in a large file need not be.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for place, length in _samples(file.fileno(), size):
            digest.update(os.pread(file.fileno(), length, place))
    return digest.hexdigest()


def fingerprints(files: Mapping[str, Path]) -> dict[str, str]:
    """`fingerprint` of each file, by its name here. A file that cannot be read is left out."""
    found = {}
    for name, path in files.items():
        with suppress(OSError):
            found[name] = fingerprint(path)
    return found


def _samples(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """(place, length) of what is read of a large file of `size` bytes."""
    header, ends = 8 + int.from_bytes(os.pread(descriptor, 8, 0), "little"), {size}  # as safetensors begins
    try:
        entries = json.loads(os.pread(descriptor, header - 8, 8)).items() if header <= WHOLE else ()
        offsets = [header + int(entry["data_offsets"][1]) for name, entry in entries if name != "__metadata__"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
        offsets = []  # another format, or damage that the loader will name
    if offsets:
        yield 0, header
        ends |= {end for end in offsets if header < end < size}
    begin = header if offsets else 0
    for end in sorted(ends):
        for place in range(begin, end, max(1, min(STRIDE, (end - begin) // 2))):
            yield place, min(SAMPLE, end - place)
        yield max(begin, end - SAMPLE), min(SAMPLE, end - begin)
        begin = end


def reason(error: Exception) -> str:
    """The operating system's words for an error, or the error's own text."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def _explain_failure(path: Path, size: int | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        needed = "" if size is None else f", {size / 1e6:.3f} MB needed"
        problem = f"'{path}' could not be written ({reason(error)}{needed})"
        raise EtudeError(f"{problem}: free some space or check the permissions there.") from error

"""The directory of a run: whether the run may write to it, whether it is the run that it holds, and what it can resume from."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from etude.errors import EtudeError
from etude.files import atomic_write_bytes

BEST = "-best"
"""Suffix of the directory with the best weights: `lora-best` beside `lora`."""


def check_directory(out: Path, resume: bool) -> None:
    """Refuses to mix two runs. The directory is made when the run starts, so that a refused one leaves nothing.

    Halves of files that a killed run was writing (`.NAME.HOST-PID.writing`) do not count: nothing was begun in such a directory.

    Raises:
        EtudeError: it is a file, holds something without `resume`, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise EtudeError(f"--out '{out}' is a file; give a directory.")
    if not resume and holds_something(out):
        raise EtudeError(
            f"--out '{out}' is not empty: give --resume to continue the run it holds, or another directory."
        )
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise EtudeError(
            f"--out '{out}' cannot be written: check the permissions of '{parent}', or give another directory."
        )


def holds_something(out: Path) -> bool:
    """Whether anything but the halves of files that a killed run was writing (`.NAME.HOST-PID.writing`) is there."""
    if not out.is_dir():
        return out.exists()
    return any(not _half_written(entry) for entry in out.iterdir())


def clear_half_written(out: Path) -> None:
    """Removes the half-written files of a killed run."""
    for entry in out.iterdir():
        if _half_written(entry) and entry.is_file():
            entry.unlink()


def _half_written(entry: Path) -> bool:
    return re.fullmatch(r"\..+\.writing", entry.name) is not None


def truncate_metrics(path: Path, iteration: int) -> None:
    """Atomically drops the rows of a JSON-lines file with `"iteration"` above `iteration`, and a torn last line.

    The rows that stay keep their bytes. A file that does not exist is left so.

    Raises:
        EtudeError: a line before the last is not a JSON object with an integer `"iteration"`.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    *lines, torn = data.split(b"\n")  # what follows the last line break was never finished
    kept = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None and number < len(lines):
            raise EtudeError(
                f"'{path}', line {number} is not a metrics row: mend or remove it, or start anew in another --out."
            )
        if row is not None and row <= iteration:
            kept.append(line + b"\n")
    if torn or len(kept) < len(lines):
        atomic_write_bytes(path, b"".join(kept))


def last_iteration(path: Path) -> int:
    """The largest `"iteration"` of a JSON-lines file; -1 if it has none."""
    rows = [_row(line) for line in path.read_bytes().split(b"\n")] if path.exists() else []
    return max((row for row in rows if row is not None), default=-1)


def _row(line: bytes) -> int | None:
    try:
        value = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, int) else None

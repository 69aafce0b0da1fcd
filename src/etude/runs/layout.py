"""The directory of a run: whether a run may write to it, and its rows of metrics."""

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
    """Refuses a directory that a run may not write to. It is created only when the run starts, so that
    a refused run leaves nothing behind.

    Raises:
        EtudeError: `out` is a file, is not empty without `resume`, or cannot be written.
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
    """Whether there is more than half-written files of a killed run (`.NAME.HOST-PID.writing`)."""
    return out.exists() if not out.is_dir() else not all(_half_written(entry) for entry in out.iterdir())


def clear_half_written(out: Path) -> None:
    """Removes the half-written files of a killed run, also those in its folders."""
    for entry in [*out.rglob(".*.writing")]:
        if _half_written(entry) and entry.is_file():
            entry.unlink()


def _half_written(entry: Path) -> bool:
    return re.fullmatch(r"\..+\.writing", entry.name) is not None


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drops rows of a JSON-lines file with `"iteration"` above `iteration`, and a torn last line.

    The file is replaced atomically, and the other rows keep their bytes.

    Raises:
        EtudeError: a line before the last is not a JSON object with an integer `"iteration"`.
    """
    if not path.exists():
        return
    *lines, torn = path.read_bytes().split(b"\n")  # a killed run leaves text after the last line break
    remaining = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None and number < len(lines):
            raise EtudeError(
                f"'{path}', line {number} is not a metrics row: mend or remove it, or start anew in another --out."
            )
        if row is not None and row <= iteration:
            remaining.append(line + b"\n")
    if torn or len(remaining) < len(lines):
        atomic_write_bytes(path, b"".join(remaining))


def last_iteration(path: Path) -> int:
    """The largest `"iteration"` of a JSON-lines file; -1 without any row."""
    rows = [_row(line) for line in path.read_bytes().split(b"\n")] if path.exists() else []
    return max((row for row in rows if row is not None), default=-1)


def _row(line: bytes) -> int | None:
    try:
        value = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, int) else None

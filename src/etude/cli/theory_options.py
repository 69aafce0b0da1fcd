"""Values that the commands of `etude theory` share: numbers within limits, and the directory of results."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from etude.errors import EtudeError

LINE = "One number, or one per dimension: 1,0.5,2."


def numbers(text: str, option: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise EtudeError(f"{option} is '{text}', which is not a list of numbers: write 1 or 1,0.5,2.") from None
    return [number(value, option) for value in values]


def number(
    value: float, option: str, above: float | None = None, least: float | None = None, most: float | None = None
) -> float:
    """Return a finite number within the limits; EtudeError for any other."""
    if not abs(value) < float("inf"):
        raise EtudeError(f"{option} is {value:g}: give a finite number.")
    if above is not None and value <= above:
        raise EtudeError(f"{option} is {value:g}, but it must be above {above:g}.")
    if least is not None and value < least:
        raise EtudeError(f"{option} is {value:g}, but it must be at least {least:g}.")
    if most is not None and value > most:
        raise EtudeError(f"{option} is {value:g}, but it must be at most {most:g}.")
    return value


def step_count(value: int) -> int:
    if not 1 <= value <= 1000:
        raise EtudeError(f"--steps is {value}, but it must be between 1 and 1000.")
    return value


@contextmanager
def directory(out: Path) -> Iterator[None]:
    """Make the directory before anything is computed; undo it if the work fails."""
    new: list[Path] = []
    try:
        if out.is_file():
            raise EtudeError(f"--out is {out}, which is a file: give a directory.")
        new = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        yield
    except BaseException as error:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            reason = (error.strerror or str(error)).lower()
            raise EtudeError(f"--out is {out}, which cannot be written ({reason}): give another directory.") from error
        raise


def json_text(report: dict[str, Any]) -> str:
    try:
        return json.dumps(report, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise EtudeError(
            "some results are beyond the range of float64: give a mean, variance, reward and beta nearer to 1."
        ) from None

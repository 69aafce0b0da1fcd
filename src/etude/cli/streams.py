"""Standard output and error of the program, which outlast their readers.

A terminal that is closed and a pipe whose reader has ended (`| head -1`) end no command: the text
goes nowhere from then on, also that of rewards, libraries and child processes. With NO_COLOR, and on
a terminal without colours, all text is written without them, whoever chose them.
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import sys
from typing import Any

from etude.errors import EtudeError

_COLOUR = re.compile(rb"\x1b\[[0-9;:]*m")
_READER_GONE = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET}


class LastingStream(io.FileIO):
    """The bytes of a standard stream, until its first failure; afterwards `/dev/null` takes its place."""

    def __init__(self, number: int, only_shows: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self.only_shows = only_shows  # otherwise a full disk is an error, since the text is the result
        self.gone = False  # whether the reader has gone away
        self.plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in {"dumb", "unknown"}

    def write(self, data: Any) -> int:
        """Writes all of `data`. Waits for a reader of a pipe that was set to return at once."""
        plain = _COLOUR.sub(b"", data) if self.plain else data
        rest = memoryview(plain).cast("B")
        try:
            while rest:
                written = super().write(rest)
                if written is None:
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        except OSError as error:
            self.gone = error.errno in _READER_GONE
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # so that nothing fails again, not even the last flush
            os.close(nowhere)
            if not (self.only_shows or self.gone):
                raise EtudeError(
                    f"the standard output could not be written ({error.strerror}): free some space there, or send it elsewhere."
                ) from error
        return memoryview(data).nbytes


def outlast_readers() -> None:
    """Puts streams that outlast their readers in the place of `sys.stdout` and `sys.stderr`.

    A stream that a caller has put there, and that is not the process's own, stays as it is.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed by the parent; otherwise the next file that is opened would get the number
            os.open(os.devnull, os.O_RDWR)
    if _writes_to(sys.stdout, 1):
        sys.stdout = _lasting(sys.stdout, 1, only_shows=False)
    if _writes_to(sys.stderr, 2):
        sys.stderr = _lasting(sys.stderr, 2, only_shows=True)


def only_shows() -> None:
    """Says that the results of this command are files, so that no failure of the standard output ends it."""
    if (raw := _raw(sys.stdout)) is not None:
        raw.only_shows = True


def reader_is_gone() -> bool:
    """Whether nobody reads the standard output any more."""
    raw = _raw(sys.stdout)
    return raw is not None and raw.gone


def _writes_to(stream: Any, number: int) -> bool:
    """Whether a stream is Python's own for a descriptor; it is None if the parent closed that."""
    try:
        return stream is None or (isinstance(stream, io.TextIOWrapper) and stream.fileno() == number)
    except OSError:  # it has no descriptor
        return False


def _lasting(stream: Any, number: int, only_shows: bool) -> io.TextIOWrapper:
    """A text stream like `stream`, which writes what its encoding lacks as `\\xNN` instead of failing."""
    raw = LastingStream(number, only_shows)
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")
    at_once = stream.write_through
    return io.TextIOWrapper(
        raw if at_once else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=at_once,
    )


def _raw(stream: Any) -> LastingStream | None:
    """The bytes below a text stream, if they outlast their reader."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, LastingStream) else None

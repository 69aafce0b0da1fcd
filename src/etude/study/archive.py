"""The archive of a study: one file in place of the folders of its cells, never extracted."""

from __future__ import annotations

import io
import lzma
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from etude.errors import EtudeError, brief, brief_value
from etude.files import atomic_write_bytes, sync

ARCHIVE = "cells.tar.xz"
"""Name of the archive in the directory of a study."""
CELL_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "scores.json", "samples/study.png")
"""Files of a cell from which results are made. The first marks its folder as a run."""
MOST, LARGEST = 100_000, 1 << 30
"""Files of an archive, and its bytes, packed and unpacked."""
_MEMORY = 1 << 28  # bytes that decompression may use
_PART = r"[A-Za-z0-9_+][A-Za-z0-9._+-]*"
_NAME = re.compile(rf"base/{_PART}|cells/{_PART}/(?:{'|'.join(map(re.escape, CELL_FILES))})")


def archived_files(path: Path) -> Mapping[str, bytes]:
    """`read_archive`, once for each state of the file; empty where there is none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return _read_once(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _read_once(path: Path, *version: int) -> Mapping[str, bytes]:
    return read_archive(path)


def accepts(name: str) -> bool:
    """Whether an archive may hold a file of that name."""
    return _NAME.fullmatch(name) is not None


def archive_bytes(files: Mapping[str, bytes]) -> bytes:
    """The archive of some files, by name: equal files give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    return lzma.compress(buffer.getvalue())


def write_archive(path: Path, files: Mapping[str, bytes]) -> None:
    """Write an archive beside its place, read it back, and only then put it there.

    Raises:
        EtudeError: the archive cannot be written, or reads back otherwise. The old one stays.
    """
    new = path.with_name(f".{path.name}.new")
    atomic_write_bytes(new, archive_bytes(files))
    try:
        if read_archive(new) != files:
            raise EtudeError(f"'{new}' does not hold what was written to it: check the disk.")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)


def read_archive(path: Path) -> dict[str, bytes]:
    """The content of every file of an archive, by its name below the directory of the study.

        cells/<slug>/    one of `CELL_FILES`
        base/            <name>.json and <name>-<images>.png, the base model's scores and images

    Raises:
        EtudeError: the archive is damaged, holds something other than regular files with these
            names, or more than `MOST` files or `LARGEST` bytes.
    """
    try:
        data = _decompress(path)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return dict(_members(tar, data))
    except (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError, tarfile.TarError) as error:
        raise EtudeError(
            f"the archive '{path}' cannot be used ({brief(error)}): restore it, or move it away to run its cells again."
        ) from None


def _decompress(path: Path) -> bytes:
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it is larger than {LARGEST} bytes")
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY)
    data = unpacker.decompress(path.read_bytes(), LARGEST)
    if not unpacker.eof:
        raise ValueError(f"it unpacks to more than {LARGEST} bytes" if len(data) == LARGEST else "its end is missing")
    if unpacker.unused_data:
        raise ValueError("something follows its end")
    return data


def _members(tar: tarfile.TarFile, data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each member of `data`, checked."""
    names: set[str] = set()
    end = 0
    for member in tar:
        if not (member.isreg() and not member.issparse() and accepts(member.name)):
            raise ValueError(f"{brief_value(member.name)} is not a file of a cell or of the base model")
        if member.name in names:
            raise ValueError(f"{member.name} is there twice")
        if len(names) == MOST:
            raise ValueError(f"it holds more than {MOST} files")
        names.add(member.name)
        end = member.offset_data + member.size
        content = data[member.offset_data : end]
        if len(content) != member.size:
            raise ValueError(f"{member.name} is cut off")
        yield member.name, content
    if data[end:].strip(b"\0"):  # tarfile takes a damaged header for the end
        raise ValueError("a header is damaged")

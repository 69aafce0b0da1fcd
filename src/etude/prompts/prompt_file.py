"""Prompt files: plain lines, JSON, JSON lines and tables are read, other formats refused by their names."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from etude.errors import EtudeError, brief
from etude.files import reason

LONGEST = 1 << 28
"""Largest size of a file of prompts in bytes, enough for a few million prompts."""
Entries = dict[str, Any]
"""A text, or a mapping with the field `prompt`, by the place in the file that errors name."""
_REFUSED = {
    "Parquet": (b"PAR1", ".parquet"), "Arrow": (b"ARROW1", ".arrow .feather"), "Excel": (b"\xd0\xcf\x11\xe0", ".xlsx .xls .ods"),
    "ZIP": (b"PK\x03\x04", ".zip .npz .docx"), "gzip": (b"\x1f\x8b", ".gz .tgz"), "bzip2": (b"BZh", ".bz2"), "xz": (b"\xfd7zXZ", ".xz"),
    "Zstandard": (b"\x28\xb5\x2f\xfd", ".zst"), "SQLite": (b"SQLite format 3", ".db .sqlite .sqlite3"), "PDF": (b"%PDF", ".pdf"),
    "HDF5": (b"\x89HDF", ".h5 .hdf5"), "NumPy": (b"\x93NUMPY", ".npy"), "pickle": (b"\x80", ".pkl .pickle .pt .pth"),
    "YAML": (b"%YAML", ".yaml .yml"), "TOML": (None, ".toml"), "XML": (b"<?xml", ".xml"), "HTML": (b"<!DOCTYPE", ".html .htm"),
}  # fmt: skip
"""Formats that are not read: the bytes with which their files begin, and the ends of their names."""
REMEDY = "write one prompt per line, a JSON list, JSON lines, or a CSV or TSV table with a column 'prompt'"


def read_entries(source: str) -> Entries:
    """The prompts of a file by their places, as its name and its content say how to read them.

    Raises:
        EtudeError: the file cannot be read, or is of another format.
    """
    path, place = Path(os.path.expanduser(source)), f"prompt file '{source}'"
    data, suffix = _bytes(path, source), path.suffix.lower()
    refused = _refused(data, suffix)
    if refused is not None and (data or suffix):
        more = ", or give hub: and its directory (etude[datasets])" if refused in {"Parquet", "Arrow"} else ""
        raise EtudeError(f"{place} is {refused}, which is not read: {REMEDY}{more}.")
    text = _text(data, place)
    if suffix in {".jsonl", ".ndjson"}:
        return _json_lines(text, place)
    if suffix in {".csv", ".tsv"}:
        return _table(text, "," if suffix == ".csv" else "\t", place)
    if suffix == ".json" or text.lstrip()[:1] in ("[", "{"):
        entries = _json(text, place, named=suffix == ".json")
        if entries is not None:
            return entries
    lines = {f"{place}, line {i}": line.strip() for i, line in enumerate(text.split("\n"), 1)}
    return {at: line for at, line in lines.items() if line and not line.startswith("#")}


def _bytes(path: Path, source: str) -> bytes:
    place = f"prompt file '{source}'"
    if os.path.isdir(path):
        raise EtudeError(f"prompts '{source}' is a directory: give a text file with one prompt per line.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise EtudeError(f"prompts '{source}' is a device or a pipe, which need not end: give a text file.")
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise EtudeError(f"{place} cannot be read ({reason(error)}): check its name and permissions.") from None
    if len(data) > LONGEST:
        raise EtudeError(f"{place} is longer than {LONGEST >> 20} MiB: split it, or give a dataset (hub:directory).")
    return data


def _refused(data: bytes, suffix: str) -> str | None:
    """The name of a file's format if prompts are not read from it."""
    for name, (beginning, suffixes) in _REFUSED.items():
        if suffix in suffixes.split() or (beginning is not None and data.startswith(beginning)):
            return name
    return None


def _text(data: bytes, place: str) -> str:
    remedy = "save the prompts as UTF-8 text, one per line"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise EtudeError(f"{place}, line {line}: byte 0x{byte:02x} is not UTF-8; {remedy}.") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise EtudeError(f"{place}, line {line}: it holds a NUL byte, so it is not text; {remedy}.")
    return text


def _json(text: str, place: str, named: bool) -> Entries | None:
    """The entries of a JSON list, of one object, or of JSON lines; None for plain lines.

    A file that is `named` JSON is not plain lines.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and all(line.startswith("{") for line in lines) and any(map(_is_object, lines)):
            return _json_lines(text, place)
        if named or lines[0] in ("[", "{"):  # nobody's prompt: a list that is broken
            raise EtudeError(f"{place} is not JSON ({brief(error, 80)}): {REMEDY}.") from None
        return None
    if isinstance(value, dict) and "prompt" in value and not isinstance(value["prompt"], list):
        value = [value]
    if not isinstance(value, list):
        kind = f"an object of {', '.join(map(repr, value))[:200]}" if isinstance(value, dict) else type(value).__name__
        raise EtudeError(f"{place} holds {kind}: give a JSON list of texts, or of objects with a field 'prompt'.")
    return {f"{place}, entry {i}": entry for i, entry in enumerate(value)}


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(text: str, place: str) -> Entries:
    lines = {f"{place}, line {i}": line for i, line in enumerate(text.split("\n"), 1) if line.strip()}
    entries = {}
    for at, line in lines.items():
        try:
            entries[at] = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem, remedy = brief(error, 80), 'write one object per line, {"prompt": "a cat"}'
            raise EtudeError(f"{at}: it is not JSON ({problem}); {remedy}.") from None
    return entries


def _table(text: str, delimiter: str, place: str) -> Entries:
    """The rows of a table whose first row names the columns; every value is a text."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    entries = {}
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if columns is None:
                columns = [name.strip() for name in row]
                if columns.count("prompt") != 1 or len(set(columns)) < len(columns):
                    names = ", ".join(map(repr, columns))[:200]
                    remedy = "give each column a name of its own, and one of them the name 'prompt'"
                    raise EtudeError(f"{place}: its first line names the columns {names}; {remedy}.")
            elif len(row) != len(columns):
                remedy = "put cells that hold the separator or a quote into quotes"
                raise EtudeError(f"{place}, line {rows.line_num}: it has {len(row)} of {len(columns)} cells; {remedy}.")
            else:
                entries[f"{place}, line {rows.line_num}"] = dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise EtudeError(f"{place}, line {rows.line_num}: it is no row of a table ({brief(error, 80)}).") from None
    return entries

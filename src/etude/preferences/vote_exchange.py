"""Votes for other tools, and from them: JSONL or Parquet with the field names of Pick-a-Pic.

    caption                      the prompt
    image_0, image_1             JSONL: paths beside the file; the left and the right image as shown
    jpg_0, jpg_1                 Parquet: the images' files (PNG, under Pick-a-Pic's name); a JSONL
                                 file from elsewhere may hold them in base64
    image_0_uid, image_1_uid     SHA-256 of the images' files
    label_0, label_1             1 and 0, 0 and 1, or 1/2 and 1/2 for a tie
    has_label, are_different     whether there is a vote; whether it is no tie
    best_image_uid               the chosen image's uid; "tie" for a tie
    model_0, model_1, user_id, ranking_id, created_at     makers, rater, number and moment of the vote
    etude                        seconds, repeats, samples, makers' settings, as JSON

after the data set of Kirstain et al. (arXiv 2305.01569). What is imported twice counts once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from etude.errors import EtudeError, brief, brief_value
from etude.files import atomic_write_bytes, atomic_write_text, atomically
from etude.preferences.pictures import LARGEST_FILE, encode_pictures, open_picture
from etude.preferences.pool import LONGEST_NAME, LONGEST_PROMPT, Pool, check_rater, read_seconds

IMPORTED = "imported"
"""Rater of votes that name none."""
_BATCH = 64
"""Rows of a Parquet file that are held at a time, with their images."""
_LONGEST_LINE = 1 << 28
_LONGEST_FILE = 1 << 34
Advance = Callable[[int, int], None]


def export_votes(pool: Pool, out: Path, advance: Advance = lambda done, total: None) -> int:
    """Write all votes that count to a `.jsonl` file, with the images in a folder beside it, or to a
    `.parquet` file with the images inside; returns their number.

    Raises:
        EtudeError: the file has another suffix or cannot be written, there is no vote, or pyarrow is
            missing for Parquet.
    """
    if out.suffix not in {".jsonl", ".parquet"}:
        raise EtudeError(f"--out '{out}': give a name that ends in .jsonl or .parquet.")
    rows = list(_rows(pool))
    if not rows:
        raise EtudeError(f"the pool '{pool.root}' has no vote to export: vote first.")
    advance(0, len(rows))
    if out.suffix == ".parquet":
        _write_parquet(pool, rows, out, advance)
        return len(rows)
    folder = out.with_suffix(".images")
    folder.mkdir(exist_ok=True)
    lines = []
    for row in rows:
        for k in (0, 1):
            digest = row[f"image_{k}_uid"]
            row[f"image_{k}"] = f"{folder.name}/{digest}.png"
            if not (folder / f"{digest}.png").exists():
                atomic_write_bytes(folder / f"{digest}.png", pool.read_image(digest))
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        advance(1, len(rows))
    atomic_write_text(out, "".join(lines))
    return len(rows)


def import_votes(pool: Pool, source: Path, advance: Advance = lambda done, total: None) -> tuple[int, int]:
    """Add the votes and images of a `.jsonl` or `.parquet` file to a pool.

    A line with `caption` is a vote. A line with `prompt` and `file` is an image without a vote.
    Paths lead from the file's folder and may not leave it.

    Returns:
        The numbers of votes and of images that are new.

    Raises:
        EtudeError: a line lacks a field, an image cannot be read or lies elsewhere; the error names
            the line. Lines before it are in the pool: a repeated call goes on.
    """
    incoming = _Incoming(pool, source)
    votes, before = 0, len(pool.images())
    for number, record in _records(source, advance):
        place = f"'{source}', {'row' if source.suffix == '.parquet' else 'line'} {number}"
        if "caption" in record:
            votes += incoming.vote(record, place)
        elif "prompt" in record and "file" in record:
            incoming.image(_text(record["prompt"], place), incoming.read(record["file"], place), place)
        else:
            raise EtudeError(f"{place}: it has neither a `caption` (a vote) nor `prompt` and `file` (an image).")
    return votes, len(pool.images()) - before


class _Incoming:
    """What a file brings: its images, each once, and its votes."""

    def __init__(self, pool: Pool, source: Path) -> None:
        self.pool, self.folder = pool, source.parent
        self.maker = pool.add_maker(f"from {source.name}", {"kind": "import", "file": source.name})
        self.known: dict[tuple[str, str], int] = {}
        self.pairs: dict[tuple[str, Any], int] = {}
        for image in pool.images():
            self.known.setdefault((image.digest, image.prompt), image.id)
        self.sample = max(pool.samples(self.maker), default=-1) + 1

    def vote(self, record: dict[str, Any], place: str) -> bool:
        """Adds a vote; returns whether it is new."""
        labels = record.get("label_0"), record.get("label_1")
        answers = {(1, 0): "left", (0, 1): "right", (0.5, 0.5): "tie"}
        numbers = all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels)
        if not numbers or labels not in answers:
            if record.get("has_label") is False:
                return False
            raise EtudeError(
                f"{place}: label_0 and label_1 are {brief_value(labels)}; give 1 and 0, 0 and 1, or 0.5 and 0.5."
            )
        user = record.get("user_id")
        rater = check_rater(str(user)[:LONGEST_NAME]) if isinstance(user, str | int) and str(user).strip() else IMPORTED
        caption = _text(record["caption"], place)
        files = [self._file(record, k, place) for k in (0, 1)]
        key = [caption, *map(_digest, files), labels, rater, record.get("ranking_id")]
        origin = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()
        known = self.pool.pair_from(origin)
        if known is None:
            left, right = (self.image(caption, data, place) for data in files)
            ours = _ours(record)
            self.pairs[rater, record.get("ranking_id")] = self.pool.import_vote(
                left,
                right,
                rater,
                answers[labels],  # type: ignore[index]
                origin,
                repeats=self.pairs.get((rater, ours.get("repeats"))),
                seconds=read_seconds(ours.get("seconds")),
                time=str(record.get("created_at") or "")[:40],
            )
            return True
        self.pairs[rater, record.get("ranking_id")] = known
        return False

    def image(self, prompt: str, data: bytes, place: str) -> int:
        """The number of an image, added now if it is new. Its pixels are written anew, without metadata."""
        digest = _digest(data)
        if (digest, prompt) not in self.known:
            clean = encode_pictures(np.asarray(open_picture(data, place)).transpose(2, 0, 1)[None])[0]
            stored = _digest(clean)
            if (stored, prompt) not in self.known:
                self.pool.add_images(self.maker, [(self.sample, prompt, clean)])
                self.known[stored, prompt] = self.pool.image_of(self.maker, self.sample)
                self.sample += 1
            self.known[digest, prompt] = self.known[stored, prompt]
        return self.known[digest, prompt]

    def read(self, name: Any, place: str) -> bytes:
        """A file inside the folder; names that lead out of it, by dots or by links, are refused."""
        if not isinstance(name, str) or not name or "\0" in name:
            raise EtudeError(
                f"{place}: its image is {brief_value(name)}; give a path beside the file, or the file itself as jpg_0."
            )
        try:
            path = (self.folder / name).resolve(strict=True)
            if os.path.isabs(name) or not path.is_relative_to(self.folder.resolve()) or not path.is_file():
                raise EtudeError(f"{place}: the image {brief_value(name)} is no file inside '{self.folder}'.")
            if path.stat().st_size > LARGEST_FILE:
                raise EtudeError(f"{place}: the image {brief_value(name)} is larger than {LARGEST_FILE >> 20} MiB.")
            return path.read_bytes()
        except OSError as error:
            raise EtudeError(f"{place}: the image {brief_value(name)} cannot be read ({error.strerror}).") from None

    def _file(self, record: dict[str, Any], k: int, place: str) -> bytes:
        data = record.get(f"jpg_{k}")
        if isinstance(data, str) and data:
            try:
                data = base64.b64decode(data, validate=True)
            except ValueError:
                raise EtudeError(f"{place}: jpg_{k} is not base64 of an image.") from None
        return data if isinstance(data, bytes) and data else self.read(record.get(f"image_{k}"), place)


def _rows(pool: Pool) -> Iterator[dict[str, Any]]:
    images, makers, times = {image.id: image for image in pool.images()}, pool.makers(), pool.times()
    ballots = pool.ballots()
    for i in range(len(ballots)):
        pair = int(ballots.pair[i])
        left, right = images[int(ballots.left[i])], images[int(ballots.right[i])]
        label = (1 + int(ballots.outcome[i])) / 2
        seconds = float(ballots.seconds[i])
        yield {
            "caption": left.prompt,
            "image_0_uid": left.digest,
            "image_1_uid": right.digest,
            "label_0": label,
            "label_1": 1 - label,
            "has_label": True,
            "are_different": label != 0.5,
            "best_image_uid": "tie" if label == 0.5 else left.digest if label == 1 else right.digest,
            "model_0": makers[left.maker].label,
            "model_1": makers[right.maker].label,
            "user_id": str(ballots.rater[i]),
            "ranking_id": pair,
            "created_at": times[pair],
            "etude": json.dumps(
                {
                    "seconds": seconds if np.isfinite(seconds) else None,
                    "repeats": int(ballots.repeats[i]) or None,
                    "samples": [left.sample, right.sample],
                    "makers": [makers[left.maker].settings, makers[right.maker].settings],
                },
                sort_keys=True,
            ),
        }


def _write_parquet(pool: Pool, rows: list[dict[str, Any]], out: Path, advance: Advance) -> None:
    pyarrow = _pyarrow()
    import pyarrow.parquet as parquet

    def table(batch: list[dict[str, Any]]) -> Any:
        files = [{f"jpg_{k}": pool.read_image(row[f"image_{k}_uid"]) for k in (0, 1)} for row in batch]
        return pyarrow.Table.from_pylist([row | pair for row, pair in zip(batch, files, strict=True)])

    batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    first = table(batches[0])
    with atomically(out) as temporary, parquet.ParquetWriter(temporary, first.schema) as writer:
        for batch in batches:
            writer.write_table(first if batch is batches[0] else table(batch))
            advance(len(batch), len(rows))


def _records(source: Path, advance: Advance) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, fields) of a file, read as they are asked for."""
    if not source.is_file() or source.suffix not in {".jsonl", ".parquet"} or source.stat().st_size > _LONGEST_FILE:
        raise EtudeError(f"'{source}' is no .jsonl or .parquet file of at most {_LONGEST_FILE >> 30} GiB.")
    if source.suffix == ".parquet":
        _pyarrow()
        import pyarrow.parquet as parquet

        try:
            file, number = parquet.ParquetFile(source), 0
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
                    advance(1, file.metadata.num_rows)
        except Exception as error:  # pyarrow's errors share no base
            raise EtudeError(f"'{source}' cannot be read as Parquet ({brief(error, 100)}).") from None
        return
    with open(source, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), start=1):
            if line.strip():
                try:
                    record = json.loads(line) if len(line) <= _LONGEST_LINE else None
                except (ValueError, RecursionError):
                    record = None
                if not isinstance(record, dict):
                    raise EtudeError(f"'{source}', line {number}: it is no JSON object of at most 256 MiB.")
                yield number, record
            advance(len(line), source.stat().st_size)


def _ours(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of an exported vote beyond Pick-a-Pic's; none for a vote from elsewhere."""
    try:
        ours = json.loads(record.get("etude") or "{}")
    except (TypeError, ValueError, RecursionError):
        return {}
    return ours if isinstance(ours, dict) else {}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST_PROMPT or "\0" in value:
        raise EtudeError(
            f"{place}: its prompt is {brief_value(value)}; give a text of at most {LONGEST_PROMPT} letters."
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise EtudeError(f"{place}: its prompt {brief_value(value)} holds half of a surrogate pair.") from None
    return value.strip()


def _pyarrow() -> Any:
    if find_spec("pyarrow") is None:
        raise EtudeError("Parquet needs pyarrow: pip install 'etude[datasets]', or use a .jsonl file.")
    import pyarrow

    return pyarrow

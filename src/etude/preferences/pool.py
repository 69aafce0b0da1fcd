"""A pool: a directory of images and the votes on them, which survive a kill at any moment.

    POOL/votes.sqlite          makers, images, pairs that were shown, votes (SQLite in WAL mode)
    POOL/images/ab/abcd….png   pixels, named by the SHA-256 of the file

A vote is on the disk before `Pool.vote` returns (`synchronous = FULL`). Several processes may use
one pool at once. A withdrawn vote is kept and marked. No path is stored: a file's place follows
from its digest, so that a pool from somebody else cannot lead out of its directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.errors import EtudeError, brief, brief_value
from etude.files import atomic_write_bytes
from etude.preferences.pictures import LARGEST_FILE, open_picture

DATABASE = "votes.sqlite"
ANSWERS = {"left": 1, "tie": 0, "right": -1, "skip": None}
"""Answers of a vote, and the outcome of each."""
LONGEST_PROMPT, LONGEST_NAME = 10_000, 40
_VERSION = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE makers (id INTEGER PRIMARY KEY, label TEXT NOT NULL, settings TEXT NOT NULL UNIQUE);
CREATE TABLE images (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL, prompt TEXT NOT NULL,
    maker INTEGER NOT NULL REFERENCES makers (id), sample INTEGER NOT NULL, UNIQUE (maker, sample));
CREATE TABLE pairs (
    id INTEGER PRIMARY KEY, left_image INTEGER NOT NULL REFERENCES images (id),
    right_image INTEGER NOT NULL REFERENCES images (id), rater TEXT NOT NULL,
    repeats INTEGER REFERENCES pairs (id), origin TEXT UNIQUE, time TEXT NOT NULL);
CREATE TABLE votes (
    id INTEGER PRIMARY KEY, pair INTEGER NOT NULL REFERENCES pairs (id), rater TEXT NOT NULL,
    answer TEXT NOT NULL CHECK (answer IN ('left', 'tie', 'right', 'skip')), seconds REAL,
    time TEXT NOT NULL, withdrawn TEXT);
CREATE INDEX digests ON images (digest);
CREATE INDEX pairs_of ON pairs (rater);
CREATE UNIQUE INDEX vote_of ON votes (pair) WHERE withdrawn IS NULL;
CREATE INDEX votes_of ON votes (rater) WHERE withdrawn IS NULL;
"""


class VoteError(EtudeError):
    """A vote that contradicts what the pool holds: another answer, or somebody else's pair."""


@dataclass(frozen=True)
class PoolImage:
    """An image of a pool.

    Attributes:
        id: number in the pool.
        digest: SHA-256 of its file.
        prompt: the text that it shows.
        maker: number of its maker.
        sample: index among the maker's images; images of two makers with one sample are paired by
            prompt and noise.
    """

    id: int
    digest: str
    prompt: str
    maker: int
    sample: int


@dataclass(frozen=True)
class Maker:
    """The source of images: a model under a sampler, or a folder.

    Attributes:
        id: number in the pool.
        label: name for people.
        settings: everything that made the images, as plain values.
    """

    id: int
    label: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Ballots:
    """All votes that count, in the order of voting; skips are left out.

    Attributes:
        pair: number of the pair that was shown, `[n]`.
        left: number of the left image, `[n]`.
        right: number of the right image, `[n]`.
        outcome: 1 (left), 0 (tie), -1 (right), `[n]`.
        rater: name of the rater, `[n]`.
        repeats: number of the pair that this one showed again, or 0, `[n]`.
        seconds: time to the vote, NaN where unknown, `[n]`.
    """

    pair: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    outcome: NDArray[np.int8]
    rater: NDArray[np.str_]
    repeats: NDArray[np.int64]
    seconds: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.pair)

    def take(self, rows: NDArray[Any]) -> Ballots:
        """Some of the votes."""
        return Ballots(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class Pool:
    """Images and votes in a directory.

    Args:
        root: directory of the pool.
        create: make a pool there if there is none. Default: False.

    Raises:
        EtudeError: the directory is no pool, or the database cannot be read or written.
    """

    def __init__(self, root: Path | str, *, create: bool = False) -> None:
        self.root = Path(root)
        path = self.root / DATABASE
        if not create and not path.is_file():
            raise EtudeError(
                f"'{root}' is no pool of images: make one with `etude preferences draw MODEL --out {root}`."
            )
        if create and self.root.is_dir() and not path.exists() and any(self.root.iterdir()):
            raise EtudeError(f"'{root}' holds other files: give a new or empty directory for the pool.")
        self._lock = threading.RLock()
        with self._explained():
            if create:
                (self.root / "images").mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=20, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.execute("PRAGMA trusted_schema = OFF")
            with self._transaction() as run:
                version = run("PRAGMA user_version").fetchone()[0]
                if version == 0 and not run("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    for statement in _SCHEMA.split(";")[:-1]:
                        run(statement)
                    run(f"PRAGMA user_version = {_VERSION}")
                elif version != _VERSION:
                    raise EtudeError(
                        f"'{path}' has version {version} of the layout, and this etude reads {_VERSION}: use the etude that wrote it."
                    )

    def close(self) -> None:
        """Ends the connection to the database."""
        self._connection.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Facts and makers

    def fact(self, name: str) -> Any:
        """A stored plain value, or None."""
        row = self._query("SELECT value FROM facts WHERE name = ?", name)
        return self._plain(row[0][0]) if row else None

    def set_fact(self, name: str, value: Any) -> None:
        """Stores a plain value under a name."""
        with self._writing() as run:
            run("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def add_maker(self, label: str, settings: Mapping[str, Any]) -> int:
        """The number of the maker with these settings, added now if it is new."""
        text = json.dumps(settings, sort_keys=True)
        with self._writing() as run:
            run("INSERT OR IGNORE INTO makers (label, settings) VALUES (?, ?)", (label[:200], text))
            return int(run("SELECT id FROM makers WHERE settings = ?", (text,)).fetchone()[0])

    def makers(self) -> dict[int, Maker]:
        """All makers by number."""
        rows = self._query("SELECT id, label, settings FROM makers ORDER BY id")
        return {row[0]: Maker(row[0], str(row[1]), self._plain(row[2])) for row in rows}

    # Images

    def add_images(self, maker: int, items: Iterable[tuple[int, str, bytes]]) -> None:
        """Adds images (sample, prompt, PNG file) of a maker: the files first, then all rows at once.

        A sample that the pool has already is left as it is.

        Raises:
            EtudeError: a file or the database cannot be written, or a prompt is too long.
        """
        rows = []
        for sample, prompt, data in items:
            if len(prompt) > LONGEST_PROMPT:
                raise EtudeError(
                    f"the prompt {brief_value(prompt)} has {len(prompt)} letters: {LONGEST_PROMPT} at most."
                )
            digest = hashlib.sha256(data).hexdigest()
            path = self._place(digest)
            if not path.exists():
                with self._explained():
                    path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_bytes(path, data)
            rows.append((digest, prompt, maker, int(sample)))
        with self._writing() as run:
            for row in rows:
                run("INSERT OR IGNORE INTO images (digest, prompt, maker, sample) VALUES (?, ?, ?, ?)", row)

    def samples(self, maker: int) -> set[int]:
        """The samples of a maker that the pool has."""
        return {row[0] for row in self._query("SELECT sample FROM images WHERE maker = ?", maker)}

    def images(self, after: int = 0) -> list[PoolImage]:
        """The images with a number above `after`, in order."""
        rows = self._query("SELECT id, digest, prompt, maker, sample FROM images WHERE id > ? ORDER BY id", after)
        return [PoolImage(*row) for row in rows]

    def image(self, number: int) -> PoolImage:
        """An image by its number."""
        return PoolImage(*self._query("SELECT id, digest, prompt, maker, sample FROM images WHERE id = ?", number)[0])

    def image_of(self, maker: int, sample: int) -> int:
        """The number of a maker's image."""
        return int(self._query("SELECT id FROM images WHERE maker = ? AND sample = ?", maker, sample)[0][0])

    def holds(self, digest: str) -> bool:
        """Whether a digest is that of an image of the pool."""
        return bool(_DIGEST.fullmatch(digest) and self._query("SELECT 1 FROM images WHERE digest = ? LIMIT 1", digest))

    def read_image(self, digest: str) -> bytes:
        """The file of an image.

        Raises:
            EtudeError: the digest is none of the pool's, the file is missing or too large, or a link leads out of the pool.
        """
        if not self.holds(digest):
            raise EtudeError(f"the pool '{self.root}' holds no image {brief_value(digest)}.")
        path = self._place(digest)
        try:
            if not path.resolve(strict=True).is_relative_to(self.root.resolve()):
                raise EtudeError(f"the image '{path}' is a link out of the pool: it is not read.")
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
                    raise EtudeError(f"the image '{path}' is no regular file of at most {LARGEST_FILE >> 20} MiB.")
                return file.read(LARGEST_FILE + 1)
        except OSError as error:
            raise EtudeError(
                f"the image '{path}' cannot be read ({error.strerror}): restore it, or draw the pool again."
            ) from None

    def pixels(self, digest: str) -> NDArray[np.uint8]:
        """The pixels of an image, uint8 `[3, h, w]`.

        Raises:
            EtudeError: as in `read_image`, or the file is no image of at most 8192 x 8192.
        """
        return np.ascontiguousarray(np.asarray(open_picture(self.read_image(digest), digest)).transpose(2, 0, 1))

    # Pairs and votes

    def add_pair(self, left: int, right: int, rater: str, repeats: int | None = None, origin: str | None = None) -> int:
        """Records that a rater is shown a pair; returns its number."""
        with self._writing(durable=False) as run:
            row = (left, right, check_rater(rater), repeats, origin, _now())
            run(
                "INSERT INTO pairs (left_image, right_image, rater, repeats, origin, time) VALUES (?, ?, ?, ?, ?, ?)",
                row,
            )
            return int(run("SELECT last_insert_rowid()").fetchone()[0])

    def pairs(self, after: int = 0) -> list[tuple[int, int, int, str, int]]:
        """(number, left, right, rater, repeated pair or 0) of the pairs above `after`, in order."""
        return self._query(
            "SELECT id, left_image, right_image, rater, coalesce(repeats, 0) FROM pairs WHERE id > ? ORDER BY id", after
        )

    def import_vote(
        self,
        left: int,
        right: int,
        rater: str,
        answer: str,
        origin: str,
        *,
        repeats: int | None = None,
        seconds: float | None = None,
        time: str = "",
    ) -> int:
        """Stores a vote from elsewhere, pair and answer at once, and returns the number of its pair.

        `origin` tells the vote from every other. The call waits for no disk: a vote that a power cut
        loses is imported again by the same call.
        """
        with self._writing(durable=False) as run:
            name, moment = check_rater(rater), time or _now()
            run(
                "INSERT INTO pairs (left_image, right_image, rater, repeats, origin, time) VALUES (?, ?, ?, ?, ?, ?)",
                (left, right, name, repeats, origin, moment),
            )
            pair = int(run("SELECT last_insert_rowid()").fetchone()[0])
            row = (pair, name, answer, seconds, moment)
            run("INSERT INTO votes (pair, rater, answer, seconds, time) VALUES (?, ?, ?, ?, ?)", row)
        return pair

    def open_pairs(self, rater: str) -> list[tuple[int, int, int]]:
        """(number, left, right) of the pairs that a rater was shown and has not answered, in order."""
        return self._query(
            "SELECT p.id, p.left_image, p.right_image FROM pairs p WHERE p.rater = ? AND NOT EXISTS "
            "(SELECT 1 FROM votes v WHERE v.pair = p.id AND v.withdrawn IS NULL) ORDER BY p.id",
            rater,
        )

    def vote(self, pair: int, rater: str, answer: str, seconds: float | None = None, time: str | None = None) -> bool:
        """Stores an answer; it is on the disk when this returns.

        Args:
            pair: number of the pair that the rater was shown.
            rater: the rater's name.
            answer: one of `ANSWERS`.
            seconds: time to the vote.
            time: moment of the vote. Default: now.

        Returns:
            False if the same answer was stored before: a repeated request does no harm.

        Raises:
            VoteError: the pair was shown to somebody else or to nobody, or has another answer.
            EtudeError: the answer is unknown, or the disk does not take it; then nothing is stored.
        """
        if answer not in ANSWERS:
            raise EtudeError(f"the answer {brief_value(answer)} is none of {', '.join(ANSWERS)}.")
        with self._writing() as run:
            shown = run("SELECT rater FROM pairs WHERE id = ?", (pair,)).fetchone()
            if shown is None or shown[0] != rater:
                raise VoteError(f"pair {pair} was not shown to {brief_value(rater)}: load the page again.")
            before = run("SELECT answer FROM votes WHERE pair = ? AND withdrawn IS NULL", (pair,)).fetchone()
            if before is None:
                row = (pair, rater, answer, seconds, time or _now())
                run("INSERT INTO votes (pair, rater, answer, seconds, time) VALUES (?, ?, ?, ?, ?)", row)
            elif before[0] != answer:
                raise VoteError(f"pair {pair} has the answer '{before[0]}' already: undo it before you give another.")
        return before is None

    def undo(self, rater: str) -> int | None:
        """Withdraws a rater's last vote; returns its pair, which is open again, or None."""
        with self._writing() as run:
            last = run(
                "SELECT id, pair FROM votes WHERE rater = ? AND withdrawn IS NULL ORDER BY id DESC LIMIT 1", (rater,)
            ).fetchone()
            if last is None:
                return None
            run("UPDATE votes SET withdrawn = ? WHERE id = ?", (_now(), last[0]))
            return int(last[1])

    def count(self, rater: str | None = None) -> int:
        """The number of votes that count, skips included: of one rater, or of all."""
        condition, values = ("", ()) if rater is None else (" AND rater = ?", (rater,))
        return int(self._query(f"SELECT count(*) FROM votes WHERE withdrawn IS NULL{condition}", *values)[0][0])  # noqa: S608 - fixed text

    def has_vote(self, pair: int) -> bool:
        """Whether a pair has a vote that counts and is no skip."""
        return bool(self._query("SELECT 1 FROM votes WHERE pair = ? AND withdrawn IS NULL AND answer != 'skip'", pair))

    def pair_from(self, origin: str) -> int | None:
        """The number of the pair that came with an imported vote, or None."""
        rows = self._query("SELECT id FROM pairs WHERE origin = ?", origin)
        return int(rows[0][0]) if rows else None

    def progress(self, after: int = 0) -> tuple[int, int, int]:
        """(votes that count, number of the last of them, how many have a number above `after`), skips included."""
        statement = "SELECT count(*), coalesce(max(id), 0), coalesce(sum(id > ?), 0) FROM votes WHERE withdrawn IS NULL"
        count, last, new = self._query(statement, after)[0]
        return int(count), int(last), int(new)

    def ballots(self, after: int = 0) -> Ballots:
        """All votes that count, with a number above `after`."""
        rows = self._query(
            "SELECT p.id, p.left_image, p.right_image, v.answer, v.rater, coalesce(p.repeats, 0), v.seconds "
            "FROM votes v JOIN pairs p ON p.id = v.pair WHERE v.id > ? AND v.withdrawn IS NULL AND v.answer != 'skip' ORDER BY v.id",
            after,
        )
        pair, left, right, answer, rater, repeats, seconds = zip(*rows, strict=True) if rows else ([],) * 7
        return Ballots(
            np.array(pair, np.int64),
            np.array(left, np.int64),
            np.array(right, np.int64),
            np.array([ANSWERS[each] for each in answer], np.int8),
            np.array(rater, np.str_),
            np.array(repeats, np.int64),
            np.array([np.nan if each is None else each for each in seconds], np.float64),
        )

    def times(self) -> dict[int, str]:
        """The moment of the vote on each pair."""
        return dict(self._query("SELECT pair, time FROM votes WHERE withdrawn IS NULL"))

    # The database

    def _place(self, digest: str) -> Path:
        assert _DIGEST.fullmatch(digest)
        return self.root / "images" / digest[:2] / f"{digest}.png"

    def _plain(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, TypeError, RecursionError):
            raise EtudeError(
                f"the pool '{self.root}' holds {brief_value(text)}, which is no JSON: restore it."
            ) from None

    def _query(self, statement: str, *values: Any) -> list[Any]:
        with self._lock, self._explained():
            return self._connection.execute(statement, values).fetchall()

    @contextmanager
    def _writing(self, durable: bool = True) -> Iterator[Any]:
        with self._lock, self._explained():
            # Without FULL a commit waits for no disk, and the next one that does takes it along.
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with self._transaction() as run:
                yield run

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection.execute
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise EtudeError(
                f"the pool '{self.root}' cannot be used ({brief(error, 120)}): nothing was stored; free some space, check "
                "the permissions, or restore the directory."
            ) from error


def check_rater(name: str) -> str:
    """A rater's name without surrounding blanks.

    Raises:
        EtudeError: it is empty, too long, or holds a control character.
    """
    name = " ".join(name.split())
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise EtudeError(
            f"the name {brief_value(name)} cannot be a rater's: give 1 to {LONGEST_NAME} printable letters."
        )
    return name


def read_seconds(seconds: object) -> float | None:
    """Seconds to a vote as the pool keeps them: None for what is no sensible number."""
    return float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e6 else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

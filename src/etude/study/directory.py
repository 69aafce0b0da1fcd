"""The directory of a study: where its files are, and how far each cell has come.

A cell whose folder has a `config.yaml` is read from the folder alone. Every other file is read from
its folder or, where the folder lacks it, from the archive. To a reader, packing changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etude.config import TrainConfig, difference, parse_config
from etude.config.yaml_text import parse_yaml
from etude.errors import EtudeError, brief
from etude.files import reason, try_lock
from etude.study.archive import ARCHIVE, CELL_FILES, accepts, archived_files
from etude.study.study_file import Cell

State = Literal["waiting", "part", "trained", "done", "failed", "running"]


@dataclass(frozen=True)
class Progress:
    """How far a cell has come: the last finished iteration or 0, and the seconds spent on it.

    `state` is waiting (nothing was begun), part (training was stopped), trained (the measurement is
    missing, or differs from the one that the study asks for), done (trained and measured), failed
    (`failure` says why in a sentence), or running (another process works on the cell).
    """

    state: State
    iteration: int
    seconds: float
    failure: str = ""


@dataclass(frozen=True)
class StoredFile:
    """A file of a study, from a folder or from the archive; `place` names it in errors."""

    place: str
    data: bytes

    def text(self) -> str:
        """The content as text. It must be UTF-8 (`EtudeError`)."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise EtudeError(f"{self.place} is not UTF-8 text ({error}): restore or delete it.") from None

    def mapping(self) -> dict[str, Any]:
        """The content as a mapping, from JSON. It must be one (`EtudeError`)."""
        try:
            value = json.loads(self.data)
        except (ValueError, RecursionError) as error:
            problem = f"cannot be read ({brief(error)})"
            raise EtudeError(f"{self.place} {problem}: delete it, and run the study again.") from None
        if not isinstance(value, dict):
            raise EtudeError(f"{self.place} holds a {type(value).__name__}: delete it, and run the study again.")
        return value


@dataclass(frozen=True)
class StudyDirectory:
    """The places in the directory of a study.

    study.yaml             the study's file, as given
    cells/<slug>/          a run directory, with the measurement after training in scores.json
    base/                  the base model's scores and images, which cells share
    cells.tar.xz           files of cells that were packed: see `etude.study.archive`
    failures/<slug>.txt    the traceback of a cell that failed, until it succeeds
    .claims/<slug>         locked while a process works on the cell
    """

    root: Path

    @property
    def archive(self) -> Path:
        """The archive of packed cells."""
        return self.root / ARCHIVE

    def cell(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.root / "cells" / cell.slug

    def scores(self, cell: Cell) -> Path:
        """The file to which the cell's measurement is written."""
        return self.cell(cell) / "scores.json"

    def failure(self, cell: Cell) -> Path:
        """The file with the traceback of a cell that failed."""
        return self.root / "failures" / f"{cell.slug}.txt"

    def file(self, cell: Cell, name: str) -> StoredFile | None:
        """One of `CELL_FILES` of a cell; None if the cell has none.

        Raises:
            EtudeError: the file or the archive cannot be read.
        """
        place = f"cells/{cell.slug}/{name}"
        stored = self._loose(place)
        if stored is None and not self._is_run(cell):  # asked last: packing removes config.yaml first
            stored = self._packed(place)
        return stored

    def base_file(self, name: str) -> StoredFile | None:
        """A file of the base model's, with the errors of `file`; None if there is none."""
        place = f"base/{name}"
        return (self._loose(place) or self._packed(place)) if accepts(place) else None

    def _is_run(self, cell: Cell) -> bool:
        return (self.cell(cell) / CELL_FILES[0]).is_file()

    def _loose(self, name: str) -> StoredFile | None:
        path = self.root / name
        try:
            return StoredFile(f"'{path}'", path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise EtudeError(f"'{path}' cannot be read ({reason(error)}): check its permissions.") from None

    def _packed(self, name: str) -> StoredFile | None:
        data = archived_files(self.archive).get(name)
        return None if data is None else StoredFile(f"'{name}' in '{self.archive}'", data)

    def progress(self, cell: Cell, look_for_others: bool = True) -> Progress:
        """How far the cell has come.

        A cell has failed, too, if its files are damaged or belong to another configuration.

        Raises:
            EtudeError: the archive is damaged, so it is unknown which cells are done.
        """
        archived_files(self.archive)
        try:
            iteration, seconds = _time_spent(self.file(cell, "metrics.jsonl"))
            if look_for_others and self._claimed(cell):
                return Progress("running", iteration, seconds)
            if self.failure(cell).is_file():
                text = self.failure(cell).read_text(encoding="utf-8").strip()
                return Progress("failed", iteration, seconds, text.partition("\n")[0])
            if self.file(cell, "summary.json") is None:
                return Progress("part" if self.cell(cell).is_dir() else "waiting", iteration, seconds)
            stored = self.file(cell, "scores.json")
            measured = {} if stored is None else stored.mapping()
            if cell.measured and measured.get("measurement") != cell.measurement.model_dump(mode="json"):
                return Progress("trained", iteration, seconds)
            self.check(cell)
            return Progress("done", iteration, seconds + measured.get("seconds", 0.0))
        except EtudeError as error:
            return Progress("failed", 0, 0.0, brief(error))

    def check(self, cell: Cell) -> None:
        """Refuse the run of another configuration, as after a change of the study's file.

        Raises:
            EtudeError: the configurations differ; the key is named.
        """
        stored = self.file(cell, CELL_FILES[0])
        if stored is None:
            return
        change = difference(parse_config(parse_yaml(stored.text(), stored.place), stored.place), cell.config)
        if change is not None:
            key, old, new = change
            unpack = "" if self._is_run(cell) else f"unpack '{self.archive}' with tar, delete it, and "
            raise EtudeError(
                f"cell '{cell.slug}' holds a run with {key} = {old!r}, but the study now says {new!r}: "
                f"{unpack}move '{self.cell(cell)}' away to run it again, or give another --out."
            )

    @contextmanager
    def claim(self, cell: Cell, patient: bool = True) -> Iterator[bool]:
        """Claim a cell, at most until the process ends; yields whether that succeeded."""
        path = self.root / ".claims" / cell.slug
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            yield try_lock(file.fileno(), patient)

    def _claimed(self, cell: Cell) -> bool:
        if not (self.root / ".claims" / cell.slug).is_file():
            return False
        with self.claim(cell, patient=False) as free:
            return not free


def work(config: TrainConfig) -> float:
    """The cost of a run in forward passes of one image; one with its backward pass counts 3."""
    sampling, rollout, objective = config.sampling, config.rollout, config.objective
    trained = sampling.num_steps if sampling.window is None else sampling.window.size
    replayed = 3 * trained * objective.timestep_fraction * objective.num_inner_epochs
    evaluation_steps = config.evaluation.num_steps or sampling.num_steps
    evaluations = 1 + -(-config.iterations // config.evaluation.every)
    training = config.iterations * rollout.images_per_iteration * (sampling.num_steps + replayed)
    return training + evaluations * 2 * config.evaluation.num_images * evaluation_steps


def _time_spent(metrics: StoredFile | None) -> tuple[int, float]:
    """The last iteration and the seconds of all. A line that is being written does not count."""
    if metrics is None:
        return 0, 0.0
    iteration, seconds = 0, 0.0
    for number, line in enumerate(metrics.data.decode("utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            iteration, seconds = int(row["iteration"]), seconds + float(row["seconds"]["total"])
        except (ValueError, KeyError, TypeError) as error:
            raise EtudeError(f"{metrics.place}, line {number} is not a row of metrics ({brief(error)}).") from None
    return iteration, seconds

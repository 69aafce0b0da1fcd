"""What the directory of a study holds: a run per cell, and how far each has come.

DIR/study.yaml              the file, as given
DIR/cells/<slug>/           an ordinary run directory
DIR/cells/<slug>/scores.json    the measurement after training
DIR/failures/<slug>.txt     the traceback of a cell that failed, until it succeeds
DIR/.claims/<slug>          locked while a process works on the cell
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etude.config import TrainConfig, difference, load_config
from etude.errors import EtudeError, brief
from etude.files import try_lock
from etude.study.study_file import Cell

State = Literal["waiting", "part", "trained", "done", "failed", "running"]


@dataclass(frozen=True)
class Progress:
    """How far a cell has come.

    Attributes:
        state: waiting: nothing yet. part: stopped in training. trained: not measured yet, or otherwise than now wanted. done. failed: see `failure`.
            running: another process works on it.
        iteration: last finished one, 0 if there is none.
        seconds: spent on it so far.
        failure: one sentence.
    """

    state: State
    iteration: int
    seconds: float
    failure: str = ""


@dataclass(frozen=True)
class StudyDirectory:
    """The places in the directory of a study."""

    root: Path

    def cell(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.root / "cells" / cell.slug

    def scores(self, cell: Cell) -> Path:
        """Where the cell's measurement is."""
        return self.cell(cell) / "scores.json"

    def failure(self, cell: Cell) -> Path:
        """Where the traceback of a cell that failed is."""
        return self.root / "failures" / f"{cell.slug}.txt"

    def progress(self, cell: Cell, look_for_others: bool = True) -> Progress:
        """How far the cell has come; one whose files are damaged, or hold a run of another configuration, has failed."""
        try:
            return self._progress(cell, look_for_others)
        except EtudeError as error:
            return Progress("failed", 0, 0.0, brief(error))

    def _progress(self, cell: Cell, look_for_others: bool) -> Progress:
        run = self.cell(cell)
        iteration, seconds = _metrics(run / "metrics.jsonl")
        if look_for_others and self._claimed(cell):
            return Progress("running", iteration, seconds)
        if self.failure(cell).is_file():
            text = self.failure(cell).read_text(encoding="utf-8").strip()
            return Progress("failed", iteration, seconds, text.splitlines()[0] if text else "")
        if not (run / "summary.json").is_file():
            return Progress("part" if run.is_dir() else "waiting", iteration, seconds)
        measured = read_json(self.scores(cell)) if self.scores(cell).is_file() else {}
        if measured.get("measurement") != cell.measurement.model_dump(mode="json"):
            return Progress("trained", iteration, seconds)
        self.check(cell)
        return Progress("done", iteration, seconds + measured.get("seconds", 0.0))

    def check(self, cell: Cell) -> None:
        """Refuses a run of another configuration: the file was changed after the cell had begun.

        Raises:
            EtudeError: naming the key.
        """
        path = self.cell(cell) / "config.yaml"
        if not path.is_file():
            return
        found = difference(load_config(str(path)), cell.config)
        if found is not None:
            key, old, new = found
            raise EtudeError(
                f"cell '{cell.slug}' holds a run with {key} = {old!r}, but the study now says {new!r}: "
                f"move '{self.cell(cell)}' away to run it again, or give another --out."
            )

    @contextmanager
    def claim(self, cell: Cell, patient: bool = True) -> Iterator[bool]:
        """Whether this process may work on the cell; the claim ends with the process, however that ends."""
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
    """What a run costs in network calls on one image: a forward counts 1, a forward and backward 3. Only ratios of it are used."""
    sampling, rollout, objective = config.sampling, config.rollout, config.objective
    trained = sampling.num_steps if sampling.window is None else sampling.window.size
    replayed = 3 * trained * objective.timestep_fraction * objective.num_inner_epochs
    evaluation_steps = config.evaluation.num_steps or sampling.num_steps
    evaluations = 1 + -(-config.iterations // config.evaluation.every)
    return (
        config.iterations * rollout.images_per_iteration * (sampling.num_steps + replayed)
        + evaluations * 2 * config.evaluation.num_images * evaluation_steps
    )


def read_json(path: Path) -> dict[str, Any]:
    """A mapping.

    Raises:
        EtudeError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EtudeError(f"'{path}' cannot be read ({error}): delete it, and run the study again.") from None
    if not isinstance(value, dict):
        raise EtudeError(f"'{path}' holds a {type(value).__name__}: delete it, and run the study again.")
    return value


def _metrics(path: Path) -> tuple[int, float]:
    """Last iteration and seconds of all; a line that is being written does not count."""
    if not path.is_file():
        return 0, 0.0
    iteration, seconds = 0, 0.0
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            iteration, seconds = int(row["iteration"]), seconds + float(row["seconds"]["total"])
        except (ValueError, KeyError, TypeError) as error:
            raise EtudeError(f"'{path}', line {number} is not a row of metrics ({brief(error)}).") from None
    return iteration, seconds

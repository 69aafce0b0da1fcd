"""The directory of a run: whether the run may write to it, whether it is the run that it holds, and what it can resume from."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from torch import Tensor

from etude.config import TrainConfig, difference, parse_config
from etude.errors import EtudeError
from etude.training.checkpoint import (
    Checkpoint,
    last_iteration,
    load_latest,
    newest_whole,
    prune,
    save_checkpoint,
)


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


class Checkpoints:
    """The checkpoints of one run, and which of them are known to be whole.

    Attributes:
        sound: iterations whose checkpoints were written or loaded here.
    """

    def __init__(self, out: Path, config: TrainConfig) -> None:
        self.out, self.root, self.config = out, out / "checkpoints", config
        self.sound: set[int] = set()

    def save(self, iteration: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes one, with the configuration, and removes those that are too old."""
        save_checkpoint(self.root, iteration, tensors, {"config": self.config.model_dump(mode="json"), **state})
        self.sound.add(iteration)
        self.prune()

    def prune(self) -> None:
        """Removes those that are too old; a run that was killed may have left one."""
        prune(self.root, self.config.checkpoint.keep, self.sound)

    def load(self) -> Checkpoint | None:
        """The newest sound one; None if none was ever written.

        Raises:
            EtudeError: all are damaged or gone, or the newest is of a run with another configuration.
        """
        checkpoint = load_latest(self.root)
        if checkpoint is None:
            if self.root.is_dir() and any(self.root.glob("iteration-*")):
                raise EtudeError(
                    f"no checkpoint in '{self.root}' is sound, so the run cannot be resumed: start it again in another directory."
                )
            done = last_iteration(self.out / "metrics.jsonl")
            if done > 0:  # the first checkpoint is that of iteration 0
                raise EtudeError(
                    f"the run in '{self.out}' has done {done} iterations, but its checkpoints are gone from '{self.root}': put them "
                    "back, or start another run in another directory."
                )
            return None
        stored = checkpoint.state.get("config") if isinstance(checkpoint.state, dict) else None
        if not isinstance(stored, dict):
            raise EtudeError(
                f"'{checkpoint.path}' does not say whose run it is: start another run in another directory."
            )
        self._check_same_run(stored)
        self.sound.add(checkpoint.iteration)
        return checkpoint

    def remaining(self) -> str:
        """What a failed run can be continued from, in words."""
        newest = self._newest()
        if newest is None:
            return "no checkpoint was written yet"
        return f"intact checkpoint: iteration {newest} in '{self.root}', --resume continues from it"

    def advice(self) -> str:
        """How an interrupted run is continued, in words."""
        command = f"`etude train --resume --out {shlex.quote(str(self.out))}`"
        newest = self._newest()
        if newest is None:
            return f"there is no checkpoint yet, and {command} starts over"
        return f"{command} continues from the checkpoint of iteration {newest}"

    def _newest(self) -> int | None:
        """As it is on the disk: of several processes those that do not write have to look, the more so when the one that does is gone."""
        return newest_whole(self.root, self.sound)

    def _check_same_run(self, stored: dict[str, Any]) -> None:
        """A checkpoint continues only the run that wrote it; settings that are newer than it had their defaults."""
        found = difference(parse_config(stored, f"the configuration in '{self.root}'"), self.config)
        if found is not None:
            key, old, new = found
            raise EtudeError(
                f"the run in '{self.out}' has {key} = {old!r}, but {new!r} was given: resume it with its own "
                "config.yaml, or start another run in another directory."
            )


def _half_written(entry: Path) -> bool:
    return re.fullmatch(r"\..+\.writing", entry.name) is not None

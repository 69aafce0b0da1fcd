"""The trackers of a run: TensorBoard, Weights & Biases and trackio receive each row of metrics once.

A tracker writes into `<run>/<its name>`. A resumed run goes on in the same run of the tracker: what
the tracker holds is read when it starts, and it is told the rows that it lacks, no other. A tracker
that fails in mid-run is left out from then on.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from etude.errors import EtudeError, brief
from etude.training.progress import warn_that_it_failed

PROJECT = "etude"
"""Name of the project in the trackers that group their runs."""


class Tracker(ABC):
    """One tracker, open in its directory. `told` is the newest iteration that it holds, or -1."""

    remedy = "see to that"
    told = -1

    @abstractmethod
    def __init__(self, directory: Path, config: str) -> None:
        """Opens the run that `directory` holds, or a new one with a configuration in YAML."""

    @abstractmethod
    def tell(self, values: Mapping[str, float], step: int) -> None:
        """Records the numbers of an iteration."""

    @abstractmethod
    def finish(self, complete: bool) -> None:
        """Closes the tracker's run, which may be resumed if it is not `complete`."""


class TensorBoard(Tracker):
    """Event files. Each row is one record, so a kill leaves it whole or not at all."""

    def __init__(self, directory: Path, config: str) -> None:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from torch.utils.tensorboard import SummaryWriter

        files = [str(file) for file in directory.glob("events.out.tfevents.*")]
        events = [event for file in files for event in LegacyEventFileLoader(file).Load()]
        rows = (event.step for event in events if any(value.tag == "iteration" for value in event.summary.value))
        self.told = max(rows, default=-1)
        self.writer: Any = SummaryWriter(str(directory))
        if not files:
            self.writer.add_text("config", f"```yaml\n{config}```")
            self.writer.flush()

    def tell(self, values: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        row = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if _is_number(value)]
        self.writer.file_writer.add_summary(Summary(value=row), step)
        self.writer.flush()

    def finish(self, complete: bool) -> None:
        self.writer.close()


class WandB(Tracker):
    """Weights & Biases, with its own settings for keys and modes (WANDB_API_KEY, WANDB_MODE)."""

    remedy = "log in with `wandb login`, set WANDB_MODE=offline"

    def __init__(self, directory: Path, config: str) -> None:
        import wandb

        files = sorted(directory.glob("*run-*/run-*.wandb"))
        name = files[-1].stem.removeprefix("run-") if files else None
        directory.mkdir(parents=True, exist_ok=True)  # otherwise wandb would choose another place
        self.run = wandb.init(
            project=PROJECT,
            dir=directory.parent,  # wandb adds its name
            id=name,
            resume=None if name is None else "allow",
            config={"config": config},
            reinit="create_new",  # a run of the caller's own stays as it is
        )
        # A server knows what it has received. Without one, it is in the files, save what a kill kept from them.
        self.told = max(map(_newest_step, files), default=-1) if self.run.offline else self.run.step - 1

    def tell(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self, complete: bool) -> None:
        self.run.finish(exit_code=0 if complete else 1)


class Trackio(Tracker):
    """trackio, whose run has the name of the run's directory."""

    def __init__(self, directory: Path, config: str) -> None:
        self.module = trackio = _trackio_in(directory)
        with redirect_stdout(io.StringIO()):  # an advertisement with colours
            self.run = trackio.init(
                project=PROJECT,
                name=directory.absolute().parent.name,
                resume="allow",
                config={"config": config},
                embed=False,
            )
        self.told = self.run._next_step - 1

    def tell(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self, complete: bool) -> None:
        with redirect_stdout(io.StringIO()):
            self.module.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
"""Tracker by name, which is that of its package, too."""


class Trackers:
    """The trackers of a run, of which it needs none.

    Raises:
        EtudeError: a tracker's package is missing.
    """

    def __init__(self, names: Iterable[str], out: Path) -> None:
        self.names, self.out = tuple(names), out
        self._open: dict[str, Tracker] = {}
        for name in self.names:
            if not is_installed(name):
                raise EtudeError(
                    f"trackers holds '{name}', whose package is not installed: pip install {name}, or take it out of trackers."
                )

    @contextmanager
    def started(self, config: str) -> Iterator[None]:
        """Context in which the trackers are open.

        Raises:
            EtudeError: a tracker cannot be started; what it has written is removed.
        """
        before = [self.out / name for name in self.names if (self.out / name).exists()]
        try:
            for name in self.names:
                self._start(name, config)
        except BaseException:
            self._finish(complete=False)
            for name in self.names:
                if self.out / name not in before:
                    shutil.rmtree(self.out / name, ignore_errors=True)
            raise
        complete = False
        try:
            yield
            complete = True
        finally:
            self._finish(complete)

    def catch_up(self, metrics: Path) -> None:
        """Tells the trackers the rows of `metrics.jsonl` that they lack: those of a kill or of a failure."""
        if self._open and metrics.exists():
            for line in metrics.read_text(encoding="utf-8").splitlines():
                self.tell(json.loads(line))

    def tell(self, row: Mapping[str, Any]) -> None:
        """Tells each tracker the row of an iteration, unless it holds it."""
        for name, tracker in list(self._open.items()):
            if row["iteration"] > tracker.told:
                with self._outlived(name):
                    numbers = {key: value for key, value in row.items() if key != "scores"}  # a list of every image
                    tracker.tell(flatten(numbers), row["iteration"])
                    tracker.told = row["iteration"]

    def _start(self, name: str, config: str) -> None:
        try:
            self._open[name] = TRACKERS[name](self.out / name, config)
        except Exception as error:
            raise EtudeError(
                f"the tracker {name} cannot be started ({type(error).__name__}: {brief(error).rstrip('.')}): "
                f"{TRACKERS[name].remedy}, or take it out of trackers."
            ) from error

    def _finish(self, complete: bool) -> None:
        for name, tracker in list(self._open.items()):
            with self._outlived(name):
                tracker.finish(complete)
        self._open = {}

    @contextmanager
    def _outlived(self, name: str) -> Iterator[None]:
        """Context of a tracker's work, which is left out after its first failure."""
        try:
            yield
        except Exception as error:
            del self._open[name]
            warn_that_it_failed(f"the tracker {name}", error)


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """A row of metrics as `a/b/c: number`, the form that trackers take; list entries count from 0."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        tree = dict(enumerate(value)) if isinstance(value, list) else value
        flat |= flatten(tree, f"{prefix}{key}/") if isinstance(tree, dict) else {f"{prefix}{key}": tree}
    return flat


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _newest_step(file: Path) -> int:
    """The newest step in a file of wandb, or -1: a log of LevelDB, whose records are protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, newest = file.read_bytes(), 7, b"", -1  # seven bytes say what the file is
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block, too short for a header
            at += 32768 - at % 32768
            continue
        length, part = struct.unpack_from("<HB", data, at + 4)  # after a checksum
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if at > len(data) or part == 0:  # a kill has torn it
            break
        if part in (1, 4):  # a whole record or its last part
            with suppress(Exception):  # a record of another version says nothing
                entry = Record.FromString(record)
                if entry.WhichOneof("record_type") == "history":
                    newest = max(newest, entry.history.step.num)
            record = b""
    return newest


def _trackio_in(directory: Path) -> Any:
    """The module trackio, which reads the directory that it writes to once, when it is imported."""
    wanted = str(directory.absolute())
    utils = sys.modules.get("trackio.utils")
    if utils is not None and str(utils.TRACKIO_DIR) != wanted:
        for name in [name for name in sys.modules if re.match(r"trackio(\.|$)", name)]:
            del sys.modules[name]
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = wanted
    try:
        return importlib.import_module("trackio")
    finally:
        if before is None:
            del os.environ["TRACKIO_DIR"]
        else:
            os.environ["TRACKIO_DIR"] = before

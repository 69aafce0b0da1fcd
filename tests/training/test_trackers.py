"""A run outlives its display and its trackers; a tracker holds each iteration once, in one run, across kills and resumes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from etude.config import parse_config
from etude.errors import EtudeError
from etude.training import trackers as module
from etude.training.progress import Display
from etude.training.trackers import TRACKERS, Tracker, Trackers
from etude.training.trainer import Trainer
from support.small_runs import brief_settings, outcome, train_until

CONFIG = "iterations: 6\n"


def row(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "reward": {"redness": {"mean": iteration / 8}}, "memory_mb": 512.0}


def write(out: Path, iterations: range) -> Path:
    """Metrics of a run, as a resumed one finds them."""
    out.mkdir(exist_ok=True)
    path = out / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(iteration)) + "\n" for iteration in iterations))
    return path


def session(name: str, out: Path, resumed_at: int, iterations: range) -> None:
    """One process of a run: it finds the rows up to a checkpoint, and writes those of `iterations`."""
    metrics, trackers = write(out, range(resumed_at + 1)), Trackers([name], out)
    with trackers.started(CONFIG):
        trackers.catch_up(metrics)
        for iteration in iterations:
            trackers.tell(row(iteration))
    if name == "wandb":
        import wandb

        wandb.teardown()  # as at the end of a process: until then its files may not be complete


def in_tensorboard(out: Path) -> list[tuple[int, dict[str, float]]]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    events = [e for file in sorted((out / "tensorboard").iterdir()) for e in LegacyEventFileLoader(str(file)).Load()]
    rows = [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in events]
    return [(step, values) for step, values in rows if "iteration" in values]


def in_wandb(out: Path) -> list[tuple[str, str, int]]:
    """Project, run and step of each row in wandb's files, oldest file first."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for file in sorted((out / "wandb").glob("offline-run-*/*.wandb")):
        project = name = ""
        for record in map(Record.FromString, records(file.read_bytes())):
            if record.WhichOneof("record_type") == "run":
                project, name = record.run.project, record.run.run_id
            elif record.WhichOneof("record_type") == "history":
                rows.append((project, name, record.history.step.num))
    return rows


def records(data: bytes) -> list[bytes]:
    """The records of a log of LevelDB, as its format says."""
    found, record, data = [], b"", data[7:]
    for start in range(0, len(data), 32768):
        # The header of the file counts to its first block.
        block = data[max(0, start - 7) : start + 32768 - 7]
        while len(block) >= 7:
            length, part = struct.unpack_from("<HB", block, 4)
            if 7 + length > len(block):  # torn
                break
            record, block = record + block[7 : 7 + length], block[7 + length :]
            if part in (1, 4):
                found.append(record)
                record = b""
    return found


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb without a network, in an empty home and another working directory than the run's."""
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def test_tensorboard_shows_each_iteration_once_across_a_kill_and_a_resume(tmp_path):
    out = tmp_path / "run"
    session("tensorboard", out, -1, range(4))
    torn = next((out / "tensorboard").iterdir())
    torn.write_bytes(torn.read_bytes()[:-5])  # the kill came while iteration 3 was written
    session("tensorboard", out, 1, range(2, 7))
    assert [step for step, _ in in_tensorboard(out)] == [0, 1, 2, 3, 4, 5, 6]
    assert in_tensorboard(out)[2][1] == {"iteration": 2.0, "reward/redness/mean": 0.25, "memory_mb": 512.0}
    assert {path.name for path in out.iterdir()} == {"tensorboard", "metrics.jsonl"}


def test_wandb_shows_each_iteration_once_in_one_run_across_a_kill_and_a_resume(tmp_path, offline):
    from wandb.proto.wandb_internal_pb2 import Record

    out = tmp_path / "run"
    session("wandb", out, -1, range(4))
    file = next((out / "wandb").glob("offline-run-*/*.wandb"))
    data = file.read_bytes()
    newest = [r for r in records(data) if Record.FromString(r).WhichOneof("record_type") == "history"][-1]
    file.write_bytes(data[: data.index(newest) + 5])  # the kill came before the newest row was on the disk
    kept = [step for *_, step in in_wandb(out)]
    assert kept == [0, 1, 2]
    session("wandb", out, 1, range(2, 7))
    rows_told = in_wandb(out)
    assert [step for *_, step in rows_told] == [0, 1, 2, 3, 4, 5, 6]
    assert len({name for _, name, _ in rows_told}) == 1
    assert {project for project, *_ in rows_told} == {"etude"}
    assert not list((tmp_path / "elsewhere").iterdir())


def test_trackio_shows_each_iteration_once_in_one_run_across_a_resume(tmp_path, monkeypatch):
    pytest.importorskip(
        "trackio", reason="trackio wants pillow < 13 and the tests run on 13: install it by hand to run this"
    )
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("first", "second"):  # two runs of one process
        out = tmp_path / name
        session("trackio", out, -1, range(4))
        session("trackio", out, 1, range(2, 7))
        storage = sys.modules["trackio.sqlite_storage"].SQLiteStorage
        assert storage.get_runs("etude") == [name]
        assert [each["step"] for each in storage.get_logs("etude", name)] == [0, 1, 2, 3, 4, 5, 6]
        assert (out / "trackio" / "etude.db").is_file()
    assert not (tmp_path / "elsewhere").exists()


def test_wandb_without_a_key_is_one_sentence_and_leaves_nothing(tmp_path):
    pytest.importorskip("wandb")
    program = (
        "import sys; from pathlib import Path; from etude.errors import EtudeError; from etude.files import made\n"
        "from etude.training.trackers import Trackers\n"
        "out = Path('runs/first')\n"
        "try:\n"
        "    with made(out), Trackers(['tensorboard', 'wandb'], out).started('x: 1'): pass\n"
        "except EtudeError as error: print(error)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=clean | {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "none")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    (sentence,) = done.stdout.splitlines()
    assert sentence.startswith("the tracker wandb cannot be started (UsageError: No API key configured")
    assert "WANDB_MODE=offline, or take it out of trackers." in sentence
    assert not (tmp_path / "runs").exists()


def test_a_tracker_without_its_package_is_an_error_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "no_such_package", TRACKERS["wandb"])
    Trackers(["tensorboard"], tmp_path)
    with pytest.raises(EtudeError, match="pip install no_such_package, or take it out"):
        Trackers(["tensorboard", "no_such_package"], tmp_path)


class Remembering(Tracker):
    """Holds the steps that it was told; some of its methods fail."""

    steps: list[int]
    fails = ""

    def __init__(self, directory: Path, config: str) -> None:
        directory.mkdir(parents=True)
        self._fail("start")
        type(self).steps = []

    def tell(self, values: Mapping[str, float], step: int) -> None:
        if step == 1:
            self._fail("tell")
        self.steps.append(step)

    def finish(self, complete: bool) -> None:
        self._fail("finish")

    def _fail(self, where: str) -> None:
        if self.fails == where:
            raise ConnectionResetError(f"the tracker died in {where}")


def remembering(monkeypatch: pytest.MonkeyPatch, fails: str) -> type[Remembering]:
    kind = type("Remembering", (Remembering,), {"fails": fails})
    monkeypatch.setitem(TRACKERS, "wandb", kind)
    monkeypatch.setattr(module, "is_installed", lambda package: True)
    return kind


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return brief_settings(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    Trainer(parse_config(settings), out).train()
    return outcome(out)


@pytest.mark.parametrize(("fails", "told"), [("", [0, 1, 2]), ("tell", [0]), ("finish", [0, 1, 2])])
def test_a_tracker_that_dies_ends_no_run(tmp_path, monkeypatch, settings, undisturbed, fails, told):
    kind = remembering(monkeypatch, fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(parse_config(settings | {"trackers": ["wandb"]}), tmp_path / "run").train()
    said = [str(warning.message) for warning in caught if "goes on without it" in str(warning.message)]
    died = (
        f"the tracker wandb failed (ConnectionResetError: the tracker died in {fails}), and the run goes on without it"
    )
    assert said == ([died] if fails else [])
    assert kind.steps == told
    assert outcome(tmp_path / "run") == undisturbed


def test_scores_of_every_image_are_in_the_metrics_and_in_no_tracker(tmp_path, monkeypatch, settings):
    kind, told = remembering(monkeypatch, ""), []
    monkeypatch.setattr(kind, "tell", lambda self, values, step: told.extend(values))
    tree = settings | {"trackers": ["wandb"], "evaluation": settings["evaluation"] | {"image_scores": True}}
    Trainer(parse_config(tree), tmp_path / "run").train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scored = [row for row in rows if "scores" in row]
    assert scored == [row for row in rows if "evaluation" in row]
    assert all(len(row["scores"]["clusters"]) == settings["evaluation"]["num_images"] for row in scored)
    assert told
    assert not [name for name in told if name.startswith("scores")]


def test_a_tracker_that_cannot_start_leaves_no_directory(tmp_path, monkeypatch, settings):
    remembering(monkeypatch, "start")
    trainer = Trainer(parse_config(settings | {"trackers": ["wandb"]}), tmp_path / "runs" / "run")
    with pytest.raises(EtudeError, match=r"tracker wandb cannot be started .*died in start.*take it out of trackers"):
        trainer.train()
    assert not (tmp_path / "runs").exists()


def test_a_resumed_run_tells_tensorboard_what_it_lacks_and_no_more(tmp_path, settings, undisturbed):
    config = parse_config(settings | {"trackers": ["tensorboard"], "checkpoint": {"every": 2}})
    out = tmp_path / "run"
    train_until(Trainer(config, out), 2)
    before = [step for step, _ in in_tensorboard(out)]
    assert before == [0, 1]
    Trainer(config, out, resume=True).train()
    assert [step for step, _ in in_tensorboard(out)] == [0, 1, 2]
    assert outcome(out) == undisturbed


class Raising(Display):
    """A display of which one method fails."""

    def __init__(self, method: str) -> None:
        self.calls: list[str] = []

        def fail(*arguments: Any) -> None:
            self.calls.append(method)
            raise OSError("the window is closed")

        setattr(self, method, fail)


@pytest.mark.parametrize("method", ["phase", "advance", "iteration", "summary_table"])
def test_a_display_that_fails_ends_no_run_and_is_left_alone(tmp_path, settings, undisturbed, method):
    display = Raising(method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(parse_config(settings), tmp_path / "run", display=display).train()
    said = [str(warning.message) for warning in caught if "goes on without it" in str(warning.message)]
    assert said == ["the display failed (OSError: the window is closed), and the run goes on without it"]
    assert display.calls == [method]
    assert outcome(tmp_path / "run") == undisturbed

"""Text that nobody reads ends no command: the reader of a pipe, a terminal or a colour may be missing."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from etude.cli import streams
from etude.cli.app import app
from etude.cli.streams import LastingStream, only_shows, outlast_readers, reader_is_gone
from etude.cli.training_display import TrainingDisplay
from etude.config import parse_config
from etude.errors import EtudeError
from etude.terminal import PLAIN_WIDTH, make_console
from support.small_runs import brief_settings, outcome

COLOURED = "\x1b[31merror: \x1b[0m\x1b[1;38;5;208mtext\x1b[m\x1b[?25h\x1b[2K"
LINE = {"iteration": 1, "reward": {"colorfulness": {"mean": 40.0, "std": 2.0}}, "seconds": {"total": 2.0}}


@pytest.fixture
def descriptors() -> Iterator[Callable[[int], int]]:
    """Gives descriptors of the test, which are closed after it, also where `/dev/null` took their place."""
    opened: list[int] = []

    def own(descriptor: int) -> int:
        opened.append(descriptor)
        return descriptor

    yield own
    for descriptor in opened:
        os.close(descriptor)


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    master, slave = pty.openpty()
    os.close(master)
    return slave


@pytest.mark.parametrize("without_reader", [closed_pipe, closed_terminal])
def test_text_without_a_reader_goes_nowhere_and_ends_nothing(descriptors, without_reader):
    descriptor = descriptors(without_reader())
    stream = LastingStream(descriptor, only_shows=False)
    assert stream.write(b"line\n") == 5
    assert stream.gone
    os.write(descriptor, b"a child process or a library writes below the stream")
    text = io.TextIOWrapper(io.BufferedWriter(stream))
    print("more", file=text, flush=True)
    text.detach()


def test_a_full_disk_is_an_error_of_results_but_not_of_what_only_shows(descriptors):
    result = LastingStream(descriptors(os.open("/dev/full", os.O_WRONLY)), only_shows=False)
    with pytest.raises(EtudeError, match="standard output could not be written"):
        result.write(b"table")
    assert result.write(b"the last flush") == 14
    shown = LastingStream(descriptors(os.open("/dev/full", os.O_WRONLY)), only_shows=True)
    assert shown.write(b"line") == 4
    assert not shown.gone  # there may be a reader, but there is no space


def test_a_pipe_that_does_not_wait_receives_every_byte(descriptors):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    received: list[bytes] = []
    read = threading.Thread(target=lambda: received.extend(iter(lambda: os.read(reader, 4096), b"")))
    text = bytes(range(256)) * 4096  # 16 times what a pipe holds
    stream = LastingStream(writer, only_shows=False)
    read.start()
    assert stream.write(text) == len(text)
    os.close(writer)
    read.join()
    os.close(reader)
    assert b"".join(received) == text


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "unknown")])
def test_without_colours_nobody_writes_one(descriptors, tmp_path, monkeypatch, variable, value):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, expected in (("before", COLOURED), ("after", "error: text\x1b[?25h\x1b[2K")):
        file = tmp_path / name
        stream = LastingStream(descriptors(os.open(file, os.O_WRONLY | os.O_CREAT)), only_shows=False)
        assert stream.write(COLOURED.encode()) == len(COLOURED)
        assert file.read_text() == expected
        monkeypatch.setenv(variable, value)


def test_a_letter_that_the_encoding_lacks_is_written_as_its_number(descriptors, tmp_path):
    poor = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    file = tmp_path / "log"
    text = streams._lasting(poor, descriptors(os.open(file, os.O_WRONLY | os.O_CREAT)), only_shows=False)
    print("▁ café", file=text, flush=True)
    assert file.read_bytes() == b"\\u2581 caf\\xe9\n"


def test_streams_of_the_program_last_and_know_what_they_are_for(monkeypatch):
    another = io.StringIO()
    monkeypatch.setattr(sys, "stdout", another)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
    outlast_readers()
    only_shows()
    assert sys.stdout is another  # a caller's own stream is left alone
    assert not reader_is_gone()
    for number, name in enumerate(("stdout", "stderr"), start=1):
        monkeypatch.setattr(sys, name, open(number, "w", encoding="utf-8", buffering=1, closefd=False))  # noqa: SIM115
    outlast_readers()
    assert [sys.stdout.fileno(), sys.stderr.fileno()] == [1, 2]
    assert (sys.stdout.encoding, sys.stdout.line_buffering) == ("utf-8", True)
    output, errors = streams._raw(sys.stdout), streams._raw(sys.stderr)
    assert output is not None
    assert errors is not None
    assert (output.only_shows, errors.only_shows) == (False, True)
    only_shows()
    assert output.only_shows
    assert not reader_is_gone()


@pytest.mark.parametrize(
    ("environment", "terminal", "moves"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"FORCE_COLOR": "1"}, False, False),
        ({"TTY_COMPATIBLE": "1", "GITHUB_ACTIONS": "true"}, False, False),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, False),
        ({"CI": "true"}, True, False),
        ({"CI": "false"}, True, True),
        ({"NO_COLOR": "1"}, True, True),
    ],
)
def test_only_a_terminal_with_a_person_before_it_has_bars_that_move(monkeypatch, environment, terminal, moves):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CI", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    file = open(slave, "w") if terminal else io.StringIO()  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", file)
    console = make_console()
    assert console.is_interactive == moves
    config = parse_config({"iterations": 4, "rewards": {"colorfulness": 1.0}})
    if not moves:
        assert console.width == PLAIN_WIDTH
        with TrainingDisplay(config, console) as display:
            display.phase("rollout", 8)
            display.advance()
            display.iteration(LINE)
            display.phase("update")
        file.flush()
        text = os.read(master, 4096).decode().replace("\r\n", "\n") if terminal else file.getvalue()
        assert text == "iteration 1/4 | colorfulness: training SDE 40 | 2.0 s\n"
    file.close()
    os.close(master)


def etude(*arguments: str, output: int, environment: dict[str, str], **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "etude", *arguments]
    streams_of = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
    clean = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR", "CI"}}
    return subprocess.run(command, env=clean | environment, timeout=500, check=False, **(streams_of | options))


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["nonsense"], ["recipes", "nonsense"]])
def test_help_and_errors_obey_no_color_on_a_terminal(arguments):
    shown = {}
    for environment in ({"TERM": "xterm-256color"}, {"TERM": "xterm-256color", "NO_COLOR": "1"}):
        master, slave = pty.openpty()
        parts: list[bytes] = []

        def read(master=master, parts=parts):
            with pytest.raises(OSError):  # noqa: PT012
                while True:
                    parts.append(os.read(master, 65536))

        reading = threading.Thread(target=read)
        reading.start()
        etude(*arguments, output=slave, environment=environment)
        os.close(slave)
        reading.join()
        os.close(master)
        shown[len(environment)] = b"".join(parts).decode()
    assert "\x1b[" in shown[1]
    assert "\x1b" not in shown[2]
    assert shown[2].strip()


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_lines_and_its_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = brief_settings(tmp_path) | {"rewards": {"chatty:chatty": 1.0}}
    (tmp_path / "chatty.py").write_text(
        "def chatty(images, prompts, **metadata):\n"
        "    print('scoring', len(prompts), flush=True)\n"
        "    return images.float().mean((1, 2, 3)) / 255\n"
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    terminal, pipe = closed_terminal(), closed_pipe()
    lost = etude(*("train", "run.yaml", "--out", "lost"), output=pipe, environment={}, stderr=terminal, cwd=tmp_path)
    os.close(terminal)
    os.close(pipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")
    seen = CliRunner().invoke(app, ["train", "run.yaml", "--out", "seen"])
    assert (lost.returncode, seen.exit_code) == (0, 0), seen.output
    assert outcome(tmp_path / "lost") == outcome(tmp_path / "seen")
    lines = [line for line in seen.stdout.splitlines() if line.startswith("iteration ")]
    assert [line.split(" | ")[0] for line in lines] == ["iteration 0/2", "iteration 1/2", "iteration 2/2"]
    assert "\x1b[?25l" not in seen.stdout
    assert not any("\x1b" in line for line in lines)
    assert "scoring" in seen.stdout


def test_descriptors_that_the_parent_closed_are_nobodys_file():
    with subprocess.Popen(
        ["sh", "-c", f'exec "{sys.executable}" -m etude recipes --keys >&- 2>&- <&-'], stdout=subprocess.PIPE
    ) as process:
        assert process.wait(100) == 0

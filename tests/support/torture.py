"""Faults, one after the other, against small runs: each must be explained in a sentence, and each resumed run must end with the bits
of a run that nothing happened to.

`make torture` takes minutes; `python tests/support/torture.py --help` lists what can be chosen. Every run is a child that this process forks, so
that torch is imported once. All moments are drawn from `--seed`; the machine's own pace decides what a moment hits, and the table says
what that was.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it

import conftest  # noqa: F401 - one thread and no hub, before torch is imported
from etude.cli import app as command_line
from etude.runs.checkpoint import Checkpoints, load_latest
from etude.training import durability, finish
from etude.training.supervision import Supervisor
from support.figures import leave_figures_out
from support.small_runs import metrics
from support.tiny import save_stable_diffusion

ITERATIONS = 4
AIMED = ("rollout", "update", "checkpoint", "export", "evaluation", "metrics", None)
"""What kills are aimed at, in turn; None is any moment of the run."""
WORKING = ("rollout", "rewards", "update", "evaluation", "metrics", "checkpoint")
"""The phases of the loop, in which a signal is waited for rather than obeyed by the operating system."""


class Marks:
    """What a child is doing, in memory that it shares with its parent: the phase, how often each began, and how long it took."""

    PHASES = ("loading", "resume", *WORKING, "confirmation", "export", "report", "other")

    def __init__(self) -> None:
        count = len(self.PHASES)
        shared = np.frombuffer(mmap.mmap(-1, 8 * (1 + 2 * count)), dtype=np.float64)
        self._now, self._entries, self._seconds = shared[:1], shared[1 : 1 + count], shared[1 + count :]

    def clear(self) -> None:
        for values in (self._now, self._entries, self._seconds):
            values[:] = 0

    @property
    def phase(self) -> str:
        return self.PHASES[int(self._now[0])]

    def entries(self, phase: str) -> int:
        return int(self._entries[self.PHASES.index(phase)])

    def seconds(self) -> dict[str, float]:
        """Of one entry into each phase, on average."""
        return {p: self._seconds[i] / max(1, self._entries[i]) for i, p in enumerate(self.PHASES)}

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        index = self.PHASES.index(phase if phase in self.PHASES else "other")
        before, started = self._now[0], time.perf_counter()
        self._now[0] = index
        self._entries[index] += 1
        try:
            yield
        finally:
            self._seconds[index] += time.perf_counter() - started
            self._now[0] = before

    def watch(self) -> None:
        """Puts marks around the phases of every run of this process and its children."""
        phase = Supervisor.phase

        @contextmanager
        def marked_phase(self_: Supervisor, name: str, total: int | None = None) -> Iterator[None]:
            with self.inside(name), phase(self_, name, total):
                yield

        Supervisor.phase = marked_phase  # type: ignore[method-assign]
        around: list[tuple[Any, str, str]] = [
            (durability.Durability, "restore", "resume"),
            (Checkpoints, "save", "checkpoint"),
            (durability, "append_line", "metrics"),
            (finish, "export", "export"),
            (finish, "finish", "report"),
        ]
        for owner, name, mark in around:
            setattr(owner, name, self._marked(getattr(owner, name), mark))

    def _marked(self, function: Callable[..., Any], mark: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.inside(mark):
                return function(*args, **kwargs)

        return call


class WrongError(Exception):
    """A fault that was not survived as it should."""


def expect(truth: object, says: str) -> None:
    if not truth:
        raise WrongError(says)


@dataclass
class Child:
    """A run in a process of its own."""

    pid: int
    log: Path
    code: int | None = None

    def over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, seconds: float = 120.0) -> int:
        """The exit code; a run that hangs is an error."""
        deadline = time.monotonic() + seconds
        while not self.over():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise WrongError(f"the run did not end within {seconds:g} s:\n{self.said()}")
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def send(self, number: int) -> None:
        if not self.over():
            os.kill(self.pid, number)


@dataclass
class Torture:
    """The place, the undisturbed run, and what has been counted."""

    root: Path
    random: random.Random
    marks: Marks = field(default_factory=Marks)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    lives: int = 0

    def prepare(self) -> None:
        """Writes the recipe and makes the run that nothing happens to."""
        (self.root / "prompts.txt").write_text("red heart\npizza\ntiger\nsun\n")
        prompts = str(self.root / "prompts.txt")
        tree = {
            "model": str(save_stable_diffusion(self.root / "sd")),
            "iterations": ITERATIONS,
            "rewards": {"colorfulness": 1.0, "jpeg_compressibility": 0.1},
            "prompts": {"train": prompts, "evaluation": prompts},
            "sampling": {"eta": 1.2, "num_steps": 3, "guidance_scale": 2.0},
            "rollout": {"images_per_iteration": 8, "images_per_prompt": 4},
            "objective": {"clip_range": None, "clip_nats": 1.6},
            "advantage": {"kind": "per_prompt", "min_count": 4},
            "ema": {"decay": 0.9},
            "evaluation": {"every": 2, "num_images": 4, "grid_images": 4},
            "checkpoint": {"best": "colorfulness"},
        }
        (self.root / "recipe.yaml").write_text(yaml.safe_dump(tree))
        self.marks.watch()
        self.whole = self.root / "whole"
        child = self.start(self.whole)
        expect(child.wait() == 0, f"the undisturbed run failed:\n{child.said()}")
        _import_ahead(child.log.with_suffix(".modules"))
        self.rows = metrics(self.whole)
        self.lasted = self.marks.seconds()
        self.expected = everything(self.whole)

    def directory(self) -> Path:
        self.lives += 1
        return self.root / f"run-{self.lives}"

    def start(self, out: Path, before: Callable[[], None] = lambda: None) -> Child:
        """`etude train` in a child: a new run, or the one that `out` holds. `before` runs first, in the child."""
        resume = ["--resume"] if out.is_dir() and (out / "config.yaml").is_file() else []
        log = self.root / f"{out.name}.log"
        self.marks.clear()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _become(["train", str(self.root / "recipe.yaml"), "--out", str(out), *resume], log, before)
        return Child(pid, log)

    def reach(self, child: Child, phase: str, entry: int) -> None:
        """Waits until the child is in the phase for the n-th time, or has ended."""
        while self.marks.entries(phase) < entry and not child.over():
            time.sleep(0.0002)

    def moment(self, child: Child, aim: str | None) -> None:
        """Waits for a random moment of a phase, or of the whole run."""
        if aim is None:
            time.sleep(self.random.random() * (0.5 + sum(self.lasted[p] for p in WORKING) * ITERATIONS / 2))
            return
        self.reach(child, aim, 1 if aim == "export" else self.random.randint(1, 2))
        time.sleep(self.random.random() * self.lasted[aim])

    def interrupted(self, out: Path, iteration: int) -> None:
        """A run of which SIGKILL left at least the checkpoint of an iteration."""
        child = self.start(out)
        self.reach(child, "checkpoint", iteration + 2)  # the first is that of iteration 0
        child.send(signal.SIGKILL)
        child.wait()

    def finish(self, out: Path, warned: str = "") -> None:
        """Resumes the run undisturbed, to the end, and compares everything."""
        child = self.start(out)
        expect(child.wait() == 0, f"the resumed run failed:\n{child.said()}")
        expect(warned in child.said(), f"the resumed run did not say {warned!r}:\n{child.said()}")
        found = everything(out)
        different = [key for key in self.expected.keys() | found if self.expected.get(key) != found.get(key)]
        expect(not different, f"not what the undisturbed run has: {', '.join(sorted(different))}")
        shutil.rmtree(out)

    def sound(self, out: Path) -> None:
        """What is on the disk at any moment: each row once and in order, and no checkpoint that is torn."""
        if (out / "metrics.jsonl").is_file():
            *lines, torn = (out / "metrics.jsonl").read_bytes().split(b"\n")
            rows = [json.loads(line) for line in lines]
            kept = [{k: v for k, v in row.items() if k not in {"seconds", "memory_mb"}} for row in rows]
            expect(kept == self.rows[: len(kept)], f"metrics.jsonl holds iterations {[r['iteration'] for r in rows]}")
            self.count("rows of metrics seen after a fault", "once and in order", len(rows))
            if torn:
                self.count("rows of metrics seen after a fault", "torn last line")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_latest(out / "checkpoints")

    def failed(self, child: Child, mentions: str) -> None:
        """The run ended with exit code 1 and one sentence on the error stream."""
        code = child.wait()
        errors = [line for line in child.said().splitlines() if line.startswith("error: ")]
        expect(code == 1, f"exit code {code} instead of 1:\n{child.said()}")
        expect(len(errors) == 1 and mentions in errors[0], f"no single sentence about {mentions!r}:\n{child.said()}")
        expect("Traceback" not in child.said(), f"a traceback:\n{child.said()}")

    def count(self, fault: str, what: str, number: int = 1) -> None:
        self.counts.setdefault(fault, Counter())[what] += number

    def kills(self, number: int) -> None:
        """SIGKILL, several times in each run."""
        done = 0
        while done < number:
            out, left = self.directory(), min(self.random.randint(2, 6), number - done)
            while left:
                child = self.start(out)
                self.moment(child, AIMED[done % len(AIMED)])
                phase = self.marks.phase
                child.send(signal.SIGKILL)
                if child.wait() == 0:
                    self.count("SIGKILL", "came after the end")
                    break
                expect(child.code == -signal.SIGKILL, f"it ended by itself:\n{child.said()}")
                self.count("SIGKILL", phase)
                self.sound(out)
                left, done = left - 1, done + 1
            self.finish(out)
            self.count("runs that were killed", "bit-identical")

    def signals(self, number: int) -> None:
        """SIGINT and SIGTERM in the loop, alone and twice."""
        done = 0
        while done < number:
            sent, twice = (signal.SIGINT, signal.SIGTERM)[done % 2], done % 3 == 2
            out = self.directory()
            child = self.start(out)
            self.moment(child, WORKING[done % len(WORKING)])
            for _ in range(2 if twice else 1):
                child.send(sent)
                time.sleep(0.001)
            code, name = child.wait(), f"{sent.name} twice" if twice else sent.name
            if code == 0:  # the last iteration was over: what was left was to write the results
                self.finish(out)
                self.count(name, "came after the end")
                continue
            done += 1
            expect(code == 128 + sent, f"{name}: exit code {code} instead of {128 + sent}:\n{child.said()}")
            lines = [line for line in child.said().splitlines() if "--resume" in line]
            expect(len(lines) == 1, f"{name}: not one line on how to resume:\n{child.said()}")
            self.sound(out)
            self.finish(out)
            self.count(name, f"exit code {code}, bit-identical")

    def damage(self, number: int) -> None:
        """Bits flipped in, or an end cut off, the newest checkpoint; at last in all of them."""
        for i in range(number):
            out, way = self.directory(), ("bit flipped", "truncated")[i % 2]
            self.interrupted(out, self.random.randint(1, ITERATIONS - 1))
            _damage(_newest(out), way, self.random)
            self.finish(out, warned="is damaged and not used")
            self.count(f"checkpoint: {way}", "named, bit-identical")
        out = self.directory()
        self.interrupted(out, 2)
        for checkpoint in (out / "checkpoints").glob("iteration-*"):
            _damage(checkpoint, "bit flipped", self.random)
        before = everything(out)
        self.failed(self.start(out), "is sound")
        expect(everything(out) == before, "a run whose checkpoints are all damaged was changed")
        self.count("checkpoint: all damaged", "explained, nothing changed")

    def full_disk(self, number: int) -> None:
        """A file system without room, where one may be mounted; and files that stop growing, anywhere."""
        needed = sum(file.stat().st_size for file in self.whole.rglob("*") if file.is_file())
        largest = max(file.stat().st_size for file in _newest(self.whole).iterdir())
        for _ in range(number):
            with self._small_disk(int(needed * (0.1 + 0.6 * self.random.random()))) as (out, make_room):
                if out is None:
                    self.count("disk full", "skipped: tmpfs cannot be mounted here")
                    break
                self.failed(self.start(out), "be written")
                self.sound(out)
                make_room()
                self.finish(out)
                self.count("disk full", "explained, bit-identical")
        for _ in range(number):
            out, size = self.directory(), self.random.randrange(2_000, largest)
            limit = lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
            self.failed(self.start(out, before=limit), "be written")
            self.sound(out)
            self.finish(out)
            self.count("files cannot grow", "explained, bit-identical")

    @contextmanager
    def _small_disk(self, size: int) -> Iterator[tuple[Path | None, Callable[[], None]]]:
        place = self.root / "disk"
        place.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            yield None, lambda: None
            return
        try:
            more = ["mount", "-o", "remount,size=64m", str(place)]
            yield place / "run", lambda: subprocess.run(more, check=True) and None  # type: ignore[func-returns-value]
        finally:
            subprocess.run(["umount", str(place)], check=True)

    def read_only(self, number: int) -> None:
        """A directory that must not be written, from the start or from some moment on."""
        for i in range(number):
            out = self.directory()
            if i % 2:
                self.interrupted(out, 1)
                _permit(out, False)
                before = everything(out)
                self.failed(self.start(out, before=_bound_by_permissions), "permissions")
                expect(everything(out) == before, "a directory that is read-only was changed")
            else:
                out.mkdir()
                child = self.start(out, before=_bound_by_permissions)
                self.reach(child, "rollout", self.random.randint(1, 2))
                _permit(out, False)
                self.failed(child, "permi")
                self.sound(out)
            _permit(out, True)
            self.finish(out)
            self.count("read-only directory", "explained, bit-identical")

    def clock(self, number: int) -> None:
        """The wall clock jumps by up to ten years, there and back, each time that it is read."""
        for _ in range(number):
            out, seed = self.directory(), self.random.random()

            def jump(seed: float = seed) -> None:
                real, offsets = time.time, random.Random(seed)
                time.time = lambda: real() + offsets.uniform(-3e8, 3e8)

            child = self.start(out, before=jump)
            self.moment(child, "update")
            child.send(signal.SIGKILL)
            child.wait()
            child = self.start(out, before=jump)
            expect(child.wait() == 0, f"the run under a jumping clock failed:\n{child.said()}")
            expect(all(s >= 0 for s in _seconds(out)), "the metrics hold negative seconds")
            self.finish(out)
            self.count("clock jumps", "bit-identical")

    def table(self) -> Table:
        table = Table("fault", "outcome", "count", box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for fault, outcomes in self.counts.items():
            total = sum(outcomes.values())
            if len(outcomes) > 1:
                table.add_row(fault, "all", str(total))
            for what, number in outcomes.most_common():
                table.add_row("" if len(outcomes) > 1 else fault, what, str(number))
        return table


def everything(out: Path) -> dict[str, Any]:
    """What two runs are compared by: every file, without clocks and memory, and the names of them all."""
    found: dict[str, Any] = {"names": sorted(str(file.relative_to(out)) for file in out.rglob("*"))}
    if (out / "metrics.jsonl").is_file():
        found["metrics"] = metrics(out)
    for file in out.glob("lora*/*.safetensors"):  # safetensors writes the metadata of a file in any order
        found[str(file.relative_to(out))] = {name: value.tobytes() for name, value in load_file(file).items()}
    for file in filter(Path.is_file, [*out.glob("samples/**/*"), *out.glob("checkpoints/*/*")]):
        found[str(file.relative_to(out))] = file.read_bytes()
    if (out / "summary.json").is_file():
        summary = json.loads((out / "summary.json").read_text())
        found["summary"] = {k: summary[k] for k in ("final", "best", "iterations", "stopped", "deploy")}
    return found


def _become(arguments: list[str], log: Path, before: Callable[[], None]) -> None:
    """Turns a forked process into the `etude` program. It never returns."""
    code: Any = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        before()
        sys.argv = ["etude", *arguments]
        command_line.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            log.with_suffix(".modules").write_text("\n".join(sys.modules))
        for output in (sys.stdout, sys.stderr):
            output.flush()
        os._exit(code)


def _import_ahead(modules: Path) -> None:
    """Imports what a run has imported by its end, so that the children that follow find it done."""
    for name in modules.read_text().split():
        with suppress(Exception):  # some exist only inside of others
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _newest(out: Path) -> Path:
    return max((out / "checkpoints").glob("iteration-*"))


def _damage(checkpoint: Path, way: str, choose: random.Random) -> None:
    file = choose.choice(sorted(checkpoint.iterdir()))
    data = bytearray(file.read_bytes())
    if way == "truncated":
        os.truncate(file, choose.randrange(len(data)))
        return
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    file.write_bytes(data)


def _permit(out: Path, writing: bool) -> None:
    """Gives or takes the right to write to a directory, and to everything in it."""
    for path in [out, *out.rglob("*")]:
        path.chmod((0o755 if path.is_dir() else 0o644) if writing else (0o555 if path.is_dir() else 0o444))


def _bound_by_permissions() -> None:
    """Takes from this process what lets the superuser write anywhere: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of Linux."""
    if os.geteuid() != 0:
        return
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (
        ctypes.c_uint32 * 6
    )()  # effective, permitted and inheritable, the low 32 bits of each and then the high ones
    expect(library.capget(header, sets) == 0, "the capabilities of the process cannot be read")
    for i in range(3):
        sets[i] &= ~0b110
    expect(library.capset(header, sets) == 0, "the capabilities of the process cannot be taken from it")


def _seconds(out: Path) -> Iterator[float]:
    for line in (out / "metrics.jsonl").read_text().splitlines():
        yield from json.loads(line)["seconds"].values()


FAULTS = ("kills", "signals", "damage", "full_disk", "read_only", "clock")


def main(
    kills: Annotated[int, typer.Option(help="How many times SIGKILL is sent.")] = 56,
    others: Annotated[int, typer.Option(help="How often each other fault happens.")] = 6,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(FAULTS)}; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the moments.")] = 0,
    keep: Annotated[bool, typer.Option(help="Leave the runs where they are.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the counts to this file.")] = None,
) -> None:
    """Torture runs with faults: each is explained, and each resumed run ends with the bits of one that nothing happened to."""
    console = Console(stderr=False)
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    torture, started = Torture(root, random.Random(seed)), time.monotonic()
    leave_figures_out()  # they take most of a small run's time, and are not compared
    try:
        torture.prepare()
        for fault in only or FAULTS:
            getattr(torture, fault)(kills if fault == "kills" else others)
            console.print(f"{fault}: done after {time.monotonic() - started:.0f} s", highlight=False)
    except WrongError as error:
        console.print(torture.table())
        console.print(f"[red]failed[/red], see {root}: {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(torture.table())
    console.print(f"every resumed run was bit-identical to the undisturbed one; {time.monotonic() - started:.0f} s")
    if json_ is not None:
        json_.write_text(json.dumps({"seed": seed, "counts": torture.counts}, indent=2) + "\n")
    if not keep:
        shutil.rmtree(root)


if __name__ == "__main__":
    typer.run(main)

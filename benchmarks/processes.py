"""Measured programs run in processes of their own, which wait idle until they are asked for one iteration."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
"""Scratch files: git-ignored, on the disk of the checkout, so that writing a checkpoint costs what it costs there."""


class Side:
    """One measured process. Several can be open at once, and only the one that is asked works.

    Args:
        python: interpreter of the environment it runs in.
        module: a module of this package that calls `protocol.serve`.
        settings: passed to it.
        threads: threads of torch in it; None leaves torch's default.
        cpu: hide any GPU from it.

    Raises:
        RuntimeError: if the process ends before it replies; with the end of its log.
    """

    def __init__(
        self, python: Path | str, module: str, settings: dict[str, Any], threads: int | None = None, cpu: bool = True
    ) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        self.log = BUILD / f"{module.rpartition('.')[2]}-{os.getpid()}-{id(self):x}.log"
        command = [str(python), "-m", module, json.dumps(settings)]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=_environment(threads, cpu),
            )
        self.info = self._receive()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Has the process do something, and waits for its reply."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process is gone: the missing reply says so, with its log
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            end = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"a measured process ended with exit code {code}; the end of {self.log}:\n{end}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if kind is not None:
            self._process.kill()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        if kind is None:
            self.log.unlink()


def _environment(threads: int | None, cpu: bool) -> dict[str, str]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if threads is not None:
        environment |= {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
    if cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    return environment

"""Processes of measured programs, which wait idle until a request for one iteration."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
"""Scratch files: git-ignored, on the disk of the checkout, as its checkpoints would be."""


class Side:
    """One measured process. Several can be open at once; each works only on request.

    Args:
        python: interpreter of the process's environment.
        module: module of this package that calls `protocol.serve`.
        settings: settings of the process.
        threads: number of torch's threads. Default: torch's own.
        cpu: hide all GPUs.
        environment: further environment variables.
        wait: wait for the process's `info`. False: `receive` returns it.

    Raises:
        RuntimeError: the process ends before it replies; the message has the end of its log.
    """

    def __init__(
        self,
        python: Path | str,
        module: str,
        settings: dict[str, Any],
        threads: int | None = None,
        cpu: bool = True,
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
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
                env=_environment(threads, cpu) | dict(environment or {}),
            )
        self.info = self.receive() if wait else {}

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for the reply."""
        self.send(do, **arguments)
        return self.receive()

    def send(self, do: str, **arguments: Any) -> None:
        """Sends a request."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process is gone; `receive` reports it, with its log

    def receive(self, within: float | None = None) -> dict[str, Any]:
        """Waits for the next reply; TimeoutError after `within` seconds."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], within)[0]:
            raise TimeoutError(f"no reply within {within:g} seconds")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            end = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"a measured process ended with exit code {code}; the end of {self.log}:\n{end}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def stop(self) -> None:
        """Ends the process, if it has not ended."""
        self._process.kill()
        self._process.wait()

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


class Group:
    """The processes of one run on this machine; all get the same requests at once.

    Args:
        module: module as of `Side`, run by this interpreter.
        settings: settings of each process.
        count: number of processes.
        threads: number of torch's threads in each process.
    """

    def __init__(self, module: str, settings: dict[str, Any], count: int, threads: int | None) -> None:
        shared = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
        }
        each = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
        with ExitStack() as started:
            self._sides = [
                started.enter_context(
                    Side(
                        sys.executable,
                        module,
                        settings,
                        threads,
                        environment={name: str(value) for name, value in own.items()},
                        wait=False,
                    )
                )
                for own in each
            ]
            replies = [side.receive() for side in self._sides]
            self.info = replies[0]
            self._open = started.pop_all()

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Sends a request to all processes and waits for their replies."""
        for side in self._sides:
            side.send(do, **arguments)
        return [side.receive() for side in self._sides]

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


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

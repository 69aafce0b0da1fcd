"""Starts several processes on one machine, as torchrun or `accelerate launch` do, and says where each of them stood if they do not end."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
TESTS = Path(__file__).parents[1]
EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"


def launch(
    count: int,
    arguments: list[str],
    timeout: float = 240,
    config: str | None = None,
    options: tuple[str, ...] = (),
    **environment: str,
) -> tuple[int, str]:
    """`python ARGUMENTS` in `count` processes that can form a group; returns the exit code and all output.

    One such group runs at a time, whichever workers of pytest-xdist start them: the others wait, and their time does not count.
    By torchrun, or by `accelerate launch` with a shipped example, named by `config`, and more `options`. If the processes do not end in
    time they are ended by SIGABRT, which prints their stacks, and the test fails with those.
    """
    # Everything over the loopback: neither the machine's name nor its interfaces need to be known to anybody.
    given = {"PYTHONFAULTHANDLER": "1", "GLOO_SOCKET_IFNAME": LOOPBACK, "OMP_NUM_THREADS": "1"}
    given["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    with _turn(), tempfile.TemporaryFile("w+") as output, _launcher(count, config, options) as launcher:
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **given, **environment},
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            _end(process.pid)
            process.wait()
            pytest.fail(f"{count} processes did not end within {timeout:g} s:\n{_read(output)[-20_000:]}")
        return process.returncode, _read(output)


@contextmanager
def _turn() -> Iterator[None]:
    """Waits for the lock that every launch on this checkout takes: this file's own, which its end releases."""
    with open(__file__, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _launcher(count: int, config: str | None, options: tuple[str, ...]) -> Iterator[list[str]]:
    """What is put in front of the arguments.

    The launcher's own store serves the processes, at a port that it holds from the start: none is chosen here that another program could
    take in between. torchrun does so if it is asked to, Accelerate if the port that it is given is in use.
    """
    if config is None:
        yield ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(count)]
        return
    with socket.create_server(("127.0.0.1", 0)) as in_use:
        port = str(in_use.getsockname()[1])
        file = str(EXAMPLES / f"{config}.yaml")
        chosen = ["--config_file", file, "--num_processes", str(count), "--main_process_port", port]
        yield ["accelerate.commands.launch", *chosen, *options]


def _end(agent: int) -> None:
    """Ends the processes and then their agent, for which a signal to its group is not enough: each is in a session of its own."""
    processes = psutil.Process(agent).children(recursive=True)
    for process in processes:
        process.send_signal(signal.SIGABRT)
    psutil.wait_procs(processes, timeout=10)
    for process in [*processes, psutil.Process(agent)]:
        if process.is_running():
            process.kill()


def _read(output: Any) -> str:
    output.seek(0)
    return output.read()

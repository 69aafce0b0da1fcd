"""Starts several processes as torchrun does on one machine, and says where each of them stood if they do not end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

import psutil
import pytest

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def launch(count: int, arguments: list[str], timeout: float = 240, **environment: str) -> tuple[int, str]:
    """`python ARGUMENTS` in `count` processes that can form a group; returns the exit code and all output.

    The agent's own store serves the processes, at a port that it holds from the start: none is chosen here that another program
    could take in between. If they do not end in time they are ended by SIGABRT, which prints their stacks, and the test fails with those.
    """
    # Everything over the loopback: neither the machine's name nor its interfaces need to be known to anybody.
    agent = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(count)]
    given = {"PYTHONFAULTHANDLER": "1", "GLOO_SOCKET_IFNAME": LOOPBACK, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *agent, *arguments],
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

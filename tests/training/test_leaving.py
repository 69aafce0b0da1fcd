"""The program ends with its exit code whatever a reward is doing: also inside torch, where a daemon thread would make Python abort."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.small_runs import brief_settings

BUSY = """
import os, pathlib, signal, time, torch

calls = 0

def busy(images, prompts, **metadata):
    global calls
    calls += 1
    if calls > 2:  # after the evaluation of the base model, under both samplers
        if "SIGNUM" in os.environ:
            os.kill(os.getpid(), int(os.environ["SIGNUM"]))
        a = torch.randn(300, 300)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            a = torch.tanh(a @ a)
    return images.float().mean((1, 2, 3)) / 255
"""
# A shell that starts tests in the background switches SIGINT off for them.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from etude.cli.app import main; main()"
)


@pytest.mark.parametrize(
    ("signum", "timeout", "code", "said"),
    [
        (signal.SIGINT, 60.0, 130, "interrupted by SIGINT in iteration 1"),
        (signal.SIGTERM, 60.0, 143, "interrupted by SIGTERM in iteration 1"),
        (None, 0.5, 1, "'busy:busy' has not finished after 0.5 s"),
    ],
)
def test_a_reward_inside_torch_does_not_change_the_exit_code(
    tmp_path: Path, signum: signal.Signals | None, timeout: float, code: int, said: str
) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    settings = brief_settings(tmp_path) | {"rewards": {"busy:busy": 1.0}}
    settings["rollout"] = settings["rollout"] | {"reward_timeout": timeout}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-c", PROGRAM, "train", "run.yaml", "--out", "run"]
    environment = os.environ | ({} if signum is None else {"SIGNUM": str(int(signum))})
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "terminate called" not in done.stderr

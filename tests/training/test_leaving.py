"""The program ends with its exit code whatever a reward is doing: also inside torch, where a daemon thread would make Python abort."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

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
# Each case is a process of its own, forked from one that has imported what a run needs, and leaves as any Python program does.
# A shell that starts tests in the background switches SIGINT off for them.
PROGRAM = """
import os, signal, sys
import etude.training.trainer
from etude.cli.app import main

for case in sys.argv[1:]:
    if os.fork() == 0:
        os.chdir(case)
        descriptor = os.open("said", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if case != "0":
            os.environ["SIGNUM"] = case
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.insert(0, "")
        sys.argv = ["etude", "train", "run.yaml", "--out", "run"]
        main()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_reward_inside_torch_does_not_change_the_exit_code(tmp_path: Path) -> None:
    cases = [
        (signal.SIGINT, 60.0, 130, "interrupted by SIGINT in iteration 1"),
        (signal.SIGTERM, 60.0, 143, "interrupted by SIGTERM in iteration 1"),
        (0, 0.5, 1, "'busy:busy' has not finished after 0.5 s"),
    ]
    settings = brief_settings(tmp_path) | {"rewards": {"busy:busy": 1.0}}
    for signum, timeout, _, _ in cases:
        place = tmp_path / str(int(signum))
        place.mkdir()
        (place / "busy.py").write_text(BUSY)
        own = settings | {"rollout": settings["rollout"] | {"reward_timeout": timeout}}
        (place / "run.yaml").write_text(yaml.safe_dump(own))
    command = [sys.executable, "-c", PROGRAM, *(str(int(signum)) for signum, *_ in cases)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    codes = [int(line) for line in done.stdout.splitlines()]
    for code, (signum, _, expected, sentence) in zip(codes, cases, strict=True):
        said = (tmp_path / str(int(signum)) / "said").read_text()
        assert code == expected, said
        assert sentence in said
        assert "terminate called" not in said

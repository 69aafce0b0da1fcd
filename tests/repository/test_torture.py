"""The short form of `make torture`: what a kill at any moment leaves is enough to end with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 8


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_bits_of_one_never_killed(tmp_path):
    script = Path(__file__).parents[1] / "support" / "torture.py"
    command = [sys.executable, script, "--only", "kills", "--kills", KILLS, "--json", tmp_path / "counts.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())["counts"]
    assert sum(number for what, number in counts["SIGKILL"].items() if what != "came after the end") == KILLS
    assert counts["runs that were killed"]["bit-identical"] >= 2

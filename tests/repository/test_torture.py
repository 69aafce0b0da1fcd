"""The short form of `make torture`: a run that is killed, or whose newest checkpoint is damaged, ends with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS, DAMAGES = 5, 2


@pytest.mark.slow
def test_runs_killed_at_random_moments_or_damaged_end_with_the_bits_of_one_left_alone(tmp_path):
    script = Path(__file__).parents[1] / "support" / "torture.py"
    faults = ["--only", "kills", "--kills", KILLS, "--only", "damage", "--others", DAMAGES]
    command = [sys.executable, script, *faults, "--json", tmp_path / "counts.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())["counts"]
    assert sum(number for what, number in counts["SIGKILL"].items() if what != "came after the end") == KILLS
    assert counts["runs that were killed"]["bit-identical"] >= 2
    for way in ("bit flipped", "truncated"):
        assert counts[f"checkpoint: {way}"] == {"named, bit-identical": 1}
    assert counts["checkpoint: all damaged"] == {"explained, nothing changed": 1}

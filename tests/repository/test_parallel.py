"""Tests that run in several workers at once: what they count adds up, and launches of several processes take turns."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from support import launching

pytest_plugins = "pytester"
ROOT = Path(__file__).resolve().parents[2]
FUZZED = """
from hypothesis import strategies as st
from support.fuzzing import fuzz

@fuzz("{subject}", {count}, number=st.integers())
def test_any_number(number):
    assert number == number
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_fuzzed_cases_of_all_workers_add_up(pytester: pytest.Pytester, workers: int) -> None:
    pytester.makeini(f"[pytest]\npythonpath = {ROOT / 'tests'} {ROOT / 'src'}")
    pytester.makeconftest(
        "from support.fuzzing import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown"
    )
    pytester.makepyfile(
        test_one=FUZZED.format(subject="dates", count=7),
        test_two=FUZZED.format(subject="names", count=11) + FUZZED.format(subject="dates", count=5).replace("any", "a"),
    )
    result = pytester.runpytest_subprocess("-n", str(workers), "--dist", "loadfile" if workers else "no")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["23 fuzzed cases: 12 dates, 11 names"])


def test_one_launch_of_several_processes_runs_at_a_time() -> None:
    with open(launching.__file__, "rb") as another, launching._turn(), pytest.raises(BlockingIOError):
        fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)

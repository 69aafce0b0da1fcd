"""The page on the gap along training says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from etude.theory import Gaussian, QuadraticReward, ScoreError, TrainingProblem, gap_along_training, gap_slope
from etude.theory.plots import TRAINING_FIGURES

PAGE = Path(__file__).parents[2] / "docs" / "theory" / "training.md"
ROWS = {
    "each step apart": {},
    "each step apart, KL of 0.05": {"beta": 0.05},
    "each step apart, score 10 % too strong": {"score_error": ScoreError(gain=0.1)},
    "one change for all steps": {"shared": True},
    "window on the 3 early steps": {"window": (0, 3)},
    "window on the 4 late steps": {"window": (6, 4)},
    "matching on the ODE's images": {"method": "matching"},
    "backpropagation through the ODE": {"method": "backpropagation"},
}


def test_the_example_runs_and_its_claims_hold():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_table_is_what_the_library_computes(name):
    assert f"| {name} | " + " | ".join(cells(ROWS[name])) + " |" in PAGE.read_text()


def cells(options):
    """Slope, then start, widest (its update) and end, for eta 0.5, 1 and 2."""
    reward = QuadraticReward(1.0, center=2.0)
    problem = TrainingProblem(
        Gaussian(1.0, 1.0), "sd", reward, [0.5, 1.0, 2.0], 10, "leading", prediction="sample", **options
    )
    gap, slope = gap_along_training(problem, 300, 0.02, "gradient").gap, gap_slope(problem).gap
    widest = abs(gap).argmax(axis=0)
    return [
        f"{slope[e]:+.2f}: {gap[0, e]:.3f}, {gap[widest[e], e]:.3f} ({widest[e]}), {gap[-1, e]:.3f}" for e in range(3)
    ]


def test_the_figure_of_the_command_is_on_the_page():
    assert re.findall(r"!\[.*?\]\(figures/(.*?)\.svg\)", PAGE.read_text()) == list(TRAINING_FIGURES)
    assert (PAGE.parent / "figures" / "gap-along-training.svg").stat().st_size > 10_000

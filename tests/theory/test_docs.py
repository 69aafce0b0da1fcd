"""The theory's page says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from etude.theory import Gaussian, ScoreError, gap_split, recommended_eta
from etude.theory.plots import FIGURES
from etude.theory.reward_functions import QuadraticReward

PAGE = Path(__file__).parents[2] / "docs" / "theory" / "index.md"


def test_the_example_runs_and_its_claims_hold():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tables_are_what_the_library_computes():
    text = PAGE.read_text()
    target, reward = Gaussian(1.5, 0.5), QuadraticReward(1.0, center=2.0)
    for label, schedule in (("SD", "sd"), ("DDPM", "ddpm"), ("rectified flow", "flow")):
        for steps in (10, 50):
            split = gap_split(target, schedule, reward, 1.0, steps)
            prior = "0" if schedule == "flow" else f"{split.prior:.4f}"
            assert f"| {label} | {steps} | {split.total:.4f} | {prior} | {split.discretisation:.4f} |" in text
    for label, error in (
        ("none", ScoreError()),
        ("bias ± 0.05", ScoreError(bias=0.05)),
        ("gain ± 0.05", ScoreError(gain=0.05)),
        ("both", ScoreError(bias=0.05, gain=0.05)),
    ):
        etas = [recommended_eta(target, "sd", n, score_error=error, known_sign=False).eta for n in (20, 50)]
        assert f"| {label} | {etas[0]:.2f} | {etas[1]:.2f} |" in text


def test_every_figure_of_the_command_is_on_the_page():
    shown = re.findall(r"!\[.*?\]\(figures/(.*?)\.svg\)", PAGE.read_text())
    assert sorted(shown) == sorted(FIGURES)
    for name in shown:
        assert (PAGE.parent / "figures" / f"{name}.svg").stat().st_size > 10_000

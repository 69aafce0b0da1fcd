"""The display shows the numbers it was given, in words that cannot be misread."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from etude.cli.training_display import TrainingDisplay
from etude.config import TrainConfig, parse_config
from etude.training.progress import Display, SilentDisplay


def config(**sampling: Any) -> TrainConfig:
    return parse_config(
        {
            "iterations": 20,
            "rewards": {"alignment": 1.0},
            "sampling": {"eta": 1.2, **sampling},
            "evaluation": {"held_out_rewards": ["colorfulness"]},
        }
    )


def estimate(mean: float, half: float) -> dict[str, Any]:
    return {"mean": mean, "standard_error": half / 2, "low": mean - half, "high": mean + half, "n": 64}


def evaluation(shift: float = 0.0) -> dict[str, Any]:
    values = {"ode": 0.25 + shift, "sde": 0.21, "gap": 0.04 + shift, "improvement": shift}
    by_quantity = {q: {"alignment": estimate(v, 0.012), "colorfulness": estimate(60, 5)} for q, v in values.items()}
    return {**by_quantity, "eta": 1.2, "num_steps": 10}


ROWS = [
    {"iteration": 0, "evaluation": evaluation(), "seconds": {"evaluation": 4.0, "total": 4.0}, "memory_mb": 900.0},
    {"iteration": 1, "reward": {"alignment": {"mean": 0.1875, "std": 0.1}}, "seconds": {"rollout": 6.0, "total": 9.5}},
    {
        "iteration": 2,
        "reward": {"alignment": {"mean": 0.2125, "std": 0.1}},
        "evaluation": evaluation(0.05),
        "seconds": {"rollout": 6.0, "total": 10.0},
    },
]
SUMMARY = {
    "final": evaluation(0.05),
    "held_out_rewards": ["colorfulness"],
    "deploy": "Ship the ODE sampler: it scores higher.",
    "seconds": {"rollout": 61.0, "evaluation": 30.0, "total": 3700.0},
}


def shown(terminal: bool, rows: list[dict[str, Any]], clock: Iterator[float], summary: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, width=140, force_terminal=terminal, color_system=None)
    display = TrainingDisplay(config(), console, clock=lambda: next(clock))
    with display:
        display.phase("rollout", 480)
        display.advance(48)
        display.advance()
        for row in rows:
            display.iteration(row)
        display.phase("update")
    if summary:
        display.summary_table(SUMMARY)
    return file.getvalue()


def test_without_a_terminal_every_iteration_is_one_plain_line() -> None:
    text = shown(False, ROWS, iter([0.0, 10.0, 30.0]))
    lines = text.splitlines()
    assert lines[0].startswith("iteration 0/20 | alignment: held-out ODE 0.250 [0.238, 0.262], SDE 0.210")
    assert lines[1] == "iteration 1/20 | alignment: training SDE 0.1875 | 9.5 s | 3:10 left"
    assert "gap +0.090 [+0.078, +0.102], improvement +0.050 [+0.038, +0.062]" in lines[2]
    assert lines[2].endswith("10.0 s | 4:30 left")
    assert len(lines) == 3
    assert "\x1b" not in text


def test_a_window_is_named_and_its_sampler_is_not_called_the_sde() -> None:
    file = io.StringIO()
    display = TrainingDisplay(config(window={}), Console(file=file, width=140))
    display.iteration({**ROWS[1], "window": {"start": 3, "size": 4}})
    line = file.getvalue()
    assert line.startswith("iteration 1/20 | window 3..6 | alignment: training SDE in the window 0.1875")


def test_time_left_is_at_the_pace_of_the_iterations_seen_after_a_resume() -> None:
    rows = [{"iteration": 11}, {"iteration": 13}]
    assert shown(False, rows, iter([100.0, 140.0])).splitlines()[-1] == "iteration 13/20 | 2:20 left"


def test_a_terminal_shows_the_numbers_of_the_last_evaluation() -> None:
    text = shown(True, ROWS, iter([0.0, 10.0, 30.0]))
    last = text[text.rindex("iteration") :]
    for part in ("2/20", "4:30 left", "training SDE, eta = 1.2", "0.2125", "0.300 [0.288, 0.312]", "held-out ODE"):
        assert part in last
    assert "+0.090 [+0.078, +0.102]" in last
    assert "colorfulness (held out)" in last


def test_the_summary_names_both_quantities_and_where_the_time_went() -> None:
    text = shown(False, ROWS, iter([0.0, 10.0, 30.0]), summary=True)
    for part in ("improvement (ODE)", "gap (ODE - SDE)", "SDE, eta = 1.2", "colorfulness (held out)", "64", "95 %"):
        assert part in text
    assert "Ship the ODE sampler" in text
    assert "time 1:01:40, of which rollout 1:01, evaluation 0:30" in text


def test_an_exception_passes_through_and_leaves_the_terminal_usable() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True)
    with pytest.raises(ZeroDivisionError), TrainingDisplay(config(), console):
        _ = 1 / 0
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")  # the cursor is shown again


def test_the_silent_display_is_a_display(capsys: pytest.CaptureFixture[str]) -> None:
    display: Display = SilentDisplay()
    with display:
        display.phase("rollout", 3)
        display.advance()
        display.iteration(ROWS[1])
    display.summary_table(SUMMARY)
    assert capsys.readouterr().out == ""

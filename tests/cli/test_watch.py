"""`etude watch`: shows a run before, while and after it goes on, ends with it, and touches nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from etude.cli import watch as module
from etude.cli.app import app
from etude.config import parse_config
from etude.errors import EtudeError
from etude.files import is_locked, locked


def estimate(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 1, "high": mean + 1, "se": 0.5, "n": 8}


def row(iteration: int) -> dict[str, object]:
    update = {
        "approx_kl": 1e-6 * iteration,
        "clipfrac": 0.125,
        "grad_norm": 0.5,
        "zero_std_ratio": 0.0,
        "ratio_mean": 1.0,
    }
    evaluation = {quantity: {"colorfulness": estimate(3.0)} for quantity in ("ode", "sde", "gap", "improvement")}
    return {
        "iteration": iteration,
        **({"reward": {"colorfulness": {"mean": 40.0 + iteration, "std": 2.5}}, **update} if iteration else {}),
        **({} if iteration % 2 else {"evaluation": {"eta": 1.2, "num_steps": 4, **evaluation}}),
        "seconds": {"rollout": 6.0, "update": 3.0, "total": 9.0},
        "memory_mb": 512.0,
    }


def begin(out: Path, iterations: int = 4) -> None:
    out.mkdir()
    config = parse_config({"iterations": iterations, "rewards": {"colorfulness": 1.0}})
    (out / "config.yaml").write_text(config.to_yaml())


def add(out: Path, iteration: int) -> None:
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row(iteration)) + "\n")


def shown(out: Path) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(module.view(module.look(out)))
    return console.export_text()


def test_a_run_is_shown_with_its_rewards_its_health_and_its_time(tmp_path):
    out = tmp_path / "run"
    begin(out)
    with locked(out):
        assert "iteration 0/4" in shown(out)
        for iteration in range(4):
            add(out, iteration)
        text = shown(out)
    for part in (
        "running",
        "iteration 3/4",
        "0:09 left",
        "43",
        "held-out figures of iteration 2",
        "gap (ODE - SDE)",
        "+3.0",
    ):
        assert part in text, part
    for part in ("approximate KL", "3e-06", "clipped fraction", "gradient norm", "groups without a signal", "▁▅█"):
        assert part in text, part
    assert "last iteration 9 s: rollout 6 s, update 3 s" in text


def test_nobody_writing_an_unfinished_run_means_that_it_is_broken_off(tmp_path):
    out = tmp_path / "run"
    assert module.look(out).words == "waiting for the run to begin"
    begin(out)
    add(out, 0)
    with locked(out):
        assert module.look(out).words == "running"
    assert module.look(out).words == f"broken off: `etude train --resume --out {out}` continues it"
    (out / "metrics.jsonl").write_text((out / "metrics.jsonl").read_text() + '{"iteration": 1, "rew')
    assert module.look(out).iteration == 0
    (out / "metrics.jsonl").unlink()
    for iteration in range(5):
        add(out, iteration)
    (out / "summary.json").write_text(json.dumps({"iterations": 4, "stopped": None}))
    assert module.look(out).words == "finished"
    with locked(out):
        assert not module.look(out).over  # it is being resumed, or its report is being written


def test_watching_ends_with_the_run(tmp_path, monkeypatch):
    out, runner = tmp_path / "run", CliRunner()
    begins = locked(out)
    events = iter(
        [
            lambda: begin(out) or begins.__enter__(),
            *(lambda i=i: add(out, i) for i in range(5)),
            lambda: (
                (out / "summary.json").write_text(json.dumps({"iterations": 4})) and begins.__exit__(None, None, None)
            ),
        ]
    )
    monkeypatch.setattr(module.time, "sleep", lambda seconds: next(events)())
    result = runner.invoke(app, ["watch", str(out)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [*(f"iteration {i}/4" for i in range(5)), "finished"]
    assert "0:09 left" in lines[3]


def test_a_run_that_is_broken_off_ends_the_watch_with_the_way_to_continue(tmp_path):
    out, runner = tmp_path / "run", CliRunner()
    missing = runner.invoke(app, ["watch", str(out), "--once"])
    assert missing.exit_code == 1
    assert "no run in" in missing.stderr
    begin(out)
    add(out, 0)
    assert runner.invoke(app, ["watch", str(out), "--once"]).exit_code == 0
    broken = runner.invoke(app, ["watch", str(out)])
    assert broken.exit_code == 1
    assert "--resume" in broken.stderr


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"iteration": 1, "reward": {"a": 3}}, r"'reward\.a': input should be a valid dictionary"),
        ({"iteration": 1, "seconds": 5}, "'seconds': input should be a valid dictionary"),
        ({"iteration": 1, "seconds": {"total": "5"}}, r"'seconds\.total': input should be a valid number"),
        ({"iteration": 1, "evaluation": {"ode": {"a": {"mean": 1}}}}, r"'evaluation\.ode\.a\.low': field required"),
        ({"iteration": 1, "eta": "much"}, "'eta"),
        ({"iteration": 1.5}, "'iteration': input should be a valid integer"),
    ],
)
def test_a_row_that_is_not_what_training_writes_is_refused_with_its_place(tmp_path, line, problem):
    begin(tmp_path / "run")
    add(tmp_path / "run", 0)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(EtudeError, match=rf"metrics\.jsonl' line 2 is not a row of metrics: {problem}"):
        shown(tmp_path / "run")


@pytest.mark.parametrize("value", ["many", None, [1], 10**400, True])
def test_a_number_that_is_none_is_shown_as_missing(tmp_path, value):
    begin(tmp_path / "run")
    for line in (row(0), row(1) | {"clipfrac": value}, {"iteration": 2, "seconds": None, "reward": None}):
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    assert "iteration 2/4" in shown(tmp_path / "run")
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "run"), "--once"])
    assert result.exit_code == 0, result.output


def test_a_run_is_written_by_one_process_at_a_time(tmp_path):
    assert is_locked(tmp_path) is False
    with locked(tmp_path):
        assert is_locked(tmp_path) is True
        with pytest.raises(EtudeError, match="another process is writing the run"), locked(tmp_path):
            pass
    assert is_locked(tmp_path) is False
    assert list(tmp_path.iterdir()) == []

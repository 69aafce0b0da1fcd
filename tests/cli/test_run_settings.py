"""`etude gap` and `etude sample` draw with the sampler of the run that an adapter comes from, unless an option says otherwise."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from etude.cli.app import app
from etude.config import LoraConfig, load_config, parse_config
from etude.policies import load_policy
from etude.prompts import load_prompts
from support.tiny import save_flux

SAMPLER = {
    "kernel": "cps", "eta": 0.4, "num_steps": 3, "guidance_scale": 2.0, "first_step": "sde", "shift": 4.0,
}  # fmt: skip


def run(*arguments: Any) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="etude")
    assert result.exit_code == 0, result.output
    return result


def measured(tmp_path: Path, *arguments: Any) -> tuple[dict[str, Any], list[dict[str, Any]], Result]:
    """The settings and the rows of `etude gap`, and what it printed."""
    target = tmp_path / "gap.json"
    result = run("gap", *arguments, "--reward", "colorfulness", "--samples", 2, "--json", target)
    found = json.loads(target.read_text())
    return found["settings"], found["rows"], result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("model") / "flux")


@pytest.fixture
def lora(model: Path, tmp_path: Path) -> Path:
    """What a run leaves: an adapter, and the configuration beside its directory."""
    policy = load_policy(model, device="cpu")
    policy.add_lora(LoraConfig(rank=1, alpha=1.0), seed=0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1)
    policy.export(tmp_path / "run" / "lora")
    settings = {"resolution": 12, "dtype": "bfloat16", "sampling": SAMPLER, "model": str(model)}
    (tmp_path / "run" / "config.yaml").write_text(parse_config(settings).to_yaml())
    return tmp_path / "run" / "lora"


def test_the_gap_of_a_runs_adapter_is_measured_under_the_runs_sampler(model: Path, lora: Path, tmp_path: Path) -> None:
    settings, rows, result = measured(tmp_path, model, "--lora", lora)
    wanted = {"kernel": "cps", "guidance_scale": 2.0, "first_step": "sde", "shift": 4.0, "resolution": 12, "dtype": "bfloat16"}  # fmt: skip
    assert {key: settings[key] for key in wanted} == wanted
    assert [(row["eta"], row["num_steps"]) for row in rows] == [(0.4, 3)]
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"as in the run of {lora} where no option says otherwise: kernel cps, eta 0.4, steps 3,")


def test_what_is_given_wins_and_another_kernel_takes_no_eta_of_the_runs(
    model: Path, lora: Path, tmp_path: Path
) -> None:
    given = ["--kernel", "gddim", "--steps", 2, "--guidance", 1, "--first-step", "ode", "--resolution", 8]
    given += ["--dtype", "float32", "--shift", 2, "--batch-size", 1, "--offload"]
    settings, rows, _ = measured(tmp_path, model, "--lora", lora, *given)
    wanted = {"kernel": "gddim", "guidance_scale": 1.0, "first_step": "ode", "shift": 2.0, "resolution": 8, "dtype": "float32"}  # fmt: skip
    assert {key: settings[key] for key in wanted} == wanted
    assert [(row["eta"], row["num_steps"]) for row in rows] == [(1.2, 2)]


def test_without_a_run_there_are_the_defaults_and_nothing_is_said(model: Path, lora: Path, tmp_path: Path) -> None:
    (lora.parent / "config.yaml").unlink()
    settings, rows, result = measured(tmp_path, model, "--lora", lora, "--steps", 2)
    assert (settings["kernel"], settings["guidance_scale"], settings["first_step"]) == ("gddim", 5.0, "ode")
    assert rows[0]["eta"] == 1.2
    assert result.stderr == ""


def test_a_file_that_is_no_runs_configuration_is_said_and_left_alone(model: Path, lora: Path, tmp_path: Path) -> None:
    (lora.parent / "config.yaml").write_text("layers: 3\n")
    settings, _, result = measured(tmp_path, model, "--lora", lora, "--steps", 2)
    assert settings["kernel"] == "gddim"
    assert result.stderr.startswith("warning: no settings are taken from the file beside")


def test_a_sample_of_a_runs_adapter_is_the_ode_at_the_runs_size_and_steps(
    model: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    result = run("sample", model, "--prompt", "a", "--lora", "~/run/lora", "--out", "~/a.png")
    assert "kernel cps, eta 0, steps 3" in result.stderr
    (lora.parent / "config.yaml").unlink()
    told = ["--steps", 3, "--guidance", 2, "--resolution", 12, "--shift", 4, "--dtype", "bfloat16"]
    run("sample", model, "--prompt", "a", "--lora", lora, "--out", tmp_path / "b.png", *told)
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    run("sample", model, "--prompt", "a", "--lora", lora, "--out", tmp_path / "b.png", *told, "--eta", 0.4)
    assert (tmp_path / "b.png").read_bytes() != (tmp_path / "a.png").read_bytes()


def test_a_leading_tilde_is_the_home_wherever_a_path_is_given(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", os.fspath(model.parent))
    (model.parent / "prompts.txt").write_text("red heart\n")
    (model.parent / "mine.yaml").write_text("iterations: 7\n")
    assert load_prompts("~/prompts.txt").texts == ["red heart"]
    assert load_config("~/mine.yaml").iterations == 7
    assert load_policy("~/flux", outline=True).pipeline_name == "FluxPipeline"
    refused = CliRunner().invoke(app, ["train", "~/mine.yaml", "--out", "~/flux"])
    assert f"--out '{model}' is not empty" in refused.stderr

"""`etude theory`: what it prints and writes, how its help teaches, and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from etude.errors import EtudeError
from etude.theory import VE, Gaussian, QuadraticReward, reward_gap, study
from etude.theory.cli import app
from etude.theory.figures import draw

FAST = ["--eta", "1", "--steps", "10", "--no-figures"]


def run(*arguments: str, out: Path):
    return CliRunner().invoke(app, [*arguments, "--out", str(out)], terminal_width=160)


def test_a_default_run_writes_every_table_figure_and_number(tmp_path):
    result = run(out=tmp_path / "new" / "theory")
    assert result.exit_code == 0, result.output
    for words in ("improvement", "Continuous time", "N steps of sd", "Bounds", "Which eta", "two modes"):
        assert words in result.stdout
    report = json.loads((tmp_path / "new" / "theory" / "theory.json").read_text())
    assert report["optimum"]["mean"] == pytest.approx([1.5])
    assert report["optimum"]["variance"] == pytest.approx([0.5])
    last = report["horizon"]["ve"]
    exact = reward_gap(Gaussian(1.5, 0.5), VE(T=last["T"][-1]), QuadraticReward(1.0, center=2.0), 0.5)
    assert last["etas"][0]["gap"][-1] == pytest.approx(exact, rel=1e-12)
    for row in report["split"]:
        parts = row["prior"] + row["discretisation"] + row["score_error"] + row["interaction"]
        assert row["total"] == pytest.approx(parts)
    for name in ("ve", "vp"):
        assert min(report["bounds"][name]["ratio"]) >= 1.0
    assert {path.name for path in (tmp_path / "new" / "theory").glob("*.png")} == {
        "gap-against-horizon.png",
        "gap-against-steps.png",
        "gap-split.png",
        "bounds.png",
        "recommended-eta.png",
    }


def test_several_dimensions_other_schedules_and_errors_run(tmp_path):
    several = run("--mean", "1,0", "--variance", "1,0.25", "--center", "2,1", "--beta", "1", *FAST, out=tmp_path)
    assert several.exit_code == 0, several.output
    assert "two modes" not in several.stdout
    other = run("--schedule", "flow", "--eta", "0", *FAST[2:], out=tmp_path)
    assert other.exit_code == 0, other.output
    error = run("--schedule", "ddpm", "--bias", "0.05", "--gain", "0.02", "--white", "0.1", *FAST, out=tmp_path)
    assert error.exit_code == 0, error.output
    assert json.loads((tmp_path / "theory.json").read_text())["split"][0]["score_error"] != 0
    centred = run("--mean", "0", "--center", "0", *FAST, out=tmp_path)
    assert centred.exit_code == 0, centred.output


def test_figures_can_be_vector_graphics_and_are_reproducible(tmp_path):
    report = study.run(study.Settings(etas=[0.0, 1.0], steps=[10]))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert len(draw(json.loads(json.dumps(report)), tmp_path / name, "svg")) == 5
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_help_teaches():
    result = CliRunner().invoke(app, ["--help"], terminal_width=160)
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    assert result.exit_code == 0
    for words in (
        "E r(ODE) - E r(SDE",
        "p* = p exp(r / beta)",
        "negative gap",
        "Examples",
        "etude theory --schedule ddpm",
    ):
        assert words in text
    options = re.findall(r"^│[ *]+(--[a-z-]+) .*  (\S.*?) *│$", text, flags=re.MULTILINE)
    assert len(options) >= 15
    assert [option for option, words in options if len(words.split()) < 3] == []


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--beta", "0"], "--beta is 0"),
        (["--beta", "nan"], "--beta is nan"),
        (["--mean", "one"], "--mean is 'one'"),
        (["--variance", "-1"], "eigenvalue"),
        (["--mean", "1,2", "--variance", "1,2,3"], "--mean has 2"),
        (["--eta", "-0.5"], "--eta is -0.5"),
        (["--steps", "0"], "--steps is 0"),
        (["--schedule", "sdxl"], "unknown schedule 'sdxl'"),
        (["--spacing", "trialing"], "did you mean 'trailing'"),
        (["--kernel", "dpm"], "unknown kernel"),
        (["--kernel", "ddim", "--eta", "3"], "at most"),
        (["--curvature", "-2"], "beta above"),
        (["--gain", "-1"], "--gain is -1"),
        (["--white", "-1"], "--white is -1"),
        (["--bias", "inf"], "--bias is inf"),
        (["--ve-horizon", "1"], "--ve-horizon is 1"),
        (["--vp-horizon", "100"], "at most 60"),
        (["--format", "gif"], "--format is 'gif'"),
    ],
)
def test_a_wrong_option_is_one_sentence(arguments, names, tmp_path):
    result = run(*arguments, "--no-figures", out=tmp_path / "out")
    assert isinstance(result.exception, EtudeError)
    message = str(result.exception)
    assert names in message
    assert message.endswith(".")
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_an_output_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    result = run(*FAST, out=tmp_path / "file")
    assert isinstance(result.exception, EtudeError)
    assert "which is a file" in str(result.exception)


def test_the_theory_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys\nimport etude.theory, etude.theory.cli\n"
        "print(sorted({'torch', 'matplotlib', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

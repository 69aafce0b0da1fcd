"""`etude theory`: what it prints and writes, how its help teaches, and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from typer.testing import CliRunner

from etude.cli.theory import app
from etude.cli.theory_options import json_text
from etude.errors import EtudeError
from etude.theory import (
    VE,
    Gaussian,
    QuadraticReward,
    TrainingProblem,
    gap_along_training,
    gap_at_limit,
    gap_slope,
    levels,
    results,
    reward_gap,
)
from etude.theory.plots import FIGURES, draw
from etude.theory.sampler_steps import largest_eta

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
    assert "two modes, " not in several.stdout
    other = run("--schedule", "flow", "--eta", "0", *FAST[2:], out=tmp_path)
    assert other.exit_code == 0, other.output
    error = run("--schedule", "ddpm", "--bias", "0.05", "--gain", "0.02", "--white", "0.1", *FAST, out=tmp_path)
    assert error.exit_code == 0, error.output
    assert json.loads((tmp_path / "theory.json").read_text())["split"][0]["score_error"] != 0
    centred = run("--mean", "0", "--center", "0", *FAST, out=tmp_path)
    assert centred.exit_code == 0, centred.output


def test_figures_can_be_vector_graphics_and_are_reproducible(tmp_path):
    report = results.run(results.Settings(etas=[0.0, 1.0], steps=[10]))
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
        (["--kernel", "ddim", "--eta", "3"], "largest legal eta"),
        (["--curvature", "-2"], "beta above"),
        (["--gain", "-1"], "--gain is -1"),
        (["--white", "-1"], "--white is -1"),
        (["--bias", "inf"], "--bias is inf"),
        (["--ve-horizon", "1"], "--ve-horizon is 1"),
        (["--ve-horizon", "1e200"], "at most 1e+06"),
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
        "import sys\nimport etude.theory, etude.cli.theory\n"
        "print(sorted({'torch', 'matplotlib', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [["--variance", "0"], ["--curvature", "0"], ["--variance", "2", "--mean", "0", "--center", "0", "--beta", "4"]],
)
def test_a_gap_of_zero_has_no_rate_and_is_still_json(arguments, tmp_path):
    result = run(*arguments, *FAST, out=tmp_path)
    assert result.exit_code == 0, result.exception
    row = json.loads((tmp_path / "theory.json").read_text())["horizon"]["vp"]["etas"][0]
    assert row["constant"] == 0
    assert row["exponent"] is None
    assert "inf" not in result.stdout.replace("inf)", "")


def test_results_beyond_float_range_are_refused_before_anything_is_printed(tmp_path):
    with pytest.raises(EtudeError, match="beyond the range"):
        json_text({"gap": float("inf")})


def test_a_directory_that_cannot_be_made_is_refused_before_the_computation(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "run", lambda settings: pytest.fail("computed before the directory was made"))
    (tmp_path / "afile").write_text("")
    for out in (Path("/proc/nope"), tmp_path / "afile" / "sub"):
        error = run(*FAST, out=out).exception
        assert isinstance(error, EtudeError)
        assert str(error).startswith(f"--out is {out}, which cannot be written")


def test_ddim_etas_that_the_steps_asked_for_have_are_computed(tmp_path):
    result = run("--kernel", "ddim", "--eta", "1.2", "--steps", "100", out=tmp_path)
    assert result.exit_code == 0, result.exception
    (curve,) = json.loads((tmp_path / "theory.json").read_text())["steps"]["gap"]
    limits = [largest_eta(levels("sd", n), "ddim") for n in results.STEP_COUNTS]
    assert [value is None for value in curve] == [limit < 1.2 for limit in limits]
    assert None in curve


def test_the_example_of_two_modes_does_not_veto_the_model(tmp_path):
    result = run("--variance", "0.05", "--curvature", "-4", "--beta", "2", *FAST, out=tmp_path)
    assert result.exit_code == 0, result.exception
    assert "two modes is left out" in result.stdout
    assert json.loads((tmp_path / "theory.json").read_text())["mixture"] == []


def test_the_gap_against_steps_is_that_of_the_split_with_its_score_error():
    report = results.run(results.Settings(etas=[1.0], steps=[20], bias=0.05, gain=0.02, white=0.1))
    at = results.STEP_COUNTS.index(20)
    assert report["steps"]["gap"][0][at] == pytest.approx(report["split"][0]["total"], rel=1e-12)
    clean = results.run(results.Settings(etas=[1.0], steps=[20]))
    assert abs(report["steps"]["limit"][0] - clean["steps"]["limit"][0]) > 1e-3


def test_more_curves_than_colours_are_all_drawn_in_different_colours():
    figure = Figure()
    etas = [0.2 * k for k in range(9)]
    section = {"steps": [1, 2], "etas": etas, "gap": [[k, k] for k in range(9)], "limit": None}
    axes = figure.subplots()
    FIGURES["gap-against-steps"][0]([axes], {"steps": section, "settings": {"schedule": "sd"}})
    assert len({to_hex(line.get_color()) for line in axes.lines}) == 9


def follow(*arguments: str, out: Path):
    return CliRunner().invoke(app, ["training", *arguments, "--out", str(out)], terminal_width=160)


PLAIN = [
    "--prediction",
    "sample",
    "--spacing",
    "leading",
    "--optimizer",
    "gradient",
    "--rate",
    "0.02",
    "--updates",
    "20",
]


def test_training_writes_the_gap_along_training(tmp_path):
    result = follow(*PLAIN, "--beta", "0.05", out=tmp_path / "new")
    assert result.exit_code == 0, result.output
    for words in (
        "policy-gradient, beta 0.05",
        "slope",
        "gap / rise",
        "limit",
        "training.json",
        "gap-along-training.png",
    ):
        assert words in result.stdout
    report = json.loads((tmp_path / "new" / "training.json").read_text())
    reward = QuadraticReward(1.0, center=2.0)
    problem = TrainingProblem(
        Gaussian(1.0, 1.0), "sd", reward, [0.5, 1.0, 2.0], 10, "leading", beta=0.05, prediction="sample"
    )
    exact = gap_along_training(problem, 20, 0.02, "gradient")
    for e, row in enumerate(report["etas"]):
        assert row["gap"] == pytest.approx(exact.gap[:, e].tolist())
        assert row["limit"] == pytest.approx(float(gap_at_limit(problem).gap[0, e]))
        assert row["slope"] == pytest.approx(float(gap_slope(problem).gap[e]))
        assert row["relative"][0] is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "matching", "--shared", "--measured-eta", "1"],
        ["--method", "backpropagation", "--schedule", "flow", "--kernel", "cps", "--eta", "0.5"],
        ["--window", "2,4", "--gain", "0.1", "--eta", "1", "--kl", "path", "--beta", "0.1"],
        ["--mean", "1,0", "--variance", "1,0.25", "--center", "2,1"],
    ],
)
def test_training_runs_every_method_sampler_and_model(arguments, tmp_path):
    result = follow(*arguments, "--updates", "5", "--no-figures", out=tmp_path)
    assert result.exit_code == 0, result.output
    assert len(json.loads((tmp_path / "training.json").read_text())["etas"][0]["gap"]) == 6


def test_the_help_of_training_teaches():
    result = CliRunner().invoke(app, ["training", "--help"], terminal_width=160)
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    for words in ("which forgets them", "A KL does not change it", "Examples", "--method matching --shared"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--method", "ppo"], "unknown method 'ppo'"),
        (["--window", "2"], "--window is '2'"),
        (["--window", "2.5,4"], "the window's start is 2.5"),
        (["--window", "8,4"], "does not fit in 10 steps"),
        (["--updates", "0"], "--updates is 0"),
        (["--rate", "0"], "--rate is 0"),
        (["--optimizer", "sgd"], "unknown optimizer 'sgd'"),
        (["--prediction", "score"], "unknown prediction 'score'"),
        (["--measured-eta", "-1"], "--measured-eta is -1"),
        (["--optimizer", "gradient", "--rate", "1e9"], "lower the rate"),
        (["--format", "gif"], "--format is 'gif'"),
    ],
)
def test_a_wrong_option_of_training_is_one_sentence(arguments, names, tmp_path):
    result = follow(*arguments, "--no-figures", out=tmp_path / "out")
    assert isinstance(result.exception, EtudeError)
    assert names in str(result.exception)
    assert not (tmp_path / "out").exists()

"""The how-to pages are programs: their files are written, their code blocks run in order, their assertions hold."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import etude
from etude.cli.app import app
from etude.config import load_config, parse_rewards
from support.tiny import save_families

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
FENCE = re.compile(r"^```(?P<info>[^\n]+)\n(?P<body>.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def _blocks(page: Path) -> tuple[dict[str, str], str]:
    """Blocks with a title are files; the other Python blocks are one program, in order."""
    files, program = {}, []
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        title = re.search(r'title="([^"]+)"', block["info"])
        if title:
            files[title[1]] = block["body"]
        elif "python" in block["info"] and ".no-test" not in block["info"]:
            program.append(block["body"])
    return files, "\n".join(program)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_code_of_a_how_to_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, program = _blocks(page)
    assert "assert " in program, f"{page.name} proves nothing: give its code an assertion"
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "page.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        runpy.run_path(str(tmp_path / "page.py"))
    finally:
        for name in files:
            sys.modules.pop(name.removesuffix(".py"), None)


SMALL = {"iterations": 1, "sampling.num_steps": 2, "rollout.images_per_iteration": 8}
SMALL |= {"evaluation.num_images": 2, "evaluation.held_out_rewards": []}


def test_the_readmes_python_trains_samples_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is printed, but for the sizes of the runs and of the measurement."""
    train, reward_gap = etude.train, etude.reward_gap

    def small_train(recipe: str, out: str, overrides: dict[str, Any]) -> Any:
        return train(recipe, out, SMALL | overrides)

    def small_gap(policy: Any, rewards: list[str], etas: list[float]) -> Any:
        measurement = etude.Measurement.of(rewards, num_images=2)
        return reward_gap(policy, etas=etas, steps=[2], measurement=measurement)

    monkeypatch.setattr(etude, "train", small_train)
    monkeypatch.setattr(etude, "reward_gap", small_gap)
    monkeypatch.chdir(tmp_path)
    _, program = _blocks(ROOT / "README.md")
    (tmp_path / "readme.py").write_text(program, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "readme.py"))
    assert names["images"].shape == names["deployed"].shape == (1, 3, 64, 64)
    assert names["run"]["brightness"].improvement.n == 2
    assert names["pipe"].scheduler.config.eta == 1.2
    shown = capsys.readouterr().out
    for text in ("run: runs/first", "gap (ODE - SDE)", "improvement (ODE)", str(names["gap"]["colorfulness", 1.2].gap)):
        assert text in shown


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_name_that_a_document_imports_from_etude_exists(document: Path) -> None:
    for block in FENCE.finditer(document.read_text(encoding="utf-8")):
        if "python" not in block["info"]:
            continue
        for node in ast.walk(ast.parse(block["body"])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "etude":
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def _commands(document: Path) -> list[list[str]]:
    """The arguments of each `etude ...` in the shell blocks; what a redirection or a pipe does with the output is left out."""
    lines = [
        line
        for block in FENCE.finditer(document.read_text(encoding="utf-8"))
        if block["info"].split()[0].strip("{}.") in {"bash", "sh", "console"}
        for line in block["body"].replace("\\\n", " ").splitlines()
    ]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("etude ")]
    return [arguments[1 : next((i for i, w in enumerate(arguments) if w in {">", "|"}), None)] for arguments in words]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_document_is_one_that_the_program_takes(document: Path) -> None:
    known: Any = typer.main.get_command(app)
    for name, *rest in _commands(document):
        assert name in known.commands, f"etude {name}"
        given = known.commands[name].make_context(name, list(rest), resilient_parsing="--help" in rest).params
        if name == "train" and given["recipe"] and not given["recipe"].endswith(".yaml"):
            load_config(given["recipe"], given["overrides"], parse_rewards(given["reward"] or []))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_families(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem.startswith("tune-")], ids=lambda p: p.stem)
def test_every_run_of_a_tuning_page_passes_a_dry_run_on_a_small_model_of_its_class(
    page: Path, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files, _ = _blocks(page)
    for name, text in files.items():
        Path(name).write_text(text, encoding="utf-8")
    runs = [arguments for command, *arguments in _commands(page) if command == "train"]
    assert runs
    for arguments in runs:
        model = checkpoints[load_config(arguments[0]).model]
        small = ["--model", str(model), "--set", "resolution=null", "--dry-run"]
        result = CliRunner().invoke(app, ["train", *arguments, *small])
        assert result.exit_code == 0, f"{shlex.join(arguments)}: {result.output}"
        assert {path.name for path in tmp_path.iterdir()} == set(files)

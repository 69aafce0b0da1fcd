"""Laws of the repository itself: what importing costs, what ships, what the README promises."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import etude

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "etude"
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "matplotlib", "scipy", "numpy", "PIL")


def _pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _python_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def _heavy_modules_after(code: str) -> list[str]:
    """Names of heavy packages loaded by a fresh interpreter that ran `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.strip().splitlines()[-1])


def test_version_is_the_one_in_pyproject() -> None:
    assert etude.__version__ == _pyproject()["project"]["version"]


@pytest.mark.parametrize("module", ["etude", "etude.errors", "etude.config", "etude.cli.app"])
def test_importing_the_edges_loads_nothing_heavy(module: str) -> None:
    assert _heavy_modules_after(f"import {module}") == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import contextlib, io, sys\n"
        "from etude.cli.app import main\n"
        "sys.argv = ['etude', '--help']\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "assert 'train' in out.getvalue(), out.getvalue()\n"
    )
    assert _heavy_modules_after(code) == []


def test_every_public_name_loads_and_unknown_names_are_attribute_errors() -> None:
    for name in etude.__all__:
        assert getattr(etude, name) is not None
        assert name in dir(etude)
    with pytest.raises(AttributeError, match="no attribute 'trainer_of_lions'"):
        _ = etude.trainer_of_lions


def _forbidden(tree: ast.AST) -> Iterator[str]:
    """Ways of running data as code: pickle and its relatives, eval, exec, torch.load of anything but plain weights."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (
            f"import {n}"
            for n in names
            if n.split(".")[0] in {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
        )
        if isinstance(node, ast.Call):
            yield from _forbidden_call(node)


def _forbidden_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    if called in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"}:
        yield f"{called}()"
    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
    if called == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load() without weights_only=True"
    if called in {"np.load", "numpy.load"} and keywords.get("allow_pickle", "False") != "False":
        yield f"{called}(allow_pickle=...)"
    if keywords.get("shell") == "True":
        yield f"{called}(shell=True)"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import pickle", ["import pickle"]),
        ("from pickle import loads", ["import pickle"]),
        ("eval('1')", ["eval()"]),
        ("model.eval()", []),
        ("torch.load(f)", ["torch.load() without weights_only=True"]),
        ("torch.load(f, weights_only=True)", []),
        ("subprocess.run('ls', shell=True)", ["subprocess.run(shell=True)"]),
    ],
)
def test_the_scan_for_data_run_as_code_finds_what_it_should(code: str, found: list[str]) -> None:
    assert list(_forbidden(ast.parse(code))) == found


@pytest.mark.parametrize("path", _python_files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_source_file_runs_data_as_code(path: Path) -> None:
    assert list(_forbidden(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize("path", _python_files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "a module without a docstring"


def _commands() -> set[str]:
    from typer.main import get_command

    group = get_command(importlib.import_module("etude.cli.app").app)
    return set(group.commands)  # type: ignore[attr-defined]


def _documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _shell_blocks(text: str) -> Iterator[str]:
    yield from re.findall(r"```(?:bash|console|sh)\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("document", _documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_in_the_documents_exists(document: Path) -> None:
    commands, targets = _commands(), set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for block in _shell_blocks(document.read_text(encoding="utf-8")):
        for name in re.findall(r"^(?:\$ )?(?:\S*/)?etude ([a-z][a-z-]*)", block, flags=re.MULTILINE):
            assert name in commands, f"`etude {name}` is no command"
        for name in re.findall(r"^(?:\$ )?make ([a-z]+)", block, flags=re.MULTILINE):
            assert name in targets, f"`make {name}` is no target"


def test_the_readme_shows_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in sorted(_commands()) if f"etude {name}" not in text]
    assert missing == []


def test_every_module_has_its_place_in_the_api_reference() -> None:
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)", pages, flags=re.MULTILINE))
    modules = {
        ".".join(("etude", *p.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for p in _python_files()
        if p.read_text(encoding="utf-8").strip() and p.stem != "__main__"
    }
    # The command line has a page of its own; what is private has none.
    public = {m for m in modules if not re.search(r"\._|\.cli", m)}
    missing = {
        m
        for m in public
        if not any(m == name or m.startswith(name + ".") or name.startswith(m + ".") for name in listed)
    }
    assert missing == set()


@pytest.mark.slow
def test_the_wheel_holds_every_data_file_and_no_stray_ones(tmp_path: Path) -> None:
    """Recipes, prompts, templates and weights are read at run time: a wheel without them installs and then fails."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("etude/")}
    tracked = subprocess.run(["git", "ls-files", "src/etude"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        assert {name.removeprefix("src/") for name in tracked.stdout.splitlines()} <= packed
    assert "etude/py.typed" in packed
    assert any(name.startswith("etude/config/recipes/") and name.endswith(".yaml") for name in packed)
    assert not [name for name in packed if name.endswith((".pyc", ".pt", ".pth", ".bin", ".ckpt", ".pkl"))]


def test_the_studies_figures_in_the_documents_are_those_of_the_studies() -> None:
    shown = list((ROOT / "docs" / "images" / "study").iterdir())
    assert shown
    for path in shown:
        assert path.is_file()
        assert path.resolve().relative_to(ROOT.resolve() / "studies").parts[1:3] == ("results", "figures")


def test_the_embedded_models_fit_their_size() -> None:
    """Together below 40 MB; the heads and embeddings of the `alignment` reward come on top."""
    models = [path for path in (SOURCE / "zoo" / "checkpoints").iterdir() if (path / "model_index.json").is_file()]
    assert len(models) == 2
    assert sum(p.stat().st_size for model in models for p in model.rglob("*.safetensors")) < 40e6
    assert sum(p.stat().st_size for p in SOURCE.rglob("*.safetensors")) < 42e6


def test_constraints_pin_every_direct_dependency_exactly() -> None:
    project = _pyproject()["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["docs"],
    ]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {_canonical(line.split("==")[0]) for line in lines}
    assert all(re.fullmatch(r"[a-z0-9.-]+==[^;\s]+", line) for line in lines)
    assert {_canonical(re.split(r"[\[<>=! ;]", item)[0]) for item in wanted} <= pinned


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_core_dependencies_leave_out_what_is_heavy_and_unneeded() -> None:
    names = {_canonical(re.split(r"[\[<>=! ;]", item)[0]) for item in _pyproject()["project"]["dependencies"]}
    assert not names & {"torchvision", "tensorboard", "wandb", "trl", "sentence-transformers"}

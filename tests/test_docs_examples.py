"""The how-to pages are programs: their files are written, their code blocks run in order, their assertions hold."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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

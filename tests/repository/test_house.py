"""Laws of the package's structure: which folder may import which, no circle, no file name twice."""

from __future__ import annotations

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "etude"
FLOORS = (
    ("errors", "undisturbed"),
    ("registry", "files", "batching", "terminal"),
    ("sampling", "prompts", "zoo"),
    ("rewards",),
    ("config", "theory"),
    ("policies", "runs"),
    ("learning", "measuring"),
    ("report",),
    ("training",),
    ("advice", "bench", "preferences", "study"),
    ("race",),
    ("cli",),
)
"""The rooms of `src/etude`, from the ground up. A room imports from lower floors only."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, the public face and `__main__` apart."""
    named = {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in SOURCE.rglob("*.py")}
    names = {name.removesuffix(".__init__"): path for name, path in named.items()}
    return {name: path for name, path in names.items() if name not in {"__init__", "__main__"}}


def _imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The package's modules that a file names in its imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "etude":
            home = (node.module or "").removeprefix("etude").removeprefix(".")
            for alias in node.names:
                inner = f"{home}.{alias.name}".removeprefix(".")
                found.add(inner if inner in modules else home)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("etude.") for alias in node.names if alias.name.startswith("etude.")}
    return found


def test_every_room_has_a_floor() -> None:
    assert {name.partition(".")[0] for name in _modules()} == set(FLOOR)


def test_imports_run_downhill() -> None:
    """No import goes up, or sideways between two rooms of one floor; the public face is imported by nobody."""
    modules, wrong = _modules(), []
    for name, path in modules.items():
        room = name.partition(".")[0]
        for target in _imports(path, modules):
            other = target.partition(".")[0]
            if other != room and FLOOR.get(other, len(FLOORS)) >= FLOOR[room]:
                wrong.append(f"{name} imports {target or 'etude'}")
    assert wrong == []


def test_the_floors_in_contributing_are_these() -> None:
    text = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, flags=re.MULTILINE)
    shown = {int(floor): re.findall(r"`(\w+)(?:\.py)?`", rooms) for floor, rooms in rows}
    assert shown == {floor: list(rooms) for floor, rooms in enumerate(FLOORS)}


def test_no_two_modules_import_one_another_around_a_circle() -> None:
    modules = _modules()
    graph = {name: _imports(path, modules) - {name} for name, path in modules.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(modules)  # a circle raises CycleError


def test_no_file_name_stands_twice() -> None:
    """A name leads a reader to one file. The commands, which are named after what they show, stand apart."""
    files = [
        path for path in SOURCE.rglob("*.py") if "cli" not in path.parts and path.stem not in {"__init__", "__main__"}
    ]
    assert [name for name, count in Counter(path.name for path in files).items() if count > 1] == []

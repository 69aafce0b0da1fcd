"""One table of every number with its target, from the results as they were last written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Headline, markdown_table

COLUMNS = ["benchmark", "number", "median (lowest to highest)", "target", "", "measured"]


@dataclass(frozen=True)
class Line:
    """One number of one benchmark."""

    benchmark: str
    headline: Headline
    date: str

    @property
    def cells(self) -> list[str]:
        one = self.headline
        return [self.benchmark, one.name, str(one.ratio), one.bound, one.verdict, self.date[:10]]


def collect(directory: Path, names: Iterable[str]) -> list[Line]:
    """The numbers of the named benchmarks with a result in the directory, in the names' order."""
    lines = []
    for name in names:
        path = directory / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            heads = [found["headline"], *found.get("further", [])]
            lines += [Line(name, Headline.from_json(head), found["date"]) for head in heads]
    return lines


def write(directory: Path, lines: list[Line]) -> Path:
    """Writes `summary.json` and `summary.md` into the directory; returns the path of the first."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "summary.json"
    path.write_text(json.dumps(_tree(lines), indent=1) + "\n", encoding="utf-8")
    aimed = [line for line in lines if line.headline.bound]
    met = sum(line.headline.met for line in aimed)
    table = markdown_table(COLUMNS, [line.cells for line in lines])
    text = f"**{met} of {len(aimed)} targets met.**\n\n{table}\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return path


def _tree(lines: list[Line]) -> list[dict[str, Any]]:
    return [{"benchmark": line.benchmark, "date": line.date, **line.headline.as_json()} for line in lines]

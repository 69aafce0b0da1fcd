"""A table of results, for a page and as Markdown, and how p-values are written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table: the first column holds words; `best` is the cell to emphasise in each row."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    best: list[int | None] | None = None

    def markdown(self) -> str:
        """The note and the cells in GitHub's dialect of Markdown."""
        align = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = [self.columns, align, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{self.note}\n\n{body}\n"


def p_value(p: float | None) -> str:
    """A p-value in two digits, never 0; a dash for None."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"

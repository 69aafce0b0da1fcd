"""The terminal: its console, and how tables and times are written there."""

from __future__ import annotations

import io
import os
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Column, Table

PLAIN_WIDTH = 200
"""Columns where there is no terminal to measure."""
own_program = False
"""Whether this process is the `etude` program, and not another one that calls the library, such as a notebook's kernel."""


def make_console(stderr: bool = False) -> Console:
    """A console of a standard stream. Bars that move (`is_interactive`) are for a terminal with a cursor
    and a person before it: not for a file or pipe, even with FORCE_COLOR, a dumb terminal or a CI log.
    There, tables are as wide as they like.
    """
    console = Console(stderr=stderr)
    in_ci = os.environ.get("CI", "").lower() not in {"", "0", "false"}
    if console.is_interactive and console.file.isatty() and not in_ci:
        return console
    # With a height rich asks no terminal: it takes a dumb one to have 80 columns.
    return Console(stderr=stderr, width=PLAIN_WIDTH, height=25, force_interactive=False)


def plain_text(*blocks: RenderableType) -> str:
    """The blocks as text without colours, as a console of PLAIN_WIDTH columns prints them."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None)
    for block in blocks:
        console.print(block, soft_wrap=not isinstance(block, Table), highlight=False, markup=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def figures_table(*columns: str, title: str | None = None) -> Table:
    """An empty table whose first column holds names and whose others hold figures. Long entries are folded, not cut."""
    headers = [
        Column(name, justify="right" if place else "left", overflow="fold") for place, name in enumerate(columns)
    ]
    style: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "bold", "padding": (0, 2, 0, 0)}
    return Table(*headers, title=title, title_justify="left", **style)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

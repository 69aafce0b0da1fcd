"""The terminal: its console, and how times are written there."""

from __future__ import annotations

from rich.console import Console

PLAIN_WIDTH = 200
"""Columns where there is no terminal to measure."""


def make_console(stderr: bool = False) -> Console:
    """A console that never folds tables to 80 columns where there is no terminal to measure."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=PLAIN_WIDTH)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

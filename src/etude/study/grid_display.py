"""Display of a running study: the grid, the current cell and the time left.

Without a terminal it prints one line a cell.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from etude.study.directory import StudyDirectory, work
from etude.study.study_file import Cell
from etude.terminal import PLAIN_WIDTH, clock, make_console
from etude.training.progress import SilentDisplay


class Pace:
    """An estimate of the time left, from the time that the finished part of the study took.

    Args:
        cells: cells to run.
        directory: directory with the times of earlier work.
    """

    def __init__(self, cells: list[Cell], directory: StudyDirectory) -> None:
        self.cost = {cell.slug: work(cell.config) for cell in cells}
        self.planned = {cell.slug: cell.config.iterations for cell in cells}
        self.share = dict.fromkeys(self.cost, 0.0)
        self.seconds = dict.fromkeys(self.cost, 0.0)
        for cell in cells:
            progress = directory.progress(cell, look_for_others=False)
            share = 1.0 if progress.state == "done" else self._part(cell, progress.iteration)
            self.note(cell, share, progress.seconds)

    def note(self, cell: Cell, share: float, seconds: float) -> None:
        """Record the share of a cell that is done, and the time that it took in all."""
        self.share[cell.slug], self.seconds[cell.slug] = share, seconds

    def iteration(self, cell: Cell, iteration: int, seconds: float) -> None:
        """Record an iteration of a cell, and the time that it took."""
        self.note(cell, self._part(cell, iteration), self.seconds[cell.slug] + seconds)

    def left(self) -> float | None:
        """The seconds left; None while nothing is done."""
        done = sum(self.cost[slug] * share for slug, share in self.share.items())
        if done == 0:
            return None
        return sum(self.seconds.values()) / done * (sum(self.cost.values()) - done)

    def _part(self, cell: Cell, iteration: int) -> float:
        """The share of a cell after some iterations. The measurement makes the last 3 %."""
        return 0.97 * iteration / self.planned[cell.slug]


class GridDisplay:
    """The progress of a study.

    Args:
        cells: cells to run.
        pace: estimate of the time left.
        done: number of cells that are done already.
        quiet: show nothing.
        console: place of the display. Default: standard output.
    """

    def __init__(
        self, cells: list[Cell], pace: Pace, done: int, quiet: bool = False, console: Console | None = None
    ) -> None:
        self.pace, self.total, self.done, self.failed, self.quiet = pace, len(cells), done, 0, quiet
        self.console = console or make_console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, console=self.console)
        self._grid = self._progress.add_task("cells", total=self.total, completed=done, note="")
        self._cell = self._progress.add_task("", total=None, visible=False, note="")
        self._live = Live(console=self.console, get_renderable=lambda: Group(self._progress), refresh_per_second=4)
        self._started = 0.0

    def __enter__(self) -> GridDisplay:
        if self.console.is_terminal and not self.quiet:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal and not self.quiet:
            self._live.stop()

    def start(self, cell: Cell, iteration: int) -> CellDisplay:
        """Begin a cell, and return the display of its iterations."""
        self._started = time.monotonic()
        self._progress.reset(
            self._cell, description=cell.slug, total=cell.config.iterations, completed=iteration, visible=True
        )
        return CellDisplay(self, cell)

    def advance(self, cell: Cell, row: Mapping[str, Any]) -> None:
        """Show an iteration of the cell."""
        self.pace.iteration(cell, row["iteration"], row["seconds"]["total"])
        self._progress.update(self._cell, completed=row["iteration"], note=_gain(row))
        self._note()

    def phase(self, name: str) -> None:
        """Show the phase of the cell: training, or the sampler that is being measured."""
        self._progress.update(self._cell, note=name)

    def finish(self, cell: Cell, seconds: float, words: str) -> None:
        """Show that the cell is done; `words` is its result."""
        self.done += 1
        self.pace.note(cell, 1.0, seconds)
        self._say(cell, f"{words}, {clock(time.monotonic() - self._started)}")

    def fail(self, cell: Cell, reason: str) -> None:
        """Show that the cell failed."""
        self.failed += 1
        self._say(cell, f"failed: {reason}")

    def skip(self, cell: Cell) -> None:
        """Show that another process works on the cell."""
        self._say(cell, "another process works on it")

    def finish_elsewhere(self, cell: Cell, seconds: float) -> None:
        """Show that another process has done the cell since this one began."""
        self.done += 1
        self.pace.note(cell, 1.0, seconds)
        self._say(cell, "done by another process")

    def _say(self, cell: Cell, words: str) -> None:
        self._progress.update(self._cell, visible=False, note="")
        self._note()
        if not self.quiet:
            text = f"{self.done + self.failed}/{self.total} {cell.slug}: {words}"
            left = self.pace.left()
            self.console.print(
                text if left is None or self.console.is_terminal else f"{text} | {clock(left)} left",
                soft_wrap=True,
                highlight=False,
                markup=False,
                width=PLAIN_WIDTH if not self.console.is_terminal else None,
            )

    def _note(self) -> None:
        left = self.pace.left()
        parts = [f"{self.failed} failed"] * bool(self.failed) + ([f"{clock(left)} left"] if left is not None else [])
        self._progress.update(self._grid, completed=self.done, note=", ".join(parts))


class CellDisplay(SilentDisplay):
    """The trainer's display inside a study: it passes iterations on to the display of the grid."""

    def __init__(self, grid: GridDisplay, cell: Cell) -> None:
        self.grid, self.cell = grid, cell

    def iteration(self, row: Mapping[str, Any]) -> None:
        """Show an iteration."""
        self.grid.advance(self.cell, row)


def _gain(row: Mapping[str, Any]) -> str:
    """The training rewards of an iteration in words."""
    return ", ".join(f"{name} {value['mean']:.4g}" for name, value in (row.get("reward") or {}).items())

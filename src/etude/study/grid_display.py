"""Display of a running study: the grid, the cell, the time left; elsewhere a line a cell."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from etude.study.directory import StudyDirectory, work
from etude.study.study_file import Cell
from etude.terminal import PLAIN_WIDTH, clock, make_console
from etude.training.progress import SilentDisplay


class Pace:
    """An estimate of the time left for `cells`, from the time of their finished part."""

    def __init__(self, cells: list[Cell], directory: StudyDirectory) -> None:
        self.cost = {cell.slug: work(cell.config) for cell in cells}
        self.share = dict.fromkeys(self.cost, 0.0)
        self.seconds = dict.fromkeys(self.cost, 0.0)
        for cell in cells:
            progress = directory.progress(cell, look_for_others=False)
            self.note(cell, progress.iteration, progress.seconds, progress.state == "done")

    def note(self, cell: Cell, iteration: int, seconds: float, done: bool = False) -> None:
        """Record the last iteration of a cell, and the time that it took in all."""
        # The measurement makes the last 3 %.
        self.share[cell.slug] = 1.0 if done else 0.97 * iteration / cell.config.iterations
        self.seconds[cell.slug] = seconds

    def left(self) -> float | None:
        """The seconds left; None while nothing is done."""
        done = sum(self.cost[slug] * share for slug, share in self.share.items())
        if done == 0:
            return None
        return sum(self.seconds.values()) / done * (sum(self.cost.values()) - done)


class GridDisplay:
    """The progress of a study, shown within `bars`."""

    def __init__(self, pace: Pace, quiet: bool) -> None:
        self.pace, self.quiet, self.total, self.failed = pace, quiet, len(pace.share), 0
        self.done = list(pace.share.values()).count(1.0)
        self.console = make_console()
        note = TextColumn("{task.fields[note]}")
        self.bars = Progress(
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), note),
            console=self.console,
            refresh_per_second=4,
            disable=quiet or not self.console.is_interactive,
        )
        self._grid = self.bars.add_task("cells", total=self.total, completed=self.done, note="")
        self._cell = self.bars.add_task("", total=None, visible=False, note="")
        self._started = 0.0

    def start(self, cell: Cell, iteration: int) -> CellDisplay:
        """Begin a cell, and return the display of its iterations."""
        self._started = time.monotonic()
        total = cell.config.iterations
        self.bars.reset(self._cell, description=cell.slug, total=total, completed=iteration, visible=True)
        return CellDisplay(self, cell)

    def advance(self, cell: Cell, row: Mapping[str, Any]) -> None:
        """Show an iteration of the cell, with the training rewards."""
        self.pace.note(cell, row["iteration"], self.pace.seconds[cell.slug] + row["seconds"]["total"])
        gain = ", ".join(f"{name} {value['mean']:.4g}" for name, value in (row.get("reward") or {}).items())
        self.bars.update(self._cell, completed=row["iteration"], note=gain)
        self._note()

    def phase(self, name: str) -> None:
        """Show the phase of the cell: training, or the sampler that is being measured."""
        self.bars.update(self._cell, note=name)

    def finish(self, cell: Cell, seconds: float, elsewhere: bool = False) -> None:
        """Show that the cell is done, by this process or `elsewhere` since this one began."""
        self.done += 1
        self.pace.note(cell, cell.config.iterations, seconds, done=True)
        mine = f"done, {clock(time.monotonic() - self._started)}"
        self.say(cell, "done by another process" if elsewhere else mine)

    def fail(self, cell: Cell, reason: str) -> None:
        """Show that the cell failed."""
        self.failed += 1
        self.say(cell, f"failed: {reason}")

    def say(self, cell: Cell, words: str) -> None:
        """Show a line about the cell, which is over for this process."""
        self.bars.update(self._cell, visible=False, note="")
        self._note()
        if not self.quiet:
            text, left = f"{self.done + self.failed}/{self.total} {cell.slug}: {words}", self.pace.left()
            plain = not self.console.is_interactive
            if plain and left is not None:
                text = f"{text} | {clock(left)} left"
            width = PLAIN_WIDTH if plain else None
            self.console.print(text, soft_wrap=True, highlight=False, markup=False, width=width)

    def _note(self) -> None:
        left = self.pace.left()
        parts = [f"{self.failed} failed"] * bool(self.failed) + ([f"{clock(left)} left"] if left is not None else [])
        self.bars.update(self._grid, completed=self.done, note=", ".join(parts))


class CellDisplay(SilentDisplay):
    """The trainer's display inside a study: it passes iterations on to the display of the grid."""

    def __init__(self, grid: GridDisplay, cell: Cell) -> None:
        self.grid, self.cell = grid, cell

    def iteration(self, row: Mapping[str, Any]) -> None:
        """Show an iteration."""
        self.grid.advance(self.cell, row)

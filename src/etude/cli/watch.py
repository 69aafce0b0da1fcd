"""`etude watch`: a live view of a run from its files, also on another machine that shares the disk."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etude.cli.errors import Debug
from etude.cli.options import expanded, option
from etude.cli.streams import reader_is_gone
from etude.errors import EtudeError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from etude.runs.reader import Run

SHOWN = 40
"""Number of iterations in a bar chart of the course."""
BARS = "▁▂▃▄▅▆▇█"


def watch(
    directory: Annotated[Path, typer.Argument(callback=expanded, help="Run directory; it may not exist yet.")],
    once: Annotated[bool, option("Show the present state, and end.", "--once")] = False,
    every: Annotated[float, option("Seconds between two readings of the files.", min=0.1)] = 1.0,
    debug: Debug = False,
) -> None:
    """Show a run live: its progress, rewards, gap, the health of its updates, and the time by phase.

    The command reads the files of the run and changes none. A run can be watched before it begins,
    while it goes on, and afterwards. The command ends with the run: with exit code 0 if the run is
    finished, and 1 if it was broken off.

    Examples:

    `etude watch runs/first`

    `etude watch runs/first --once`
    """
    from rich.live import Live

    from etude.terminal import make_console

    console = make_console()
    if once:
        state = look(directory)
        if state.run is None:
            raise EtudeError(f"there is no run in '{directory}' yet: leave out --once to wait for it.")
        console.print(view(state))
        return
    try:
        if console.is_interactive:
            with Live(console=console, auto_refresh=False) as live:
                for state in _looks(directory, every):
                    live.update(view(state), refresh=True)
        else:
            state = _lines(directory, every, console)
    except KeyboardInterrupt:  # the usual way to end it, so no error
        raise typer.Exit(130) from None
    if reader_is_gone():  # nothing is left to do
        raise typer.Exit(128 + signal.SIGPIPE)
    if not state.finished:
        raise EtudeError(f"the run in '{directory}' is broken off: {_continues(directory)}.")


@dataclass(frozen=True)
class State:
    """The state of a run at one moment."""

    directory: Path
    run: Run | None
    """Files of the run; None before it has begun."""
    locked: bool | None
    """Whether a process is writing the run; None if the file system does not tell."""

    @property
    def iteration(self) -> int:
        """The newest finished iteration; -1 before the first."""
        return self.run.rows[-1]["iteration"] if self.run is not None and self.run.rows else -1

    @property
    def finished(self) -> bool:
        return self.run is not None and not self.locked and self.run.summary.get("iterations") == self.iteration >= 0

    @property
    def over(self) -> bool:
        """Whether no more rows will come. A run that has begun and that nobody writes is over."""
        return self.finished or (self.run is not None and self.locked is False)

    @property
    def words(self) -> str:
        if self.run is None:
            return "waiting for the run to begin"
        if self.finished:
            return self.run.summary.get("stopped") or "finished"
        return f"broken off: {_continues(self.directory)}" if self.over else "running"


def look(directory: Path) -> State:
    """Reads the present state of a run; EtudeError if a file of it is damaged."""
    from etude.files import is_locked
    from etude.runs.reader import read_run

    locked = is_locked(directory)  # first, so that the last rows of a run that has ended are read
    has_begun = (directory / "config.yaml").is_file()
    return State(directory, read_run(directory) if has_begun else None, locked)


def view(state: State) -> Group:
    """A state as text and tables for rich."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from etude.config import parse_config
    from etude.config.algorithm import essence
    from etude.report.doctor import examine
    from etude.terminal import clock

    run, done = state.run, max(0, state.iteration)
    if run is None:
        return Group(Text(f"{state.directory}: {state.words}", style="dim"))
    total = run.config.get("iterations", 0)
    about = essence(parse_config(run.config, f"the configuration in '{run.directory}'"))
    last_ten = run.series("seconds", "total")[1][1:][-10:]
    left = "" if state.over or done < 1 else f"{clock(sum(last_ten) / len(last_ten) * (total - done))} left"
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_row(f"iteration {done}/{total}", ProgressBar(total=total, completed=done, width=40), left)
    head = (Text(f"{state.directory}: {about}", style="bold"), line, Text(state.words, style="dim"))
    if not run.rows:
        return Group(*head)
    phases: Mapping[str, float] = run.rows[-1].get("seconds") or {}
    shares = ", ".join(f"{name} {value:.3g} s" for name, value in phases.items() if name != "total")
    seconds = f"last iteration {phases.get('total', 0.0):.3g} s: {shares}"
    findings = [Text(f"{finding}", style="yellow") for finding in examine(run)]
    return Group(*head, Text(), _rewards(run), Text(), _health(run), Text(), *findings, Text(seconds))


def _looks(directory: Path, every: float) -> Iterator[State]:
    """One state after another, until the run is over or nobody reads."""
    while True:
        state = look(directory)
        yield state
        if state.over or reader_is_gone():
            return
        time.sleep(every)


def _lines(directory: Path, every: float, console: Any) -> State:
    """Prints a line for each iteration, as the run does without a terminal. Returns the last state."""
    from etude.cli.training_display import TrainingDisplay
    from etude.config import parse_config

    display, last, clock = None, -1, [0.0]
    for state in _looks(directory, every):
        if state.run is None:
            continue
        if display is None:
            config = parse_config(state.run.config, f"the configuration in '{directory}'")
            display = TrainingDisplay(config, console, clock=lambda: clock[0])
        for row in state.run.rows:
            if row["iteration"] > last:
                last = row["iteration"]
                clock[0] += (row.get("seconds") or {}).get("total", 0.0)
                display.iteration(row)
    console.print(state.words, soft_wrap=True, highlight=False, markup=False)
    return state


def _rewards(run: Run) -> Table:
    from etude.measuring.statistics import format_interval

    last = run.rows[-1].get("reward") or {}
    iteration, evaluation = run.evaluations[-1] if run.evaluations else (0, {})
    table = _table("reward", "training mean", "std", "course", "held-out ODE", "SDE", "gap (ODE - SDE)", "improvement")
    for name in run.rewards:
        training = last.get(name, {})
        cells = [_number(training.get("mean")), _number(training.get("std")), _course(run, "reward", name, "mean")]
        for quantity in ("ode", "sde", "gap", "improvement"):
            interval = (evaluation.get(quantity) or {}).get(name)
            signed = quantity in {"gap", "improvement"}
            bounds = interval and (interval["mean"], interval["low"], interval["high"])
            cells.append(format_interval(*bounds, signed) if bounds else "-")
        table.add_row(name, *cells)
    table.caption = f"held-out figures of iteration {iteration}, with 95 % intervals"
    table.caption_justify = "left"
    return table


def _health(run: Run) -> Table:
    from etude.learning.metrics import metrics_of

    table = _table("update", "last", "course")
    objective = str((run.config.get("objective") or {}).get("kind", "ppo"))
    names = {metric.name: metric.title for metric in metrics_of(objective)} | {"memory_mb": "peak memory, MB"}
    for key, name in names.items():
        value = run.rows[-1].get(key)
        if value is not None:
            table.add_row(name, _number(value), _course(run, key))
    return table


def _table(*columns: str) -> Table:
    from etude.terminal import figures_table

    table = figures_table(*columns)
    for column in table.columns:
        if column.header == "course":  # of bars, which stay in one line
            column.justify, column.no_wrap = "left", True
    return table


def _course(run: Run, *path: str) -> str:
    """The numbers of the last iterations as bars between their smallest and their largest."""
    values = run.series(*path)[1][-SHOWN:]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _continues(directory: Path) -> str:
    return f"`etude train --resume --out {shlex.quote(str(directory))}` continues it"

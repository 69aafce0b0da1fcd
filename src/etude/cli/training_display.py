"""The display of a run in training: live bars on a terminal, one plain line an iteration elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from etude.config import TrainConfig
from etude.sampling.etas import eta_text
from etude.terminal import clock, figures_table, make_console
from etude.training.progress import Display
from etude.training.run import estimate_text, summary_blocks


class TrainingDisplay(Display):
    """Progress, the rewards under both samplers, the gap and the remaining time."""

    def __init__(
        self, config: TrainConfig, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.console = console or make_console()
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._now: tuple[int, float] = (0, 0.0)
        self._rewards: Mapping[str, Any] = {}
        self._evaluation: Mapping[str, Any] = {}
        self._eta = config.sampling.eta_text
        self._sampler = config.sampling.solver or ("SDE in the window" if config.sampling.window else "SDE")
        name, note = TextColumn("{task.description:<12}"), TextColumn("{task.fields[note]}")
        self._progress = Progress(name, BarColumn(), MofNCompleteColumn(), note, console=self.console)
        self._iterations = self._progress.add_task("iteration", total=config.iterations, note="")
        self._phase = self._progress.add_task("loading", total=None, note="")
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> TrainingDisplay:
        if self.console.is_interactive:
            self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.update(self._phase, visible=False)
        if self.console.is_interactive:
            self._live.stop()

    def phase(self, name: str, total: int | None = None) -> None:
        """Restarts the inner bar under the name of the phase."""
        self._progress.reset(self._phase, description=name, total=total)

    def advance(self, n: int = 1) -> None:
        self._progress.advance(self._phase, n)

    def iteration(self, row: Mapping[str, Any]) -> None:
        """Shows the numbers of a finished iteration; without a terminal, prints them as a line."""
        self._now = (row["iteration"], self._clock())
        self._first = self._first or self._now
        self._rewards = row.get("reward", self._rewards)
        self._evaluation = row.get("evaluation", self._evaluation)
        self._eta = eta_text(row["eta"]) if "eta" in row else self._eta
        self._progress.update(self._iterations, completed=row["iteration"], note=self._left())
        if not self.console.is_interactive:
            self.console.print(" | ".join(self._plain(row)), soft_wrap=True, highlight=False, markup=False)

    def summary_table(self, summary: Mapping[str, Any]) -> None:
        """Print the last evaluation as a table, the advice that follows from it, and where the time went."""
        for block in summary_blocks(summary):
            self.console.print(block, soft_wrap=isinstance(block, Text))

    def _plain(self, row: Mapping[str, Any]) -> Iterator[str]:
        yield f"iteration {row['iteration']}/{self.config.iterations}"
        if window := row.get("window"):
            yield f"window {window['start']}..{window['start'] + window['size'] - 1}"
        if self.config.sampling.eta_schedule is not None and "eta" in row:
            yield f"eta {eta_text(row['eta'])}"
        for reward, value in (row.get("reward") or {}).items():
            yield f"{reward}: training {self._sampler} {value['mean']:.4g}"
        evaluation = row.get("evaluation") or {}
        labels = {"ode": "held-out ODE", "sde": "SDE", "gap": "gap", "improvement": "improvement"}
        for reward in evaluation.get("ode") or {}:
            parts = [f"{label} {estimate_text(evaluation, quantity, reward)}" for quantity, label in labels.items()]
            yield f"{reward}: {', '.join(part for part in parts if not part.endswith(' -'))}"
        if "seconds" in row:
            yield f"{row['seconds'].get('total', sum(row['seconds'].values())):.1f} s"
        if self._left():
            yield self._left()

    def _left(self) -> str:
        """The remaining time at the pace of the iterations so far, evaluations included."""
        assert self._first is not None
        done, seconds = self._now[0] - self._first[0], self._now[1] - self._first[1]
        return f"{clock(seconds / done * (self.config.iterations - self._now[0]))} left" if done else ""

    def _render(self) -> Group:
        if not (self._rewards or self._evaluation):
            return Group(self._progress)
        training = f"training {self._sampler}, eta = {self._eta}"
        table = figures_table("reward", training, "held-out ODE", "gap (ODE - SDE)", "improvement")
        for reward in self._evaluation.get("ode", self._rewards):
            name = f"{reward} (held out)" if reward in self.config.evaluation.held_out_rewards else reward
            mean = f"{self._rewards[reward]['mean']:.4g}" if reward in self._rewards else "-"
            cells = [estimate_text(self._evaluation, quantity, reward) for quantity in ("ode", "gap", "improvement")]
            table.add_row(name, mean, *cells)
        return Group(self._progress, table)

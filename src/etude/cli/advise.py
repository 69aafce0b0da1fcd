"""`etude advise`: which eta to train with, and what to deploy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from etude.cli import options
from etude.cli.errors import Debug
from etude.cli.options import option, path
from etude.cli.streams import only_shows
from etude.cli.waiting import heavy_imports, quiet_libraries
from etude.training.progress import SilentDisplay

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def advise(
    model: options.Model,
    reward: Annotated[
        list[str],
        option("Reward to train on: a name, module:function or url; may be repeated.", metavar="NAME[=WEIGHT]"),
    ],
    budget: Annotated[float, option("Minutes for the whole command, on this machine.", min=0.01)] = 15.0,
    eta: Annotated[
        list[float] | None,
        option(
            "Eta to try; may be repeated. Default: 0.5, 1, 1.5, 2 and the one that the theory recommends.",
            callback=options.finite,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        option("Recipe for the other settings of the pilots. Default: the first built-in one for the model."),
    ] = None,
    overrides: Annotated[
        list[str] | None, option("Change one key of the recipe; may be repeated.", "--set", metavar="KEY=VALUE")
    ] = None,
    out: Annotated[
        Path | None, path("Keep the pilots here; the same command continues them. Default: a temporary directory.")
    ] = None,
    json: Annotated[Path | None, path("Also write the advice to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Suggest a training eta and a deployment sampler, from short pilot runs and the theory.

    The command first times one iteration and sizes the pilots to the budget: a short run at every
    eta, then a second run of the better half with another seed. The pilots are compared under the
    ODE on the same held-out prompts and noise. If the difference of two etas is not significant,
    the smaller one is suggested. The tuned pilot then draws images with several solvers and step
    counts. The cheapest sampler that surely keeps three quarters of the improvement is suggested.
    Every figure has a 95 % interval. If intervals overlap widely, give a larger budget or more
    images (`--set evaluation.num_images=256`).

    Example: `etude advise emoji-sd --reward colorfulness --budget 15 --out runs/advice --json
    advice.json` """  # fmt: skip
    options.check_target(json, "--json")
    if json is not None:
        only_shows()
    with heavy_imports():
        quiet_libraries()
        from json import dumps

        from etude.advice.adviser import Adviser, base_config
        from etude.config import parse_rewards
        from etude.files import atomic_write_text
        from etude.terminal import make_console
    config = base_config(model, parse_rewards(reward), recipe, overrides or [])
    watcher = _Progress(make_console(stderr=True))
    with tempfile.TemporaryDirectory(prefix="etude-advise-") as temporary, watcher.bars:
        advice = Adviser(config, budget, out or Path(temporary) / "advice", eta, watcher).advise()
    _show(advice, make_console())
    if json is not None:
        atomic_write_text(json, dumps(advice, indent=2) + "\n")


def _show(advice: dict[str, Any], console: Console) -> None:
    """Prints the suggestion, the reasons and the evidence."""
    chosen = advice["suggestion"]
    suggestion = (
        f"suggestion: train {advice['model']} on {advice['reward']} with {chosen['kernel']} at eta = {chosen['eta']:g} and "
        f"{chosen['training_steps']} steps; deploy {chosen['solver']} with {chosen['steps']} steps"
    )
    for line in (suggestion, *(f"- {reason}" for reason in advice["reasons"])):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for table in _tables(advice):
        console.print()
        console.print(table)


def _tables(advice: dict[str, Any]) -> Iterator[Table]:
    """The pilots, and the samplers that the tuned pilot was drawn with."""
    from rich.table import Table

    chosen = advice["suggestion"]["eta"]
    caption = (
        f"pilots of {advice['iterations']} iterations on {advice['reward']}, {advice['images']} images of {advice['prompts']} held-out prompts; "
        f"{advice['minutes']:.1f} of {advice['budget_minutes']:g} minutes"
    )
    columns = ["eta", "seeds", "ODE", "improvement (ODE)", "behind the best", "gap (ODE - SDE)"]
    table = Table(*columns, box=None, caption=caption)
    for row in advice["pilots"]:
        mark = " *" if row["eta"] == chosen else ""
        behind = _text(row["behind_best"]) if row["behind_best"] else "after one round"
        cells = (_text(row["ode"], signed=False), _text(row["improvement"]), behind, _text(row["gap"]))
        table.add_row(f"{row['eta']:g}{mark}", str(len(row["seeds"])), *cells)
    yield table
    caption = f"the pilot at eta = {chosen:g}, deployed"
    columns = ["sampler", "steps", "network evaluations", "reward", "behind DDIM at training steps"]
    table = Table(*columns, box=None, caption=caption)
    for row in advice["deployment"]:
        name, counts = row["solver"] + (" *" if row["suggested"] else ""), (str(row["steps"]), str(row["evaluations"]))
        table.add_row(name, *counts, _text(row["ode"], signed=False), _text(row["behind_reference"]))
    yield table


def _text(estimate: dict[str, Any], signed: bool = True) -> str:
    from etude.measuring.statistics import format_interval

    if estimate["low"] == estimate["high"] == 0:
        return "-"
    return format_interval(estimate["mean"], estimate["low"], estimate["high"], signed)


class _Progress:
    """Bars on a terminal; elsewhere a line for each pilot and note."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.console = console
        self.bars = Progress(*columns, console=console, transient=True, disable=not console.is_interactive)
        self.pilots = self.bars.add_task("getting ready", total=None)
        self.inner = self.bars.add_task("iterations", total=None, visible=False)

    def note(self, text: str) -> None:
        self.bars.update(self.pilots, description=text)
        self.bars.update(self.inner, visible=False)
        if not self.console.is_interactive:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def pilot(self, label: str, done: int, total: int, iterations: int) -> SilentDisplay:
        """Shows the bars of one pilot; returns the display for its run."""
        self.note(f"pilot {done + 1} of {total}: {label}")
        self.bars.update(self.pilots, completed=done, total=total)
        self.bars.reset(self.inner, total=iterations, visible=True, description="iterations")
        return _Pilot(self)


class _Pilot(SilentDisplay):
    def __init__(self, progress: _Progress) -> None:
        self._update = partial(progress.bars.update, progress.inner)

    def phase(self, name: str, total: int | None = None) -> None:
        self._update(description=f"iterations ({name})")

    def iteration(self, row: Mapping[str, Any]) -> None:
        self._update(completed=row["iteration"])

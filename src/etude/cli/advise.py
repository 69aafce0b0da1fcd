"""`etude advise`: which eta to train with, and what to deploy."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etude.cli import options
from etude.cli.errors import Debug
from etude.cli.waiting import heavy_imports, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def advise(
    model: options.Model,
    reward: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[=WEIGHT]",
            help="Reward to train on: a name, module:function or url; may be repeated.",
            show_default=False,
        ),
    ],
    budget: Annotated[float, typer.Option(min=0.01, help="Minutes for the whole command, on this machine.")] = 15.0,
    eta: Annotated[
        list[float] | None,
        typer.Option(
            callback=options.finite,
            help="Eta to try; may be repeated. Default: 0.5, 1, 1.5, 2 and the one that the theory recommends.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe for the other settings of the pilots. Default: the first built-in one for the model.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=options.expanded,
            help="Keep the pilots here; the same command continues them. Default: a temporary directory.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(callback=options.expanded, help="Also write the advice to this file.")
    ] = None,
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
    with heavy_imports():
        quiet_libraries()
        from etude.advice.adviser import Adviser, base_config
        from etude.config import parse_rewards
        from etude.files import atomic_write_text
        from etude.terminal import make_console
    config = base_config(model, parse_rewards(reward), recipe, overrides or [])
    with (
        tempfile.TemporaryDirectory(prefix="etude-advise-") as temporary,
        _Progress(make_console(stderr=True)) as watcher,
    ):
        directory = out if out is not None else Path(temporary) / "advice"
        advice = Adviser(config, budget, directory, eta, watcher).advise()
    show(advice, make_console())
    if json is not None:
        from json import dumps

        atomic_write_text(json, dumps(advice, indent=2) + "\n")


def show(advice: dict[str, Any], console: Console) -> None:
    """Prints the suggestion, the reasons and the evidence."""
    chosen = advice["suggestion"]
    console.print(
        f"suggestion: train {advice['model']} on {advice['reward']} with {chosen['kernel']} at eta = {chosen['eta']:g} and "
        f"{chosen['training_steps']} steps; deploy {chosen['solver']} with {chosen['steps']} steps",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip
    for reason in advice["reasons"]:
        console.print(f"- {reason}", soft_wrap=True, highlight=False, markup=False)
    console.print()
    console.print(_pilots(advice))
    console.print()
    console.print(_samplers(advice))


def _pilots(advice: dict[str, Any]) -> Table:
    from rich.table import Table

    caption = (
        f"pilots of {advice['iterations']} iterations on {advice['reward']}, {advice['images']} images of {advice['prompts']} held-out prompts; "
        f"{advice['minutes']:.1f} of {advice['budget_minutes']:g} minutes"
    )
    table = Table(
        "eta", "seeds", "ODE", "improvement (ODE)", "behind the best", "gap (ODE - SDE)", box=None, caption=caption
    )
    for row in advice["pilots"]:
        mark = " *" if row["eta"] == advice["suggestion"]["eta"] else ""
        behind = _text(row["behind_best"]) if row["behind_best"] else "after one round"
        cells = (_text(row["ode"], signed=False), _text(row["improvement"]), behind, _text(row["gap"]))
        table.add_row(f"{row['eta']:g}{mark}", str(len(row["seeds"])), *cells)
    return table


def _samplers(advice: dict[str, Any]) -> Table:
    from rich.table import Table

    caption = f"the pilot at eta = {advice['suggestion']['eta']:g}, deployed"
    table = Table(
        "sampler", "steps", "network evaluations", "reward", "behind DDIM at training steps", box=None, caption=caption
    )
    for row in advice["deployment"]:
        name = row["solver"] + (" *" if row["suggested"] else "")
        cells = (
            str(row["steps"]),
            str(row["evaluations"]),
            _text(row["ode"], signed=False),
            _text(row["behind_reference"]),
        )
        table.add_row(name, *cells)
    return table


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
        self.bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.pilots = self.bars.add_task("getting ready", total=None)
        self.inner = self.bars.add_task("iterations", total=None, visible=False)

    def __enter__(self) -> _Progress:
        self.bars.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bars.stop()

    def note(self, text: str) -> None:
        """Shows a text in place of the last one."""
        self.bars.update(self.pilots, description=text)
        self.bars.update(self.inner, visible=False)
        if not self.console.is_terminal:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def pilot(self, label: str, done: int, total: int, iterations: int) -> Any:
        """Shows the bars of one pilot; returns the display for its run."""
        self.note(f"pilot {done + 1} of {total}: {label}")
        self.bars.update(self.pilots, completed=done, total=total)
        self.bars.reset(self.inner, total=iterations, visible=True, description="iterations")
        return self._display()

    def _display(self) -> Any:
        from etude.training.progress import SilentDisplay

        bars, inner = self.bars, self.inner

        class Pilot(SilentDisplay):
            def phase(self, name: str, total: int | None = None) -> None:
                bars.update(inner, description=f"iterations ({name})")

            def iteration(self, row: Any) -> None:
                bars.update(inner, completed=row["iteration"])

        return Pilot()

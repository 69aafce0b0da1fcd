"""The run that the command line asks for: a new one from a recipe, or the one in a directory."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from etude.cli.errors import UsageError
from etude.errors import EtudeError

if TYPE_CHECKING:
    from etude.config import TrainConfig


def prepare_run(
    recipe: str | None, overrides: list[str], out: Path | None, resume: bool, rewards: list[str] | None = None
) -> tuple[TrainConfig, Path]:
    """The configuration and the directory of the run, from the arguments of `etude train`."""
    from etude.config import load_config, parse_rewards

    weights = parse_rewards(rewards or [])
    if resume:
        if out is None:
            raise UsageError("--resume needs --out, the directory of the run to continue")
        return _resumed_config(recipe, overrides, weights, out), out
    if recipe is None:
        raise UsageError("give a RECIPE: a name that `etude recipes` lists, or a YAML file")
    if out is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes need --out, since each would choose a directory of its own")
    directory = out or Path("runs", f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    return load_config(recipe, overrides, weights), directory


def _resumed_config(recipe: str | None, overrides: list[str], weights: dict[str, float], out: Path) -> TrainConfig:
    """The configuration of the run in `out`, with which all other arguments must agree, more `iterations` apart."""
    from etude.config import continuation, load_config
    from etude.runs.layout import holds_something

    stored = out / "config.yaml"
    if not stored.is_file():
        if recipe is not None and not holds_something(out):
            typer.echo(f"nothing to resume in '{out}': starting the run there.", err=True)
            return load_config(recipe, overrides, weights)
        raise EtudeError(
            f"--out '{out}' holds no config.yaml, so there is no run to resume: check the directory, "
            "or give a RECIPE and a new or empty directory to start one."
        )
    config = load_config(str(stored))
    requested = load_config(recipe if recipe is not None else str(stored), overrides, weights)
    change = continuation(config, requested)
    if change is not None:
        key, old, new = change
        raise EtudeError(
            f"--resume: {key} is {old!r} in '{stored}' but {new!r} on the command line: continue that run with "
            f"`etude train --resume --out {shlex.quote(str(out))}`, or start another one in another --out."
        )
    return requested

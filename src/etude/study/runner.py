"""Runs the cells of a study, each to its end or to its failure, none twice."""

from __future__ import annotations

import gc
import shlex
import subprocess
import traceback
from fnmatch import fnmatch
from pathlib import Path

from etude.errors import EtudeError, brief
from etude.files import atomic_write_text
from etude.study.directory import StudyDirectory
from etude.study.grid_display import GridDisplay, Pace
from etude.study.measurement import measure
from etude.study.study_file import Cell, Study


def select(study: Study, pattern: str | None) -> list[Cell]:
    """The cells whose name holds `pattern`, or matches it where it has wildcards.

    Raises:
        EtudeError: there is none.
    """
    if pattern is None:
        return list(study.cells)
    wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    chosen = [cell for cell in study.cells if fnmatch(cell.slug, wild)]
    if not chosen:
        raise EtudeError(f"--only '{pattern}' matches none of the {len(study.cells)} cells; --list prints their names.")
    return chosen


def run_study(
    study: Study, cells: list[Cell], directory: StudyDirectory, launcher: str | None = None, quiet: bool = False
) -> dict[str, str]:
    """Trains and measures every cell that is not done; several processes may share the work.

    Args:
        cells: those of the study that are wanted.
        launcher: command that a `-m etude train ...` is appended to, one process a cell; None trains here, one after another.

    Returns:
        The reason of each failure, by cell.
    """
    directory.root.mkdir(parents=True, exist_ok=True)
    states = {cell.slug: directory.progress(cell, look_for_others=False).state for cell in cells}
    atomic_write_text(directory.root / "study.yaml", study.text)
    failures: dict[str, str] = {}
    with GridDisplay(cells, Pace(cells, directory), list(states.values()).count("done"), quiet) as display:
        for cell in cells:
            with directory.claim(cell) as mine:
                found = directory.progress(cell, look_for_others=False)
                if not mine:
                    display.skip(cell)
                elif found.state != "done":
                    failure = _run_cell(cell, directory, display, launcher)
                    if failure is not None:
                        failures[cell.slug] = failure
                elif states[cell.slug] != "done":
                    display.found(cell, found.seconds)
    return failures


def _run_cell(cell: Cell, directory: StudyDirectory, display: GridDisplay, launcher: str | None) -> str | None:
    """One cell, as far as it still has to go; the reason if it failed."""
    try:
        directory.check(cell)
        found = directory.progress(cell, look_for_others=False)
        shown = display.start(cell, found.iteration)
        if directory.file(cell, "summary.json") is None:
            if launcher is None:
                from etude.training.trainer import Trainer

                Trainer(cell.config, directory.cell(cell), resume=True, display=shown).train()
            else:
                _launch(cell, directory, launcher)
        display.phase("measuring")
        measure(cell, directory, display.phase)
        gc.collect()  # the network and its optimiser refer to one another
    except Exception as error:  # one cell's failure, whatever it is, leaves the others to run
        reason = brief(error) if isinstance(error, EtudeError) else f"{type(error).__name__}: {brief(error)}"
        path = directory.failure(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, f"{reason}\n\n{traceback.format_exc()}")
        display.fail(cell, reason)
        return reason
    directory.failure(cell).unlink(missing_ok=True)
    display.finish(cell, directory.progress(cell, look_for_others=False).seconds, "done")
    return None


def _launch(cell: Cell, directory: StudyDirectory, launcher: str) -> None:
    """Trains one cell in processes of its own.

    Raises:
        EtudeError: the command cannot be started or fails; its last line is repeated.
    """
    config: Path = directory.root / "configs" / f"{cell.slug}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(config, cell.config.to_yaml())
    arguments = ["-m", "etude", "train", str(config), "--out", str(directory.cell(cell)), "--resume", "--quiet"]
    try:
        done = subprocess.run([*shlex.split(launcher), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise EtudeError(f"--launcher '{launcher}' cannot be started: {brief(error)}.") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        told = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        raise EtudeError(f"the launched run ended with code {done.returncode}: {told.removeprefix('error: ')}")

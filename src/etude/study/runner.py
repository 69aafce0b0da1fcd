"""Run the cells of a study, each to its end or to its failure, none twice."""

from __future__ import annotations

import gc
import shlex
import subprocess
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from etude.errors import EtudeError, brief
from etude.files import atomic_write_text
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.study.directory import StudyDirectory
from etude.study.grid_display import GridDisplay, Pace
from etude.study.measurement import measure
from etude.study.study_file import Cell, Study


def select(cells: Sequence[Cell], pattern: str | None) -> list[Cell]:
    """Select the cells whose name contains a pattern, or matches it with its wildcards.

    Raises:
        EtudeError: no cell matches.
    """
    if pattern is None:
        return list(cells)
    wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    chosen = [cell for cell in cells if fnmatch(cell.slug, wild)]
    if not chosen:
        raise EtudeError(f"--only '{pattern}' matches none of the {len(cells)} cells; --list prints their names.")
    return chosen


def run_study(
    study: Study, cells: list[Cell], directory: StudyDirectory, launcher: str | None = None, quiet: bool = False
) -> dict[str, str]:
    """Train and measure `cells` that are not done; return the reason of each failure, by cell.

    Several processes may share the work.

    Args:
        launcher: command to which `-m etude train ...` is appended, once for each cell.
            Default: train in this process, one cell after another.

    Raises:
        EtudeError: the directory cannot be written, its archive is damaged, or an adapter to train on
            from does not fit its model.
    """
    check_adapters(cells)
    directory.root.mkdir(parents=True, exist_ok=True)
    pace = Pace(cells, directory)  # which reads what is done: a damaged archive stops here, before anything is written
    atomic_write_text(directory.root / "study.yaml", study.text)
    return run_cells(cells, directory, pace, launcher, quiet)


def check_adapters(cells: Sequence[Cell]) -> None:
    """Tries each adapter that a cell trains on from with its model, on shapes: none is refused after hours of other cells.

    Raises:
        EtudeError: an adapter cannot be read, or does not fit.
    """
    pairs = {(ModelSource.of(cell.config), cell.config.lora.init): cell for cell in cells if cell.config.lora.init}
    for (source, adapter), cell in pairs.items():
        try:
            load_source(source, outline=True).continue_lora(Path(str(adapter)).expanduser())
        except EtudeError as error:
            raise EtudeError(f"cell '{cell.slug}': {error}") from error


def run_cells(
    cells: list[Cell],
    directory: StudyDirectory,
    pace: Pace,
    launcher: str | None = None,
    quiet: bool = False,
    settle: Callable[[Cell], Cell | None] | None = None,
) -> dict[str, str]:
    """Run cells in order, as `run_study`.

    `settle` gives a cell its last configuration, just before its turn; None puts the cell off, since the
    cells that it waits for are not done.
    """
    failures: dict[str, str] = {}
    display = GridDisplay(pace, quiet)
    with display.bars:
        for planned in cells:
            cell = planned if settle is None else settle(planned)
            if cell is None:
                display.say(planned, "put off, since it waits for other cells")
                continue
            with directory.claim(cell) as mine:
                progress = directory.progress(cell, look_for_others=False)
                if not mine:
                    display.say(cell, "another process works on it")
                elif progress.state != "done":
                    if (failure := _run_cell(cell, directory, display, launcher)) is not None:
                        failures[cell.slug] = failure
                elif pace.share[cell.slug] < 1:
                    display.finish(cell, progress.seconds, elsewhere=True)
    return failures


def _run_cell(cell: Cell, directory: StudyDirectory, display: GridDisplay, launcher: str | None) -> str | None:
    """Run the rest of one cell, and return the reason of its failure, or None."""
    try:
        directory.check(cell)
        shown = display.start(cell, directory.progress(cell, look_for_others=False).iteration)
        if directory.file(cell, "summary.json") is None:
            if launcher is None:
                from etude.training.trainer import Trainer

                Trainer(cell.config, directory.cell(cell), resume=True, display=shown).train()
            else:
                _launch(cell, directory, launcher)
        if cell.measured:
            display.phase("measuring")
            measure(cell, directory, display.phase)
        gc.collect()  # the network and its optimiser refer to one another
    except Exception as error:  # any failure of one cell leaves the other cells to run
        reason = brief(error) if isinstance(error, EtudeError) else f"{type(error).__name__}: {brief(error)}"
        path = directory.failure(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, f"{reason}\n\n{traceback.format_exc()}")
        display.fail(cell, reason)
        return reason
    directory.failure(cell).unlink(missing_ok=True)
    display.finish(cell, directory.progress(cell, look_for_others=False).seconds)
    return None


def _launch(cell: Cell, directory: StudyDirectory, launcher: str) -> None:
    """Train one cell in processes of its own; an error quotes the last line of the command."""
    config = directory.root / "configs" / f"{cell.slug}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(config, cell.config.to_yaml())
    arguments = ["-m", "etude", "train", str(config), "--out", str(directory.cell(cell)), "--resume", "--quiet"]
    try:
        done = subprocess.run([*shlex.split(launcher), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise EtudeError(f"--launcher '{launcher}' cannot be started: {brief(error)}.") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        last = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        raise EtudeError(f"the launched run ended with code {done.returncode}: {last.removeprefix('error: ')}")

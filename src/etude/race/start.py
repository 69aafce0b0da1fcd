"""Run a race: pilots, choices and cells, in the order of its file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from etude.errors import EtudeError
from etude.files import atomic_write_text
from etude.race.entries import Entries
from etude.race.race_file import changes, load_race
from etude.study.directory import StudyDirectory
from etude.study.grid_display import Pace
from etude.study.runner import check_adapters, run_cells
from etude.study.study_file import Cell

FILE = "race.yaml"
"""Name of the race's file in its directory."""


def run_race(
    entries: Entries,
    cells: Sequence[Cell],
    directory: StudyDirectory,
    launcher: str | None = None,
    quiet: bool = False,
) -> dict[str, str]:
    """Run `cells` that are not done; return the reason of each failure, by cell.

    Raises:
        EtudeError: the directory belongs to a race with other rules, or cannot be written, or an
            adapter to train on from does not fit its model.
    """
    check_adapters(cells)
    settle = partial(entries.settle, directory=directory)
    pace = Pace([settle(cell) or cell for cell in cells], directory)  # before anything is written
    keep_rules(entries, directory)
    return run_cells(list(cells), directory, pace, launcher, quiet, settle)


def keep_rules(entries: Entries, directory: StudyDirectory) -> None:
    """Write the race's file into its directory, and refuse one whose rules have changed since the first run.

    Raises:
        EtudeError: the rules have changed.
    """
    path = directory.root / FILE
    if path.is_file():
        changed = list(changes(load_race(path).settings, entries.settings))
        if changed:
            raise EtudeError(
                f"{entries.race.place} has changed in {', '.join(changed)} since the race in '{directory.root}' began: rules "
                "stand before the runs, so restore the file, or give another --out; seeds, heats and methods may be added at the end."
            )
    directory.root.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, entries.race.text)

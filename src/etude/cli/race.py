"""`etude race`: training methods at equal budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from etude.cli.errors import Debug, UsageError
from etude.cli.options import option, path
from etude.cli.streams import only_shows
from etude.cli.waiting import heavy_imports, quiet_libraries
from etude.errors import EtudeError


def race(
    file: Annotated[Path, typer.Argument(help="YAML file of the race.")],
    out: Annotated[Path | None, path("Directory of the race. Default: `runs/race-<name of the file>`.")] = None,
    only: Annotated[
        str | None, option("Only runs whose name contains PATTERN; * and ? are wildcards.", metavar="PATTERN")
    ] = None,
    launcher: Annotated[
        str | None, option('Command that trains each run in processes of its own, as "accelerate launch".')
    ] = None,
    list_runs: Annotated[bool, option("Print the runs, their cost and their progress; run none.", "--list")] = False,
    report_only: Annotated[
        bool, option("Write tables and figures from the runs that are done; run none.", "--report-only")
    ] = False,
    pack: Annotated[
        bool, option("Pack the results of done runs into one file, DIR/cells.tar.xz; run none.", "--pack")
    ] = False,
    quiet: Annotated[bool, option("Show no progress.", "--quiet")] = False,
    debug: Debug = False,
) -> None:
    """Race training methods against one another at equal budgets, and compare them with intervals.

    Every method first gets the same number of short pilots on a seed and on prompts of their own; the
    best values race, over several seeds. A budget counts the network evaluations of training: a
    forward is 1, a forward with its backward 3. race.md, results.json and figures/ say at which
    budget each method reaches a reward, what the held-out rewards lose, and what happens to the gap
    between ODE and SDE.

    Write and commit the file before the first run. Once a race has begun, its directory refuses a
    file with other rules. The same command continues a race that was stopped. Several processes may
    run it at once.

    Example: `etude race studies/race/emoji-flux.yaml --out runs/race-flux`
    """
    from etude.race.race_file import load_race

    if list_runs + report_only + pack > 1:
        raise UsageError("give one of --list, --report-only and --pack")
    loaded = load_race(file)
    with heavy_imports():
        quiet_libraries()
        from rich.table import Table

        from etude.race.entries import Entries
        from etude.race.start import run_race
        from etude.study.directory import StudyDirectory
        from etude.study.pack import pack as pack_cells
        from etude.study.runner import select
        from etude.terminal import clock, make_console
    directory = StudyDirectory(out or Path("runs", f"race-{file.stem}"))
    if directory.root.exists() and not directory.root.is_dir():
        raise EtudeError(f"--out '{directory.root}' is a file; give a directory.")
    entries = Entries(loaded)
    cells = select(entries.cells, only)
    if list_runs:
        from etude.race.race_tables import values_text

        table = Table("run", "values", "state", "iterations", "evaluations", "time", box=None)
        for planned in cells:
            settled = entries.settle(planned, directory)
            cell = settled or planned
            chosen = values_text({key: value for key, value in cell.values.items() if key != "seed"})
            values = chosen if settled else "by its pilots"
            progress = directory.progress(cell)
            state = f"{progress.state}: {progress.failure}" if progress.failure else progress.state
            time = clock(progress.seconds) if progress.seconds else ""
            spent = f"{entries.counter.spent(cell.config)[-1]:,}"
            table.add_row(cell.slug, values, state, f"{progress.iteration}/{cell.config.iterations}", spent, time)
        make_console().print(table)
        return
    only_shows()
    if pack:
        ready = [each for planned in cells if (each := entries.settle(planned, directory)) is not None]
        count, path = pack_cells(ready, directory), directory.archive
        if not quiet:
            typer.echo(f"archive: {path} ({count} run{'' if count == 1 else 's'}, {path.stat().st_size / 1e6:.1f} MB)")
        return
    failures = {} if report_only else run_race(entries, cells, directory, launcher, quiet)
    from etude.race.race_page import write_race

    page = write_race(entries, directory)
    if not quiet:
        typer.echo(f"race: {directory.root}\nresults: {page}")
    if failures:
        names = ", ".join(f"'{name}'" for name in list(failures)[:3]) + (", ..." if len(failures) > 3 else "")
        raise EtudeError(
            f"{len(failures)} of {len(cells)} runs failed ({names}): '{directory.root / 'failures'}' holds the reasons, "
            "and the same command tries them again."
        )

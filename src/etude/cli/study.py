"""`etude study`: a grid of training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from etude.cli.errors import Debug, UsageError
from etude.cli.options import option, path
from etude.cli.streams import only_shows
from etude.cli.waiting import heavy_imports, quiet_libraries
from etude.errors import EtudeError


def study(
    file: Annotated[Path, typer.Argument(help="YAML file of the study.")],
    out: Annotated[Path | None, path("Directory of the study. Default: `runs/<name of the file>`.")] = None,
    only: Annotated[
        str | None, option("Only cells whose name contains PATTERN; * and ? are wildcards.", metavar="PATTERN")
    ] = None,
    launcher: Annotated[
        str | None, option('Command that trains each cell in processes of its own, as "accelerate launch".')
    ] = None,
    list_cells: Annotated[bool, option("Print the cells and their progress; run none.", "--list")] = False,
    report_only: Annotated[
        bool, option("Write tables, figures and the page from done cells; run none.", "--report-only")
    ] = False,
    pack: Annotated[
        bool, option("Pack the results of done cells into one file, DIR/cells.tar.xz; run none.", "--pack")
    ] = False,
    quiet: Annotated[bool, option("Show no progress.", "--quiet")] = False,
    debug: Debug = False,
) -> None:
    """Run a grid of training runs, and compare them with intervals, tables, figures and a page.

    Each cell is an ordinary run directory under DIR/cells. The same command continues a study that
    was stopped, and tries failed cells again. A cell that fails does not stop the others. Several
    processes may run the same command at once: each takes cells that no other process has.
    report.html, tables.md, results.csv and results.json cover all cells that are done, with and
    without --only.

    Example: `etude study studies/eta/study.yaml --out runs/eta`
    """
    from etude.study.study_file import load_study

    if list_cells + report_only + pack > 1:
        raise UsageError("give one of --list, --report-only and --pack")
    loaded = load_study(file)
    with heavy_imports():
        quiet_libraries()
        from rich.table import Table

        from etude.study.directory import StudyDirectory
        from etude.study.pack import pack as pack_cells
        from etude.study.runner import run_study, select
        from etude.terminal import clock, make_console
    directory = StudyDirectory(out or Path("runs", file.parent.name if file.stem == "study" else file.stem))
    if directory.root.exists() and not directory.root.is_dir():
        raise EtudeError(f"--out '{directory.root}' is a file; give a directory.")
    cells = select(loaded.cells, only)
    if list_cells:
        table = Table("cell", "grid", "state", "iterations", "time", box=None)
        for cell in cells:
            progress = directory.progress(cell)
            state = f"{progress.state}: {progress.failure}" if progress.failure else progress.state
            time = clock(progress.seconds) if progress.seconds else ""
            table.add_row(cell.slug, cell.grid, state, f"{progress.iteration}/{cell.config.iterations}", time)
        make_console().print(table)
        return
    only_shows()
    if pack:
        count, path = pack_cells(cells, directory), directory.archive
        if not quiet:
            typer.echo(f"archive: {path} ({count} cell{'' if count == 1 else 's'}, {path.stat().st_size / 1e6:.1f} MB)")
        return
    failures = {} if report_only else run_study(loaded, cells, directory, launcher, quiet)
    from etude.study.study_page import write_results

    report = write_results(loaded, directory)
    if not quiet:
        typer.echo(f"study: {directory.root}\nreport: {report}")
    if failures:
        names = ", ".join(f"'{name}'" for name in list(failures)[:3]) + (", ..." if len(failures) > 3 else "")
        raise EtudeError(
            f"{len(failures)} of {len(cells)} cells failed ({names}): '{directory.root / 'failures'}' holds the reasons, "
            "and the same command tries them again."
        )

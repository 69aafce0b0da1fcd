"""`etude doctor`: what is wrong with a run, from its metrics, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from etude.cli.errors import Debug
from etude.cli.options import expanded


def doctor(
    directory: Annotated[Path, typer.Argument(callback=expanded, help="Run directory, finished or not.")],
    debug: Debug = False,
) -> None:
    """Name the illnesses of a run from its metrics, each with its figure and what to change.

    The command reads the files of the run and changes none. `etude watch` and the report say the
    same. A run without a finding gets a clean bill that lists what was looked for.

    Example: `etude doctor runs/first`
    """
    from etude.report.doctor import clean_bill, examine
    from etude.runs.reader import read_run

    run = read_run(directory)
    findings = examine(run)
    for finding in findings:
        typer.secho(finding.illness.name, bold=True)
        typer.echo(f"    {finding.sentence}\n    {finding.illness.remedy}")
    if not findings:
        typer.echo(clean_bill(run))

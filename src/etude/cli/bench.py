"""`etude bench` and `etude protocols`: deployed models under a pinned, hashed protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from etude.cli import options
from etude.cli.errors import Debug
from etude.cli.options import option, path
from etude.cli.streams import only_shows
from etude.cli.waiting import heavy_imports, progress, quiet_libraries


def bench(
    model: options.Model,
    protocol: Annotated[str, option("Built-in name (`etude protocols`) or YAML file.")],
    lora: Annotated[
        list[Path] | None,
        option("Adapter to measure beside the base model: a run's `lora/`, or a safetensors file; may be repeated."),
    ] = None,
    sensitivity: Annotated[
        bool, option("Also measure solvers, steps, guidance and sizes around the protocol's sampler.", "--sensitivity")
    ] = False,
    against: Annotated[
        list[Path] | None,
        option("Earlier results to compare with, a directory of `etude bench`; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        path("Directory of the results, new or of the same protocol. Default: `bench/<model>-<protocol>-<hash>`."),
    ] = None,
    batch_size: options.BatchSize = 32,
    offload: options.Offload = False,
    pipeline_config: options.PipelineConfig = None,
    variant: options.Variant = None,
    debug: Debug = False,
) -> None:
    """Measure a model, and adapters on it, under a pinned protocol that anybody can repeat.

    A protocol is one file with prompts, images a prompt, seed, sampler, precision and rewards. Its
    hash stands in every result, and results of another hash are not compared. All models and
    samplers draw from the same noise, so that differences are paired, with 95 % intervals clustered
    by prompt. The directory receives results.json, results.md, index.html and contact-sheet.png; a
    killed benchmark goes on when the command is given again.

    Examples:

    `etude bench emoji-sd --protocol emoji-sd --lora runs/first/lora --out bench/first`

    `etude bench emoji-sd --protocol mine.yaml --lora runs/first/lora --lora runs/second/lora --sensitivity`
    """
    only_shows()
    with heavy_imports():
        quiet_libraries()
        from etude.bench.bench_page import notices, tables, write_bench
        from etude.bench.bench_results import analyse, read_results
        from etude.bench.cells import entries, measure_cells
        from etude.bench.protocol import pin, protocol_names, protocol_text, read_protocol
        from etude.policies.source import ModelSource
    settings = read_protocol(protocol)
    text = protocol_text(protocol) if protocol in protocol_names() else Path(protocol).expanduser().read_text("utf-8")
    earlier = {str(file): read_results(file.expanduser()) for file in against or []}
    pinned = pin(settings)
    directory = out or Path("bench") / f"{Path(model).name}-{Path(protocol).stem}-{pinned.hash[:8]}"
    source = ModelSource(model, None, settings.dtype, None, settings.shift, variant, pipeline_config, offload)
    models = entries(source, [adapter.expanduser() for adapter in lora or []])
    variations = pinned.variations if sensitivity else []
    samplers = list(dict.fromkeys([pinned.sampler, *pinned.others, *variations]))
    typer.echo(f"protocol {settings.name}, hash {pinned.hash}", err=True)
    with progress("measuring") as advance:
        cells = measure_cells(pinned, models, samplers, directory, batch_size, advance)
    results = analyse(pinned, model, cells, variations, earlier)
    page = write_bench(directory, results, cells, text)
    for notice in notices(results):
        typer.secho(notice, fg="red", err=True)
    for table in tables(results):
        typer.echo(f"\n{table.title}\n\n{table.markdown()}", nl=False)
    typer.echo(f"\nresults: {page}")


def protocols(
    name: Annotated[str | None, typer.Argument(help="Protocol to print.")] = None,
    debug: Debug = False,
) -> None:
    """List the built-in protocols of `etude bench`, or print one as YAML as a start for your own.

    Example: `etude protocols emoji-sd > mine.yaml`
    """
    with heavy_imports():
        from etude.bench.protocol import protocol_names, protocol_text
    if name is not None:
        typer.echo(protocol_text(name), nl=False)
        return
    for each in protocol_names():
        typer.echo(f"{each}\n    {protocol_text(each).splitlines()[0].removeprefix('# ')}")

"""`etude gap`: the paired reward gap of any model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etude.cli import options
from etude.cli.errors import Debug
from etude.cli.run_settings import choose_sampler
from etude.cli.waiting import heavy_imports, progress, quiet_libraries

if TYPE_CHECKING:
    from rich.table import Table


def gap(
    model: options.Model,
    lora: options.Lora = None,
    eta: Annotated[
        list[float] | None,
        typer.Option(
            callback=options.finite,
            help="Stochasticity compared with the ODE; may be repeated. Default: the run's, else 1.2.",
        ),
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="Denoising steps; may be repeated. Default: the run's, else 20.")
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="Name, module:function or url; may be repeated. Default: alignment.")
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="Built-in set, text or JSONL file, module:function or hub:dataset.")
    ] = "emoji-eval",
    samples: Annotated[int, typer.Option(help="Images per sampler, spread over the prompts; at least 2.")] = 128,
    guidance: options.Guidance = None,
    kernel: options.Kernel = None,
    first_step: options.FirstStep = None,
    seed: options.Seed = 0,
    resolution: options.Resolution = None,
    shift: options.Shift = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = 32,
    offload: options.Offload = False,
    pipeline_config: options.PipelineConfig = None,
    variant: options.Variant = None,
    json: Annotated[
        Path | None,
        typer.Option(callback=options.expanded, help="Also write the numbers and the settings to this file."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure the reward gap of any model, E r(ODE) - E r(SDE at eta), paired on prompt and noise, with 95 % intervals.

    With --lora the improvement of the adapter over the base model, both under the ODE, is measured too, and the sampler is that
    of the run the adapter comes from, except for what is given here.

    Example: `etude gap emoji-sd --lora runs/first/lora --eta 0.5 --eta 1.2 --reward alignment --json gap.json`
    """
    options.check_target(json, "--json")
    sampler = choose_sampler(
        model,
        lora,
        kernel=kernel,
        etas=eta,
        guidance_scale=guidance,
        steps=steps,
        first_step=first_step,
        resolution=resolution,
        dtype=dtype,
        shift=shift,
        variant=variant,
        without_run=[1.2],
    )
    with heavy_imports():
        quiet_libraries()
        from etude.files import atomic_write_text
        from etude.measuring.gap import reward_gap
    options.check_names(sampler.kernel)
    with progress("sampling") as (start, step):
        report = reward_gap(
            model,
            lora=lora,
            rewards=reward,
            prompts=prompts,
            num_images=samples,
            seed=seed,
            batch_size=batch_size,
            offload=offload,
            pipeline_config=pipeline_config,
            on_start=start,
            on_step=step,
            **asdict(sampler),
        )
    from etude.terminal import make_console

    make_console().print(_table(report.rows))
    if json is not None:
        atomic_write_text(json, report.to_json())


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    from etude.measuring.statistics import format_interval

    quantities = [q for q in ("ode", "sde", "gap", "improvement") if q in rows[0]]
    titles = {"ode": "ODE", "sde": "SDE", "gap": "gap (ODE - SDE)", "improvement": "improvement (ODE)"}
    caption = "means with 95 % intervals, clustered by prompt"
    table = Table("steps", "eta", "reward", *(titles[q] for q in quantities), "pairs", box=None, caption=caption)
    for row in rows:
        cells = [
            format_interval(row[q]["mean"], row[q]["low"], row[q]["high"], signed=q in {"gap", "improvement"})
            for q in quantities
        ]
        table.add_row(str(row["num_steps"]), f"{row['eta']:g}", row["reward"], *cells, str(row["gap"]["n"]))
    return table

"""`etude gap`: the paired reward gap of any model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from etude.cli import options
from etude.cli.errors import Debug
from etude.cli.run_settings import choose_settings
from etude.cli.waiting import heavy_imports, progress, quiet_libraries
from etude.terminal import make_console


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
    prompts: Annotated[str, typer.Option(help="Built-in set, file, module:function or hub:dataset.")] = "emoji-eval",
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
    """Measure the reward gap of any model, E r(ODE) - E r(SDE at eta), with 95 % intervals.

    Both samplers draw the same prompts from the same noise, so the gap is a mean of paired
    differences. With --lora the improvement of the adapter over the base model, both under the ODE,
    is measured too. The sampler is then that of the run the adapter comes from, except where an
    option says otherwise.

    Example: `etude gap emoji-sd --lora runs/first/lora --eta 0.5 --eta 1.2 --json gap.json`
    """
    options.check_target(json, "--json")
    with heavy_imports():
        quiet_libraries()
        from etude.files import atomic_write_text
        from etude.measuring.gap import Measurement, reward_gap
        from etude.policies.source import ModelSource
    source = ModelSource(
        model,
        lora=lora,
        resolution=resolution,
        shift=shift,
        variant=variant,
        pipeline_config=pipeline_config,
        offload=offload,
    )
    chosen = choose_settings(
        source,
        kernel=kernel,
        etas=eta,
        guidance=guidance,
        steps=steps,
        first_step=first_step,
        dtype=dtype,
        without_run=[1.2],
    )
    measurement = Measurement.of(reward or "alignment", prompts, samples, seed, batch_size)
    with progress("sampling") as advance:
        report = reward_gap(
            chosen.source,
            etas=chosen.etas,
            steps=chosen.steps,
            sampler=chosen.sampler,
            measurement=measurement,
            on_progress=advance,
        )
    make_console().print(report.table())
    if json is not None:
        atomic_write_text(json, report.to_json())

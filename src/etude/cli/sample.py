"""`etude sample`: images under the ODE, any eta, or a solver."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from etude.cli import options
from etude.cli.errors import Debug, UsageError
from etude.cli.run_settings import choose_settings
from etude.cli.waiting import heavy_imports, progress, quiet_libraries


def sample(
    model: options.Model,
    prompt: Annotated[list[str], typer.Option(help="Prompt to draw; may be repeated.", show_default=False)],
    lora: options.Lora = None,
    eta: Annotated[
        list[float] | None,
        typer.Option(callback=options.finite, help="Stochasticity; repeated, one row each. Default: 0, the ODE."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps of every sampler. Default: the run's, else 20.", show_default=False),
    ] = None,
    guidance: options.Guidance = None,
    kernel: options.Kernel = None,
    first_step: options.FirstStep = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="Draw with a deterministic solver of diffusers instead: ddim, euler, heun, dpmsolver++, unipc."
        ),
    ] = None,
    seed: options.Seed = 0,
    resolution: options.Resolution = None,
    shift: options.Shift = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = 32,
    offload: options.Offload = False,
    pipeline_config: options.PipelineConfig = None,
    variant: options.Variant = None,
    images: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    out: Annotated[Path, typer.Option(callback=options.expanded, help="PNG file to write.")] = Path("sample.png"),
    debug: Debug = False,
) -> None:
    """Draw images with the ODE or at any eta; several images make a grid.

    Every --eta is a row that starts from the same noise, so a column shows what stochasticity alone
    changes. With --lora the sampler is that of the run the adapter comes from, except where an
    option says otherwise; eta stays 0 unless it is given.

    Example: `etude sample emoji-sd --prompt "red heart" --eta 0 --eta 1.2 --out grid.png`
    """
    options.check_target(out, "--out")
    if solver is not None and any(eta or []):
        raise UsageError(f"--solver {solver} is deterministic: leave out --eta, or --solver to draw with noise")
    with heavy_imports():
        quiet_libraries()
        import torch

        from etude.files import atomic_write_bytes
        from etude.policies.loading import load_source
        from etude.policies.source import ModelSource
        from etude.report.grids import image_grid
        from etude.sampling.sampler import Sampler
        from etude.sampling.sampler import sample as draw
        from etude.sampling.solvers import Solver
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
        steps=None if steps is None else [steps],
        first_step=first_step,
        dtype=dtype,
        without_run=[0.0],
        etas_of_run=False,
    )
    sampler = chosen.sampler
    samplers: list[Sampler] = [replace(sampler, eta=each) for each in chosen.etas]
    if solver is not None:
        samplers = [Solver(solver, sampler.steps, sampler.guidance)]
    policy = load_source(chosen.source)
    for each in samplers:
        each.check(policy)
    captions = [text for text in prompt for _ in range(images)]
    total = len(captions) * sum(each.evaluations for each in samplers)
    with progress("sampling") as advance:
        rows = [
            draw(policy, captions, each, seed=seed, batch_size=batch_size, on_step=lambda done: advance(done, total))
            for each in samplers
        ]
    drawn = torch.cat(rows)
    labels = [f"{text}, {each.label}" for each in samplers for text in captions]
    buffer = io.BytesIO()
    alone = len(drawn) == 1
    image_grid(drawn, len(captions), labels=None if alone else labels).save(buffer, format="PNG")
    atomic_write_bytes(out, buffer.getvalue())
    typer.echo(str(out))

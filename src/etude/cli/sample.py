"""`etude sample`: images under the ODE, any eta, or a solver."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from etude.cli import options
from etude.cli.errors import Debug, UsageError
from etude.cli.options import option, path
from etude.cli.run_settings import choose_settings
from etude.cli.streams import only_shows
from etude.cli.waiting import heavy_imports, progress, quiet_libraries


def sample(
    model: options.Model,
    prompt: Annotated[list[str], option("Prompt to draw; may be repeated.")],
    lora: options.Lora = None,
    eta: Annotated[
        list[float] | None,
        option("Stochasticity; repeated, one row each. Default: 0, the ODE.", callback=options.finite),
    ] = None,
    steps: Annotated[int | None, option("Denoising steps of every sampler. Default: the run's, else 20.")] = None,
    guidance: options.Guidance = None,
    kernel: options.Kernel = None,
    first_step: options.FirstStep = None,
    solver: options.Solver = None,
    seed: options.Seed = 0,
    resolution: options.Resolution = None,
    shift: options.Shift = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = 32,
    offload: options.Offload = False,
    pipeline_config: options.PipelineConfig = None,
    variant: options.Variant = None,
    images: Annotated[int, option("Images of each prompt.", min=1)] = 1,
    out: Annotated[Path, path("PNG file to write.")] = Path("sample.png"),
    debug: Debug = False,
) -> None:
    """Draw images with the ODE or at any eta; several images make a grid.

    Every --eta is a row that starts from the same noise, so a column shows what stochasticity alone
    changes. With --lora the sampler is that of the run the adapter comes from, except where an
    option says otherwise; eta stays 0 unless it is given.

    Example: `etude sample emoji-sd --prompt "red heart" --eta 0 --eta 1.2 --out grid.png`
    """
    only_shows()
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
    source = ModelSource(model, lora, "float32", resolution, shift, variant, pipeline_config, offload)
    counts = None if steps is None else [steps]
    source, sampler, etas, _ = choose_settings(
        source, eta, counts, [0.0], False, kernel=kernel, guidance=guidance, first_step=first_step, dtype=dtype
    )
    samplers: list[Sampler] = [replace(sampler, eta=each) for each in etas]
    if solver is not None:
        samplers = [Solver(solver, sampler.steps, sampler.guidance)]
    policy = load_source(source)
    for each in samplers:
        each.check(policy)
    captions = [text for text in prompt for _ in range(images)]
    total = len(captions) * sum(each.evaluations for each in samplers)
    with progress("sampling") as advance:
        rows = [
            draw(policy, captions, each, seed=seed, batch_size=batch_size, on_step=lambda done: advance(done, total))
            for each in samplers
        ]
    drawn, buffer = torch.cat(rows), io.BytesIO()
    labels = [f"{text}, {each.label}" for each in samplers for text in captions] if len(drawn) > 1 else None
    image_grid(drawn, len(captions), labels=labels).save(buffer, format="PNG")
    atomic_write_bytes(out, buffer.getvalue())
    typer.echo(str(out))

"""`etude sample`: images under the ODE, any eta, or a solver."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from etude.cli import options
from etude.cli.errors import Debug, UsageError
from etude.cli.run_settings import Sampler, choose_sampler
from etude.cli.waiting import heavy_imports, progress, quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor

    from etude.policies import TrainablePolicy


def sample(
    model: options.Model,
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be repeated.", show_default=False)],
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

    Every --eta is a row that starts from the same noise, so a column shows what stochasticity alone changes. With --lora the
    sampler is that of the run the adapter comes from, except for what is given here; eta stays 0 unless it is given.

    Example: `etude sample emoji-sd --prompt "red heart" --prompt pizza --eta 0 --eta 1.2 --out grid.png`
    """
    options.check_target(out, "--out")
    if solver is not None and any(eta or []):
        raise UsageError(f"--solver {solver} is deterministic: leave out --eta, or --solver to draw with noise")
    sampler = choose_sampler(
        model,
        lora,
        kernel=kernel,
        etas=eta,
        guidance_scale=guidance,
        steps=None if steps is None else [steps],
        first_step=first_step,
        resolution=resolution,
        dtype=dtype,
        shift=shift,
        variant=variant,
        without_run=[0.0],
        etas_of_run=False,
    )
    with heavy_imports():
        quiet_libraries()
        import torch

        from etude.files import atomic_write_bytes
        from etude.policies import load_policy
        from etude.report.grids import image_grid
    options.check_names(sampler.kernel, solver)
    policy = load_policy(
        model,
        lora,
        dtype=sampler.dtype,
        resolution=sampler.resolution,
        pipeline_config=pipeline_config,
        offload=offload,
        shift=sampler.shift,
        variant=sampler.variant,
    )
    captions = [text for text in prompt for _ in range(images)]
    drawings = _drawings(policy, solver, sampler)
    told = {"guidance_scale": sampler.guidance_scale, "seed": seed, "batch_size": batch_size}
    with progress("sampling") as (start, step):
        start(len(captions) * sum(evaluations for _, evaluations, _ in drawings))
        rows = [draw(policy, captions, on_step=step, **told) for *_, draw in drawings]
    drawn = torch.cat(rows)
    labels = [f"{text}, {label}" for label, *_ in drawings for text in captions]
    buffer = io.BytesIO()
    alone = len(drawn) == 1
    image_grid(drawn, len(captions), labels=None if alone else labels).save(buffer, format="PNG")
    atomic_write_bytes(out, buffer.getvalue())
    typer.echo(str(out))


def _drawings(
    policy: TrainablePolicy, solver: str | None, sampler: Sampler
) -> list[tuple[str, int, Callable[..., Tensor]]]:
    """Each row of images: its label, the network evaluations of an image, and what draws it.

    Every eta is checked on the model's own levels before the first row is drawn.
    """
    from etude.sampling.sampler import make_plan, sample_images

    (steps,) = sampler.steps
    if solver is not None:
        from etude.sampling.solvers import SOLVERS, sample_with_solver

        return [
            (solver, SOLVERS[solver].evaluations(steps), partial(sample_with_solver, solver=solver, num_steps=steps))
        ]
    plans = [make_plan(sampler.kernel, eta, steps, sampler.first_step) for eta in sampler.etas]
    for plan in plans:
        plan.tabulate(policy.grid(steps))
    labels = [f"eta {eta:g}" if eta else "ODE" for eta in sampler.etas]
    return [(label, steps, partial(sample_images, plan=plan)) for label, plan in zip(labels, plans, strict=True)]

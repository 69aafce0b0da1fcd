"""The options that several commands share, and what refuses their values before anything heavy is imported."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from etude.errors import EtudeError


def finite(value: Any) -> Any:
    """Refuses NaN, infinity and numbers below 0: of a guidance scale, and of every eta of a list."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise typer.BadParameter(f"{number:g} is not a finite number of at least 0")
    return value


def positive(value: float | None) -> float | None:
    """Refuses a shift that is none."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value:g} is not a finite number above 0")
    return value


def expanded(path: Path | None) -> Path | None:
    """The path with a leading `~` replaced: a shell leaves the one of `--out=~/runs` as it is."""
    return None if path is None else Path(os.path.expanduser(path))


Model = Annotated[
    str,
    typer.Argument(
        help="Embedded name (`etude models`), diffusers directory, safetensors file or hub id.", show_default=False
    ),
]
PipelineConfig = Annotated[
    str | None,
    typer.Option(
        help="Of a model in one file: the diffusers directory or hub id of its configuration. Default: inferred, from the hub."
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        help="Of the weights' files of a directory or hub id, for example fp16. Default: the run's, else none."
    ),
]
Lora = Annotated[
    Path | None,
    typer.Option(
        callback=expanded,
        help="Adapter that a run exported, for example runs/first/lora. The run's sampler is then the default of the options below.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        callback=finite,
        help="Guidance scale; 1 switches classifier-free guidance off. Default: the run's, else 5.",
        show_default=False,
    ),
]
Kernel = Annotated[
    str | None,
    typer.Option(
        help="Kernel of the stochastic sampler: gddim (any eta), ddim (up to a largest eta); "
        "for flow models also flow_sde, dance_sde or cps, each with an eta of its own. Default: the run's, else gddim.",
        show_default=False,
    ),
]
FirstStep = Annotated[
    Literal["ode", "sde", "capped"] | None,
    typer.Option(
        help="What becomes of a stochastic sampler's step out of pure noise (flow models): ode leaves it deterministic, "
        "sde leaves it to the kernel, capped too, but for flow_sde's infinite noise, capped there. Default: the run's, else ode.",
        show_default=False,
    ),
]
Resolution = Annotated[
    int | None, typer.Option(min=1, help="Side of the images in pixels. Default: the run's, else the pipeline's own.")
]
Shift = Annotated[
    float | None,
    typer.Option(
        callback=positive,
        help="Of the levels of a flow model, in place of its own. Default: the run's, else the pipeline's own.",
        show_default=False,
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of the weights. Default: the run's, else float32.", show_default=False),
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep text encoders and autoencoder on the CPU while they do not work.")
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Images per network call: memory and speed; halved where it does not fit.")
]
Seed = Annotated[int, typer.Option(min=0, help="Keys the noise; the same seed gives the same images.")]


def check_names(kernel: str, solver: str | None = None) -> None:
    """Finds out before a model is loaded whether the samplers exist."""
    from etude.registry import KERNELS

    KERNELS.check(kernel)
    if solver is not None:
        from etude.errors import unknown
        from etude.sampling.solvers import SOLVERS

        if solver not in SOLVERS:
            raise unknown("solver", solver, SOLVERS)


def check_target(path: Path | None, option: str) -> None:
    """Finds out before the work whether its result can be written."""
    if path is None:
        return
    if path.is_dir():
        raise EtudeError(f"{option} '{path}' is a directory: give a file.")
    if not path.parent.is_dir():
        raise EtudeError(f"{option} '{path}': the directory '{path.parent}' does not exist, make it first.")

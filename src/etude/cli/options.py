"""The options that several commands share, and checks of their values before heavy imports."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from etude.errors import EtudeError


def finite(value: Any) -> Any:
    """Refuse NaN, infinity and numbers below 0, in a guidance scale or in a list of etas."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise typer.BadParameter(f"{number:g} is not a finite number of at least 0")
    return value


def positive(value: float | None) -> float | None:
    """Refuse a shift that is not a finite number above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value:g} is not a finite number above 0")
    return value


def expanded(path: Path | None) -> Path | None:
    """Replace a leading `~` of a path, which a shell does not do in `--out=~/runs`."""
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
        help="Diffusers directory or hub id with the configuration of a model in one file. Default: inferred, from the hub."
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        help="Suffix of the weight files in a directory or hub id, for example fp16. Default: the run's, else none."
    ),
]
Lora = Annotated[
    Path | None,
    typer.Option(
        callback=expanded,
        help="Adapter that a run exported, for example runs/first/lora. The options below then default to the run's settings.",
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
        "for flow models also flow_sde, dance_sde or cps. Each counts eta in its own unit. Default: the run's, else gddim.",
        show_default=False,
    ),
]
FirstStep = Annotated[
    Literal["ode", "sde", "capped"] | None,
    typer.Option(
        help="Treatment of a stochastic sampler's step out of pure noise (flow models): ode makes it deterministic, sde leaves "
        "it to the kernel, capped does too and caps the infinite noise of flow_sde there. Default: the run's, else ode.",
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
        help="Shift of a flow model's levels. Default: the run's, else the pipeline's own.",
        show_default=False,
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Precision of the weights. Default: the run's, else float32.", show_default=False),
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep text encoders and autoencoder on the CPU while they are idle.")
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Images per network call; halved where they do not fit into memory.")
]
Seed = Annotated[int, typer.Option(min=0, help="Key of the noise; the same seed gives the same images.")]


def check_target(path: Path | None, option: str) -> None:
    """Refuse a file that cannot be written, before the work."""
    if path is None:
        return
    if path.is_dir():
        raise EtudeError(f"{option} '{path}' is a directory: give a file.")
    if not path.parent.is_dir():
        raise EtudeError(f"{option} '{path}': the directory '{path.parent}' does not exist, make it first.")

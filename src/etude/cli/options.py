"""The options that several commands share, and checks of their values before heavy imports."""

from __future__ import annotations

import math
import os
from functools import partial
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
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value:g} is not a finite number above 0")
    return value


def expanded(path: Path | None) -> Path | None:
    """Replace a leading `~` of a path, which a shell does not do in `--out=~/runs`."""
    return None if path is None else Path(os.path.expanduser(path))


def option(text: str, *names: str, **settings: Any) -> Any:
    """`typer.Option` with its help first. A flag without a name would get a `--no-` twin."""
    return typer.Option(*names, help=text, **settings)


path = partial(option, callback=expanded)


Model = Annotated[
    str, typer.Argument(help="Embedded name (`etude models`), diffusers directory, safetensors file or hub id.")
]
PipelineConfig = Annotated[
    str | None,
    option(
        "Diffusers directory or hub id with the configuration of a model in one file. Default: inferred, from the hub."
    ),
]
Variant = Annotated[
    str | None,
    option("Suffix of the weight files in a directory or hub id, for example fp16. Default: the run's, else none."),
]
Family = Annotated[
    str | None,
    option("Adapter of the pipeline's class: a registered name, or module:Class. Default: by the class."),
]
Lora = Annotated[
    Path | None,
    path(
        "Adapter: what a run exported, for example runs/first/lora, or a safetensors file. The options below then default to the run's settings."
    ),
]
Prompts = Annotated[str, option("Built-in set, file, module:function or hub:dataset.")]
Solver = Annotated[
    str | None,
    option("Draw with a deterministic solver of diffusers instead: ddim, euler, heun, dpmsolver++, unipc."),
]
Guidance = Annotated[
    float | None,
    option("Guidance scale; 1 switches classifier-free guidance off. Default: the run's, else 5.", callback=finite),
]
Kernel = Annotated[
    str | None,
    option(
        "Kernel of the stochastic sampler: gddim (any eta), ddim (up to a largest eta); "
        "for flow models also flow_sde, dance_sde or cps. Each counts eta in its own unit. Default: the run's, else gddim."
    ),
]
FirstStep = Annotated[
    Literal["ode", "sde", "capped"] | None,
    option(
        "Treatment of a stochastic sampler's step out of pure noise (flow models): ode makes it deterministic, sde leaves "
        "it to the kernel, capped does too and caps the infinite noise of flow_sde there. Default: the run's, else ode."
    ),
]
Resolution = Annotated[
    int | None, option("Side of the images in pixels. Default: the run's, else the pipeline's own.", min=1)
]
Shift = Annotated[
    float | None,
    option("Shift of a flow model's levels. Default: the run's, else the pipeline's own.", callback=positive),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    option("Precision of the weights. Default: the run's, else float32."),
]
Offload = Annotated[bool, option("Keep text encoders and autoencoder on the CPU while they are idle.", "--offload")]
BatchSize = Annotated[int, option("Images per network call; halved where they do not fit into memory.", min=1)]
Seed = Annotated[int, option("Key of the noise; the same seed gives the same images.", min=0)]


def check_target(file: Path | None, name: str) -> None:
    """Refuse a file that cannot be written, before the work."""
    if file is not None and file.is_dir():
        raise EtudeError(f"{name} '{file}' is a directory: give a file.")
    if file is not None and not file.parent.is_dir():
        raise EtudeError(f"{name} '{file}': the directory '{file.parent}' does not exist, make it first.")

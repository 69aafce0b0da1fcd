"""Which sampler `etude gap` and `etude sample` use: what was given, else that of the run an adapter comes from, else the defaults."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from etude.errors import EtudeError

if TYPE_CHECKING:
    from etude.config import TrainConfig


@dataclass(frozen=True)
class Sampler:
    """Everything that images depend on beside the model, the prompts and the seed."""

    kernel: str
    etas: list[float]
    guidance_scale: float
    steps: list[int]
    first_step: str
    resolution: int | None
    dtype: str
    shift: float | None = None
    variant: str | None = None


def choose_sampler(
    model: str,
    lora: Path | None,
    *,
    kernel: str | None,
    etas: list[float] | None,
    guidance_scale: float | None,
    steps: list[int] | None,
    first_step: str | None,
    resolution: int | None,
    dtype: str | None,
    shift: float | None,
    variant: str | None = None,
    without_run: list[float],
    etas_of_run: bool = True,
) -> Sampler:
    """Fills in what was not given (None), and says on stderr where a run's settings were taken.

    Args:
        without_run: the etas where neither the user nor a run gives any.
        etas_of_run: whether a run's eta is a default at all. It is none for another kernel, which counts eta in a unit of its own,
            nor if it changes over the run or over the steps.
    """
    config = run_of(model, lora)
    if config is None:
        return Sampler(
            kernel or "gddim",
            etas or without_run,
            5.0 if guidance_scale is None else guidance_scale,
            steps or [20],
            first_step or "ode",
            resolution,
            dtype or "float32",
            shift,
            variant,
        )
    sampling = config.sampling
    trained = without_run
    if (
        etas_of_run
        and kernel in (None, sampling.kernel)
        and isinstance(sampling.eta, float)
        and not sampling.eta_schedule
    ):
        trained = [sampling.eta]
    chosen = Sampler(
        kernel or sampling.kernel,
        etas or trained,
        sampling.guidance_scale if guidance_scale is None else guidance_scale,
        steps or [config.evaluation.num_steps or sampling.num_steps],
        first_step or sampling.first_step,
        resolution or config.resolution,
        dtype or config.dtype,
        shift or sampling.shift,
        variant or (None if lora is None else config.variant),  # what a run exports has none
    )
    typer.echo(f"as in the run of {lora or model} where no option says otherwise: {_said(chosen)}", err=True)
    return chosen


def run_of(model: str, lora: Path | None) -> TrainConfig | None:
    """The configuration of the run that exported an adapter, or a model without one: `config.yaml` beside the directory.

    None where there is no such file, or one that is no run's, which stderr is told.
    """
    from etude.config import load_config

    exported = lora if lora is not None else Path(os.path.expanduser(model))
    if lora is None and not (exported.is_dir() and exported.resolve().name in {"model", "model-best"}):
        return None
    place = exported.resolve().parent / "config.yaml"
    if not place.is_file():
        return None
    try:
        return load_config(str(place))
    except EtudeError as error:
        typer.echo(f"warning: no settings are taken from the file beside {exported}: {error}", err=True)
        return None


def _said(sampler: Sampler) -> str:
    etas, steps = (", ".join(f"{value:g}" for value in values) for values in (sampler.etas, sampler.steps))
    size = "" if sampler.resolution is None else f", resolution {sampler.resolution}"
    shift = "" if sampler.shift is None else f", shift {sampler.shift:g}"
    return (
        f"kernel {sampler.kernel}, eta {etas}, steps {steps}, guidance {sampler.guidance_scale:g}, "
        f"first step {sampler.first_step}{shift}{size}, {sampler.dtype}."
    )

"""Choose the settings of `etude gap` and `etude sample`: the options', else a run's, else defaults.

The run is the one that exported the adapter, or the model where there is no adapter.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from etude.errors import EtudeError

if TYPE_CHECKING:
    from etude.config import TrainConfig
    from etude.policies.source import ModelSource
    from etude.sampling.sampler import SDE


class Choice(NamedTuple):
    """The settings that a command works with.

    Attributes:
        source: the model.
        sampler: the sampler at the first eta and step count.
        etas: stochasticities, one or more.
        steps: step counts, one or more.
    """

    source: ModelSource
    sampler: SDE
    etas: list[float]
    steps: list[int]


def choose_settings(
    source: ModelSource,
    *,
    kernel: str | None,
    etas: list[float] | None,
    guidance: float | None,
    steps: list[int] | None,
    first_step: str | None,
    dtype: str | None,
    without_run: list[float],
    etas_of_run: bool = True,
) -> Choice:
    """Fill in what no option says (None), and tell stderr where a run's settings were taken.

    Args:
        source: the model with the options' resolution, shift and variant; its dtype is `dtype`.
        without_run: the etas where neither an option nor a run gives any.
        etas_of_run: whether a run's eta is a default. It never is under another kernel, which
            counts eta in its own unit, nor where it changes over the run or over the steps.
    """
    from etude.sampling.sampler import SDE

    config = run_of(source)
    defaults: dict[str, Any] = {"kernel": "gddim", "guidance": 5.0, "first_step": "ode"}
    if config is None:
        source = replace(source, dtype=dtype or "float32")
        etas, steps = etas or without_run, steps or [20]
    else:
        sampling = config.sampling
        same_unit = kernel in (None, sampling.kernel) and not sampling.eta_schedule
        if etas_of_run and same_unit and isinstance(sampling.eta, float):
            without_run = [sampling.eta]
        etas, steps = etas or without_run, steps or [config.evaluation.num_steps or sampling.num_steps]
        defaults = {
            "kernel": sampling.kernel, "guidance": sampling.guidance_scale, "first_step": sampling.first_step,
        }  # fmt: skip
        source = replace(
            source,
            dtype=dtype or config.dtype,
            resolution=source.resolution or config.resolution,
            shift=source.shift or sampling.shift,
            # The weight files that a run exports have no suffix.
            variant=source.variant or (config.variant if source.lora else None),
        )
    options = {"kernel": kernel, "guidance": guidance, "first_step": first_step}
    given = {name: value for name, value in options.items() if value is not None}
    choice = Choice(source, SDE(etas[0], steps[0], **(defaults | given)), etas, steps)
    if config is not None:
        place = source.lora or source.name
        typer.echo(f"as in the run of {place} where no option says otherwise: {_summary(choice)}", err=True)
    return choice


def run_of(source: ModelSource) -> TrainConfig | None:
    """The configuration of the run that exported a model: `config.yaml` beside its directory.

    None where there is no such file. A file that is no run's configuration is None too, with a
    warning on stderr.
    """
    from etude.config import load_config

    exported = Path(os.path.expanduser(source.lora or source.name))
    if source.lora is None and not (exported.is_dir() and exported.resolve().name in {"model", "model-best"}):
        return None
    place = exported.resolve().parent / "config.yaml"
    if not place.is_file():
        return None
    try:
        return load_config(str(place))
    except EtudeError as error:
        typer.echo(f"warning: no settings are taken from the file beside {exported}: {error}", err=True)
        return None


def _summary(choice: Choice) -> str:
    source, sampler = choice.source, choice.sampler
    etas, steps = (", ".join(f"{value:g}" for value in values) for values in (choice.etas, choice.steps))
    size = "" if source.resolution is None else f", resolution {source.resolution}"
    shift = "" if source.shift is None else f", shift {source.shift:g}"
    return (
        f"kernel {sampler.kernel}, eta {etas}, steps {steps}, guidance {sampler.guidance:g}, "
        f"first step {sampler.first_step}{shift}{size}, {source.dtype}."
    )

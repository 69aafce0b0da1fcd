"""Choose the settings of `etude gap` and `etude sample`: the options', else a run's, else defaults.

The run is the one that exported the adapter, or the model where there is no adapter.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from etude.errors import EtudeError

if TYPE_CHECKING:
    from etude.config import TrainConfig
    from etude.policies.source import ModelSource
    from etude.sampling.sampler import SDE


def choose_settings(
    source: ModelSource,
    etas: list[float] | None,
    steps: list[int] | None,
    etas_without_run: list[float],
    etas_of_run: bool = True,
    dtype: str | None = None,
    **sampler: Any,
) -> tuple[ModelSource, SDE, list[float], list[int]]:
    """Fill in what no option says (None), and tell stderr where a run's settings were taken.

    Args:
        source: the model with the options' resolution, shift and variant; `dtype` replaces its own.
        etas_without_run: the etas where neither an option nor a run gives any.
        etas_of_run: whether a run's eta is a default. It never is under another kernel, which
            counts eta in its own unit, nor where it changes over the run or over the steps.
        sampler: the options `kernel`, `guidance` and `first_step`.

    Returns:
        The source, the sampler of the first eta and step count, all etas and all step counts.
    """
    from etude.sampling.sampler import SDE

    config = run_of(source)
    given = {name: value for name, value in sampler.items() if value is not None}
    if config is None:
        etas, steps = etas or etas_without_run, steps or [20]
        return replace(source, dtype=dtype or "float32"), SDE(etas[0], steps[0], **given), etas, steps
    run = config.sampling
    same_unit = sampler["kernel"] in (None, run.kernel) and not run.eta_schedule
    eta_of_run = [run.eta] if etas_of_run and same_unit and isinstance(run.eta, float) else None
    etas = etas or eta_of_run or etas_without_run
    steps = steps or [config.evaluation.num_steps or run.num_steps]
    source = replace(
        source,
        dtype=dtype or config.dtype,
        resolution=source.resolution or config.resolution,
        shift=source.shift or run.shift,
        # The weight files that a run exports have no suffix.
        variant=source.variant or (config.variant if source.lora else None),
    )
    defaults: dict[str, Any] = {"kernel": run.kernel, "guidance": run.guidance_scale, "first_step": run.first_step}
    chosen = SDE(etas[0], steps[0], **(defaults | given))
    etas_text, steps_text = (", ".join(f"{value:g}" for value in values) for values in (etas, steps))
    shift = "" if source.shift is None else f", shift {source.shift:g}"
    size = "" if source.resolution is None else f", resolution {source.resolution}"
    typer.echo(
        f"as in the run of {source.lora or source.name} where no option says otherwise: kernel {chosen.kernel}, eta {etas_text}, "
        f"steps {steps_text}, guidance {chosen.guidance:g}, first step {chosen.first_step}{shift}{size}, {source.dtype}.",
        err=True,
    )
    return source, chosen, etas, steps


def run_of(source: ModelSource) -> TrainConfig | None:
    """The configuration of the run that exported a model: `config.yaml` beside its directory.

    None where there is no such file, and, with a warning on stderr, where it is no configuration.
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

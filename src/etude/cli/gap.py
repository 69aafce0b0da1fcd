"""`etude gap`: the paired reward gap of any model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from etude.cli import options
from etude.cli.errors import Debug, UsageError
from etude.cli.options import option, path
from etude.cli.run_settings import choose_settings
from etude.cli.streams import only_shows
from etude.cli.waiting import heavy_imports, progress, quiet_libraries
from etude.terminal import make_console


def gap(
    model: options.Model,
    lora: options.Lora = None,
    eta: Annotated[
        list[float] | None,
        option(
            "Stochasticity compared with the ODE; may be repeated. Default: the run's, else 1.2.",
            callback=options.finite,
        ),
    ] = None,
    steps: Annotated[list[int] | None, option("Denoising steps; may be repeated. Default: the run's, else 20.")] = None,
    reward: Annotated[
        list[str] | None, option("Name, module:function or url; may be repeated. Default: alignment.")
    ] = None,
    prompts: options.Prompts = "emoji-eval",
    samples: Annotated[int, option("Images per sampler, spread over the prompts; at least 2.")] = 128,
    images_per_prompt: Annotated[
        int | None,
        option(
            "Images of each prompt, of which --samples must be a multiple; diversity needs at least 2. "
            "Default: as few as the prompts allow.",
            min=1,
        ),
    ] = None,
    training: Annotated[
        str | None,
        option(
            "Sampler of training, for the gap to any deployed sampler: `eta=1.2,steps=10,guidance=1`. Default: the run's SDE.",
            "--from",
            metavar="SAMPLER",
        ),
    ] = None,
    deployed: Annotated[
        list[str] | None,
        option(
            "Sampler of deployment, such as `dpmsolver++,steps=20,guidance=7,size=512`; may be repeated. Keys: solver, steps, "
            "guidance, size, eta, kernel, first_step. Default: the ODE in the steps of training.",
            "--to",
            metavar="SAMPLER",
        ),
    ] = None,
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
    json: Annotated[Path | None, path("Also write the numbers and the settings to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Measure the reward gap of any model, E r(ODE) - E r(SDE at eta), with 95 % intervals.

    Both samplers draw the same prompts from the same noise, so the gap is a mean of paired
    differences. With --lora the improvement of the adapter over the base model, both under the ODE,
    is measured too. The sampler is then that of the run the adapter comes from, except where an
    option says otherwise.

    --from and --to measure the gap between any two samplers, E r(deployed) - E r(training), instead.
    A sampler takes the steps, guidance and size that it does not name from the options or the run.

    Examples:

    `etude gap emoji-sd --lora runs/first/lora --eta 0.5 --eta 1.2 --json gap.json`

    `etude gap emoji-sd --from eta=1.2,steps=10,guidance=1 --to ode,steps=20,guidance=5 --to heun,steps=10`
    """
    options.check_target(json, "--json")
    if json is not None:
        only_shows()
    with heavy_imports():
        quiet_libraries()
        from etude.config import check_sampler, parse_sampler
        from etude.files import atomic_write_text
        from etude.measuring.gap import GapReport, reward_gap
        from etude.measuring.pairs import Measurement
        from etude.measuring.transfer import TransferReport, transfer_gap
        from etude.policies.source import ModelSource
    source = ModelSource(model, lora, "float32", resolution, shift, variant, pipeline_config, offload)
    source, sampler, etas, step_counts = choose_settings(
        source, eta, steps, [1.2], kernel=kernel, guidance=guidance, first_step=first_step, dtype=dtype
    )
    measurement = Measurement.of(
        reward or "alignment", prompts, samples, seed, batch_size, images_per_prompt=images_per_prompt
    )
    report: GapReport | TransferReport
    with progress("sampling") as advance:
        if training or deployed:
            if len(etas) > 1 or len(step_counts) > 1:
                raise UsageError("--from and --to name the samplers: give one --eta and one --steps, or none")
            own = {"steps": step_counts[0], "guidance": sampler.guidance}
            noise = {"eta": etas[0], "kernel": sampler.kernel, "first_step": sampler.first_step} if etas[0] else {}
            sde, ode = (check_sampler({**own, **more}, "the sampler of the options") for more in (noise, {}))
            begun = sde if training is None else parse_sampler(training, ode)
            served = [parse_sampler(each, ode) for each in deployed or ["ode"]]
            report = transfer_gap(source, begun, served, measurement, advance)
        else:
            samplers = [replace(sampler, steps=count) for count in step_counts]
            report = reward_gap(source, etas=etas, sampler=samplers, measurement=measurement, on_progress=advance)
    make_console().print(report.table())
    if json is not None:
        atomic_write_text(json, report.to_json())

"""The command line. It parses, reports errors as one sentence, and calls the library; nothing heavy is imported to show help."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etude.cli.errors import CommandGroup, Debug, UsageError, remember_debug
from etude.cli.runs import prepare_run
from etude.cli.serving import serve_reward
from etude.cli.waiting import heavy_imports, progress, quiet_libraries
from etude.errors import EtudeError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from etude.policies import Policy


def main() -> None:
    """The `etude` program."""
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    app(prog_name="etude")


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 success, 1 failure, 2 misuse, 130 interrupted. Errors are one sentence on stderr.",
)


def _print_version(value: bool) -> None:
    if value:
        from etude import __version__

        typer.echo(f"etude {__version__}")
        raise typer.Exit


def _finite(value: Any) -> Any:
    """Refuses NaN, infinity and numbers below 0: of a guidance scale, and of every eta of a list."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise typer.BadParameter(f"{number:g} is not a finite number of at least 0")
    return value


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
Lora = Annotated[Path | None, typer.Option(help="Adapter that a run exported, for example runs/first/lora.")]
Guidance = Annotated[
    float, typer.Option(callback=_finite, help="Guidance scale; 1 switches classifier-free guidance off.")
]
Kernel = Annotated[
    str,
    typer.Option(
        help="Kernel of the stochastic sampler: gddim (any eta), ddim (up to a largest eta); "
        "for flow models also flow_sde, dance_sde or cps, each with an eta of its own."
    ),
]
Resolution = Annotated[
    int | None, typer.Option(min=1, help="Side of the images in pixels. Default: the pipeline's own.")
]
Seed = Annotated[int, typer.Option(min=0, help="Keys the noise; the same seed gives the same images.")]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune text-to-image models with a stochastic sampler at any eta, ship the ODE sampler, and know the reward gap.

    A first run on a laptop: `etude train emoji-ddpo --out runs/first`
    """


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Built-in name (`etude recipes`) or YAML file.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to tune, in place of the recipe's.", show_default=False)
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT]",
            help="Reward in place of the recipe's: a name, module:function or url; may be repeated.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one key; may be repeated. `etude recipes --keys` lists them."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory, new or empty. Default: `runs/<recipe>-<time>`.", show_default=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress and no summary.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration and what the run would take; write nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model on a reward and measure the ODE reward and the gap as it trains.

    The run directory gets metrics.jsonl, config.yaml (which reproduces the run), checkpoints, the LoRA, before / after
    samples and report.html. A run that was killed continues with --resume and ends bit for bit where it would have ended;
    RECIPE may then be left out. The built-in recipes are DDPO, GRPO, MixGRPO and MixGRPO-Flash runs on the embedded models,
    which take minutes on two CPU cores, and the published ones on full-size models: `etude recipes` lists them.

    Examples:

    `etude train emoji-ddpo --set sampling.eta=1.2 --set seed=1 --out runs/first`

    `etude train emoji-ddpo --reward my_module:function --reward alignment=0.5`

    `etude train --resume --out runs/first`
    """
    chosen = [] if model is None else [f"model={dumps(model)}"]  # quoted: `no` is a name
    config, directory = prepare_run(recipe, [*chosen, *(overrides or [])], out, resume, reward)
    with heavy_imports():
        quiet_libraries()
        from etude.training.display import SilentDisplay, TrainingDisplay
        from etude.training.trainer import Trainer
    if dry_run:
        from etude.training.dry_run import resolved

        typer.echo(resolved(Trainer(config, out=directory, resume=resume)), nl=False)
        return
    silent = quiet or os.environ.get("RANK", "0") != "0"
    display = SilentDisplay() if silent else TrainingDisplay(config, config.iterations)
    Trainer(config, out=directory, resume=resume, display=display).train()
    if not silent:
        typer.echo(f"run: {directory}\nreport: {directory / 'report.html'}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print.", show_default=False)] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="List every configuration key, its default and meaning.")
    ] = False,
    debug: Debug = False,
) -> None:
    """List the built-in recipes, or print one as YAML to start your own from.

    Example: `etude recipes emoji-ddpo > mine.yaml`
    """
    from etude.config import describe_fields, load_config, recipe_names, recipe_text
    from etude.training.algorithm import essence

    if keys:
        for key, default, text in describe_fields():
            typer.echo(f"{key} = {default!r}\n    {text}")
    elif name is not None:
        typer.echo(recipe_text(name), nl=False)
    else:
        for recipe in recipe_names():
            comment = re.match(r"#\s*(.*)", recipe_text(recipe))
            about = f"    {comment[1]}\n" if comment else ""
            typer.echo(f"{recipe}\n{about}    {essence(load_config(recipe))}")


@app.command()
def gap(
    model: Model,
    lora: Lora = None,
    eta: Annotated[
        list[float] | None,
        typer.Option(callback=_finite, help="Stochasticity compared with the ODE; may be repeated. Default: 1.2."),
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Denoising steps; may be repeated. Default: 20.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="Name, module:function or url; may be repeated. Default: alignment.")
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="Built-in set, text or JSONL file, module:function or hub:dataset.")
    ] = "emoji-eval",
    samples: Annotated[int, typer.Option(help="Images per sampler, spread over the prompts; at least 2.")] = 128,
    guidance: Guidance = 5.0,
    kernel: Kernel = "gddim",
    seed: Seed = 0,
    resolution: Resolution = None,
    pipeline_config: PipelineConfig = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers and the settings to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Measure the reward gap of any model, E r(ODE) - E r(SDE at eta), paired on prompt and noise, with 95 % intervals.

    With --lora the improvement of the adapter over the base model, both under the ODE, is measured too.

    Example: `etude gap emoji-sd --lora runs/first/lora --eta 0.5 --eta 1.2 --reward alignment --json gap.json`
    """
    _check_target(json, "--json")
    with heavy_imports():
        quiet_libraries()
        from etude.gap import reward_gap
        from etude.training.checkpoint import atomic_write_text
    _check_names(kernel)
    with progress("sampling") as (start, step):
        report = reward_gap(
            model,
            lora=lora,
            etas=eta,
            steps=steps,
            rewards=reward,
            prompts=prompts,
            num_images=samples,
            guidance_scale=guidance,
            kernel=kernel,
            seed=seed,
            resolution=resolution,
            pipeline_config=pipeline_config,
            on_start=start,
            on_step=step,
        )
    from etude.training.display import make_console

    make_console().print(_gap_table(report.rows))
    if json is not None:
        atomic_write_text(json, report.to_json())


def _gap_table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    from etude.statistics import format_interval

    quantities = [q for q in ("ode", "sde", "gap", "improvement") if q in rows[0]]
    titles = {"ode": "ODE", "sde": "SDE", "gap": "gap (ODE - SDE)", "improvement": "improvement (ODE)"}
    caption = "means with 95 % intervals, clustered by prompt"
    table = Table("steps", "eta", "reward", *(titles[q] for q in quantities), "pairs", box=None, caption=caption)
    for row in rows:
        cells = [
            format_interval(row[q]["mean"], row[q]["low"], row[q]["high"], signed=q in {"gap", "improvement"})
            for q in quantities
        ]
        table.add_row(str(row["num_steps"]), f"{row['eta']:g}", row["reward"], *cells, str(row["gap"]["n"]))
    return table


@app.command()
def sample(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be repeated.", show_default=False)],
    lora: Lora = None,
    eta: Annotated[
        list[float] | None,
        typer.Option(callback=_finite, help="Stochasticity; repeated, one row each. Default: 0, the ODE."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of every sampler.")] = 20,
    guidance: Guidance = 5.0,
    kernel: Kernel = "gddim",
    solver: Annotated[
        str | None,
        typer.Option(
            help="Draw with a deterministic solver of diffusers instead: ddim, euler, heun, dpmsolver++, unipc."
        ),
    ] = None,
    seed: Seed = 0,
    resolution: Resolution = None,
    pipeline_config: PipelineConfig = None,
    images: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("sample.png"),
    debug: Debug = False,
) -> None:
    """Draw images with the ODE or at any eta; several images make a grid.

    Every --eta is a row that starts from the same noise, so a column shows what stochasticity alone changes.

    Example: `etude sample emoji-sd --prompt "red heart" --prompt pizza --eta 0 --eta 1.2 --out grid.png`
    """
    _check_target(out, "--out")
    if solver is not None and any(eta or []):
        raise UsageError(f"--solver {solver} is deterministic: leave out --eta, or --solver to draw with noise")
    with heavy_imports():
        quiet_libraries()
        import torch

        from etude.policies import load_policy
        from etude.report.grids import image_grid
        from etude.training.checkpoint import atomic_write_bytes
    _check_names(kernel, solver)
    policy = load_policy(model, lora, resolution=resolution, pipeline_config=pipeline_config)
    captions = [text for text in prompt for _ in range(images)]
    drawings = _drawings(policy, solver, kernel, eta or [0.0], steps)
    with progress("sampling") as (start, step):
        start(len(captions) * sum(evaluations for _, evaluations, _ in drawings))
        rows = [draw(policy, captions, guidance_scale=guidance, seed=seed, on_step=step) for *_, draw in drawings]
    drawn = torch.cat(rows)
    labels = [f"{text}, {label}" for label, *_ in drawings for text in captions]
    buffer = io.BytesIO()
    alone = len(drawn) == 1
    image_grid(drawn, len(captions), labels=None if alone else labels).save(buffer, format="PNG")
    atomic_write_bytes(out, buffer.getvalue())
    typer.echo(str(out))


def _drawings(
    policy: Policy, solver: str | None, kernel: str, etas: list[float], steps: int
) -> list[tuple[str, int, Callable[..., Tensor]]]:
    """Each row of images: its label, the network evaluations of an image, and what draws it.

    Every eta is checked on the model's own levels before the first row is drawn.
    """
    from etude.sampling import make_plan, sample_images

    if solver is not None:
        from etude.solvers import SOLVERS, sample_with_solver

        return [
            (solver, SOLVERS[solver].evaluations(steps), partial(sample_with_solver, solver=solver, num_steps=steps))
        ]
    plans = [make_plan(kernel, eta, steps) for eta in etas]
    for plan in plans:
        plan.tabulate(policy.grid(steps))
    labels = [f"eta {eta:g}" if eta else "ODE" for eta in etas]
    return [(label, steps, partial(sample_images, plan=plan)) for label, plan in zip(labels, plans, strict=True)]


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Run directory, finished or not.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Rebuild report.html of a run from what its directory holds.

    Example: `etude report runs/first`
    """
    with heavy_imports():
        from etude.report import write_report
    typer.echo(str(write_report(directory)))


@app.command()
def models(debug: Debug = False) -> None:
    """List the embedded models: what they are, their data, licences and quality figures.

    Example: `etude models`
    """
    import yaml

    from etude import zoo

    cards = zoo.models()
    if not cards:
        raise EtudeError("this installation holds no embedded models: reinstall etude, or give a diffusers directory.")
    typer.echo(
        "\n".join(yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=110) for card in cards), nl=False
    )


app.command("serve-reward")(serve_reward)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def theory(ctx: typer.Context) -> None:
    """Closed forms, finite-step laws and bounds of the reward gap; `etude theory --help` lists them."""
    with heavy_imports():
        from etude.theory.cli import app as theory_app
    arguments = [argument for argument in ctx.args if argument != "--debug"]
    remember_debug(ctx, len(arguments) < len(ctx.args))
    command = typer.main.get_command(theory_app)
    raise typer.Exit(command.main(args=arguments, prog_name="etude theory", standalone_mode=False) or 0)


def _check_names(kernel: str, solver: str | None = None) -> None:
    """Finds out before a model is loaded whether the samplers exist."""
    from etude.errors import unknown
    from etude.kernels import KERNELS

    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    if solver is not None:
        from etude.solvers import SOLVERS

        if solver not in SOLVERS:
            raise unknown("solver", solver, SOLVERS)


def _check_target(path: Path | None, option: str) -> None:
    """Finds out before the work whether its result can be written."""
    if path is None:
        return
    if path.is_dir():
        raise EtudeError(f"{option} '{path}' is a directory: give a file.")
    if not path.parent.is_dir():
        raise EtudeError(f"{option} '{path}': the directory '{path.parent}' does not exist, make it first.")

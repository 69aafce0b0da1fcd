"""The command line: it parses, calls the library, and reports errors as one sentence.

Help is shown without any heavy import.
"""

from __future__ import annotations

import re
import sys
import warnings
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from etude import terminal
from etude.cli import options
from etude.cli.advise import advise
from etude.cli.bench import bench, protocols
from etude.cli.check_model import check_model
from etude.cli.doctor import doctor
from etude.cli.errors import CommandGroup, Debug, UsageError, is_first_process, remember_debug
from etude.cli.gap import gap
from etude.cli.options import option, path
from etude.cli.preferences import app as preferences_app
from etude.cli.race import race
from etude.cli.runs import prepare_run
from etude.cli.sample import sample
from etude.cli.serving import serve_reward
from etude.cli.streams import only_shows, outlast_readers
from etude.cli.study import study
from etude.cli.waiting import heavy_imports, quiet_libraries
from etude.cli.watch import watch
from etude.errors import EtudeError


def main() -> None:
    """The `etude` program."""
    outlast_readers()
    terminal.own_program = True
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    try:
        app(prog_name="etude")
    except SystemExit as end:
        if "etude.rewards.background" not in sys.modules:  # no reward was called, and its imports take time
            raise
        from etude.rewards.background import leave

        leave(end.code if isinstance(end.code, int) else int(end.code is not None))


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 success, 1 failure, 2 misuse, 129 terminal closed, 130 interrupted, 143 terminated. Errors are one sentence on stderr.",
)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version as version_of

        typer.echo(f"etude {version_of('etude')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, option("Print the version.", "--version", callback=_print_version, is_eager=True)] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune text-to-image models with a stochastic sampler at any eta, ship the ODE sampler,
    and measure the reward gap.

    A first run on a laptop: `etude train emoji-ddpo --out runs/first`
    """


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="Built-in name (`etude recipes`) or YAML file.")] = None,
    model: Annotated[str | None, option("Model to tune, in place of the recipe's.")] = None,
    reward: Annotated[
        list[str] | None,
        option(
            "Reward in place of the recipe's: a name, module:function or url; may be repeated.", metavar="NAME[=WEIGHT]"
        ),
    ] = None,
    init_lora: Annotated[
        Path | None, path("Adapter to train on from: a run's `lora/`, or a safetensors file. Default: a new one.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        option("Change one key; may be repeated. `etude recipes --keys` lists them.", "--set", metavar="KEY=VALUE"),
    ] = None,
    out: Annotated[Path | None, path("Run directory, new or empty. Default: `runs/<recipe>-<time>`.")] = None,
    resume: Annotated[bool, option("Continue the run in --out from its last checkpoint.", "--resume")] = False,
    accept_changes: Annotated[
        bool,
        option("With --resume: go on although a prompt file, the model or a reward has changed.", "--accept-changes"),
    ] = False,
    quiet: Annotated[bool, option("Show no progress and no summary.", "--quiet")] = False,
    dry_run: Annotated[
        bool, option("Print the configuration and the cost of the run; write nothing.", "--dry-run")
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model on a reward and measure the ODE reward and the gap as it trains.

    The run directory receives metrics.jsonl, config.yaml (which reproduces the run), checkpoints,
    the LoRA, before / after samples and report.html. A killed run continues with --resume and ends
    with the same bits as an uninterrupted one; RECIPE may then be left out. The built-in recipes
    run DDPO, GRPO, MixGRPO and MixGRPO-Flash: on the embedded models in minutes on two CPU cores,
    and on full-size models with the published settings. `etude recipes` lists them.

    Examples:

    `etude train emoji-ddpo --set sampling.eta=1.2 --set seed=1 --out runs/first`

    `etude train emoji-ddpo --reward my_module:function --reward alignment=0.5`

    `etude train emoji-ddpo --init-lora runs/first/lora --out runs/second`

    `etude train --resume --out runs/first`
    """
    first = (
        [] if model is None else [f"model={dumps(model, ensure_ascii=False)}"]
    )  # quoted, since YAML reads some names as values
    first += [] if init_lora is None else [f"lora.init={dumps(str(init_lora), ensure_ascii=False)}"]
    if accept_changes and not resume:
        raise UsageError("--accept-changes needs --resume, since a new run has nothing that could have changed")
    config, directory = prepare_run(recipe, [*first, *(overrides or [])], out, resume, reward)
    with heavy_imports():
        quiet_libraries()
        from etude.cli.training_display import TrainingDisplay
        from etude.training.dry_run import resolved
        from etude.training.progress import SilentDisplay
        from etude.training.trainer import Trainer
    if dry_run:
        typer.echo(resolved(config, directory, resume, accept_changes=accept_changes), nl=False)
        return
    only_shows()
    silent = quiet or not is_first_process()
    display = SilentDisplay() if silent else TrainingDisplay(config)
    Trainer(config, out=directory, resume=resume, display=display, accept_changes=accept_changes).train()
    if not silent:
        typer.echo(f"run: {directory}\nreport: {directory / 'report.html'}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print.")] = None,
    keys: Annotated[bool, option("List every configuration key, its default and meaning.", "--keys")] = False,
    debug: Debug = False,
) -> None:
    """List the built-in recipes, or print one as YAML as a start for your own.

    Example: `etude recipes emoji-ddpo > mine.yaml`
    """
    from etude.config import describe_fields, load_config, recipe_names, recipe_text
    from etude.config.algorithm import essence

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


app.command()(gap)
app.command()(sample)
app.command()(bench)
app.command()(protocols)
app.command("check-model")(check_model)


@app.command()
def report(
    directory: Annotated[
        Path,
        typer.Argument(callback=options.expanded, help="Directory of a run, of a study or of a race, finished or not."),
    ],
    debug: Debug = False,
) -> None:
    """Rebuild report.html of a run or a study, or race.md of a race, from the files in its directory.

    Example: `etude report runs/first`
    """
    only_shows()
    alone = not (directory / "metrics.jsonl").is_file()
    if alone and (directory / "race.yaml").is_file():
        with heavy_imports():
            from etude.race.entries import Entries
            from etude.race.race_file import load_race
            from etude.race.race_page import write_race
            from etude.study.directory import StudyDirectory
        page = write_race(Entries(load_race(directory / "race.yaml")), StudyDirectory(directory))
    elif alone and (directory / "study.yaml").is_file():
        with heavy_imports():
            from etude.study.directory import StudyDirectory
            from etude.study.study_file import load_study
            from etude.study.study_page import write_results
        page = write_results(load_study(directory / "study.yaml"), StudyDirectory(directory))
    else:
        with heavy_imports():
            from etude.report import write_report
        page = write_report(directory)
    typer.echo(str(page))


@app.command()
def models(debug: Debug = False) -> None:
    """List the embedded models with their architecture, data, licences and quality figures.

    Example: `etude models`
    """
    import yaml

    from etude import zoo

    cards = zoo.models()
    if not cards:
        raise EtudeError("this installation holds no embedded models: reinstall etude, or give a diffusers directory.")
    texts = [yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=110) for card in cards]
    typer.echo("\n".join(texts), nl=False)


app.command("serve-reward")(serve_reward)
app.command()(study)
app.command()(race)
app.command()(watch)
app.command()(doctor)
app.command()(advise)
app.add_typer(preferences_app, name="preferences")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def theory(ctx: typer.Context) -> None:
    """Closed forms, finite-step laws and bounds of the reward gap; `etude theory --help` lists them."""
    with heavy_imports():
        from etude.cli.theory import app as theory_app
    arguments = [argument for argument in ctx.args if argument != "--debug"]
    remember_debug(ctx, len(arguments) < len(ctx.args))
    command = typer.main.get_command(theory_app)
    raise typer.Exit(command.main(args=arguments, prog_name="etude theory", standalone_mode=False) or 0)

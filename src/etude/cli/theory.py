"""`etude theory`: the reward gap of a Gaussian model, its parts, its rates, its bounds and the best eta."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etude.errors import EtudeError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

LINE = "One number, or one per dimension: 1,0.5,2."
_MODEL, _SAMPLER, _ERROR, _OUTPUT = "The model and the reward", "The sampler", "The score error", "Output"


@app.callback(invoke_without_command=True)
def theory(
    ctx: typer.Context,
    mean: Annotated[
        str, typer.Option(help=f"Mean of the base model's law N(m, C). {LINE}", rich_help_panel=_MODEL)
    ] = "1",
    variance: Annotated[str, typer.Option(help=f"Variances C. {LINE}", rich_help_panel=_MODEL)] = "1",
    curvature: Annotated[
        str, typer.Option(help=f"Q of the reward r(x) = -Q (x - center)^2 + linear x. {LINE}", rich_help_panel=_MODEL)
    ] = "1",
    center: Annotated[str, typer.Option(help=f"Where the reward's square peaks. {LINE}", rich_help_panel=_MODEL)] = "2",
    linear: Annotated[
        str, typer.Option(help=f"Slope of the reward's linear part. {LINE}", rich_help_panel=_MODEL)
    ] = "0",
    beta: Annotated[
        float,
        typer.Option(help="Strength of the KL penalty; the tuned law is p* = p exp(r / beta).", rich_help_panel=_MODEL),
    ] = 2.0,
    eta: Annotated[
        list[float] | None,
        typer.Option(
            help="Stochasticity compared with the ODE; may be repeated. Default: 0.5, 1, 1.5.", rich_help_panel=_SAMPLER
        ),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(help="Numbers of steps; may be repeated. Default: 10, 20, 50.", rich_help_panel=_SAMPLER),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            help="Noise schedule: sd (SD1.5, SDXL), ddpm, or flow (rectified flow).", rich_help_panel=_SAMPLER
        ),
    ] = "sd",
    spacing: Annotated[
        str, typer.Option(help="Timesteps: trailing, leading, linspace, log-snr or karras.", rich_help_panel=_SAMPLER)
    ] = "trailing",
    kernel: Annotated[
        str,
        typer.Option(
            help="Kernel: gddim (any eta), ddim (eta up to about 1) or euler-maruyama.", rich_help_panel=_SAMPLER
        ),
    ] = "gddim",
    ve_horizon: Annotated[
        float, typer.Option(help="Largest T of the VE curves, above 4, at most 1e6.", rich_help_panel=_SAMPLER)
    ] = 100.0,
    vp_horizon: Annotated[
        float, typer.Option(help="Largest T of the VP curves, above 2, at most 60.", rich_help_panel=_SAMPLER)
    ] = 12.0,
    bias: Annotated[float, typer.Option(help="Constant error of the noise prediction.", rich_help_panel=_ERROR)] = 0.0,
    gain: Annotated[
        float,
        typer.Option(help="Relative error of the noise prediction: 0.05 is 5 % too large.", rich_help_panel=_ERROR),
    ] = 0.0,
    white: Annotated[
        float, typer.Option(help="Standard deviation of an error drawn anew at every step.", rich_help_panel=_ERROR)
    ] = 0.0,
    out: Annotated[
        Path, typer.Option(help="Directory for theory.json and the figures; made if missing.", rich_help_panel=_OUTPUT)
    ] = Path("runs/theory"),
    figures: Annotated[
        bool, typer.Option(help="Draw the figures, or write theory.json alone.", rich_help_panel=_OUTPUT)
    ] = True,
    format: Annotated[str, typer.Option(help="Format of the figures: png or svg.", rich_help_panel=_OUTPUT)] = "png",
) -> None:
    """Compute the reward gap E r(ODE) - E r(SDE at eta) exactly, for a Gaussian model tuned on a quadratic reward.

    The base model's law is N(mean, variance). Tuning with a KL penalty moves it to p* = p exp(r / beta), a Gaussian again.
    Both samplers then start from noise and follow p*'s exact score (plus the score error you give). Printed and written:

    * how fast the continuous-time gap closes with the horizon T, VE (a power) and VP (exponential), beside the asymptote;
    * the gap with N steps, split into the wrong start (prior), the steps (discretisation) and the score error;
    * bounds that need a few constants only, beside the truth, also for a mixture of two modes;
    * the eta whose sampler comes closest to p*: small eta loses less to the steps, large eta corrects start and score.

    A negative gap means that the stochastic sampler shows a higher reward than the ODE you would ship.

    Examples:

    `etude theory`

    `etude theory --schedule ddpm --steps 20 --eta 1.2 --bias 0.05 --out runs/ddpm`

    `etude theory --mean 1,0 --variance 1,0.25 --center 2,1 --beta 1 --no-figures`

    `etude theory peers`
    """
    if ctx.invoked_subcommand:
        return
    from etude.theory.results import Settings, run

    _check_format(format)
    settings = Settings(
        mean=_numbers(mean, "--mean"),
        variance=_numbers(variance, "--variance"),
        curvature=_numbers(curvature, "--curvature"),
        center=_numbers(center, "--center"),
        linear=_numbers(linear, "--linear"),
        beta=_above(beta, 0.0, "--beta"),
        etas=[_at_least_zero(e, "--eta") for e in dict.fromkeys(eta or [0.5, 1.0, 1.5])],
        steps=[_steps(n) for n in dict.fromkeys(steps or [10, 20, 50])],
        schedule=schedule,
        spacing=spacing,
        kernel=kernel,
        bias=_finite(bias, "--bias"),
        gain=_above(gain, -1.0, "--gain"),
        white=_at_least_zero(white, "--white"),
        ve_horizon=_between(ve_horizon, 4.0, 1e6, "--ve-horizon"),
        vp_horizon=_between(vp_horizon, 2.0, 60.0, "--vp-horizon"),
    )
    with _directory(out):
        report = run(settings)
        text = _serialised(report)
        _print(report)
        (out / "theory.json").write_text(text)
        written = [out / "theory.json"]
        if figures:
            from etude.theory.plots import draw

            written += draw(report, out, format)
    typer.echo("written: " + ", ".join(str(path) for path in written))


@app.command()
def peers(
    steps: Annotated[int, typer.Option(help="Number of sampling steps, 3 to 1000.")] = 25,
    shift: Annotated[
        float, typer.Option(help="The model's time shift: 3 for SD3.5 and for FLUX as the peers train it.")
    ] = 3.0,
    pipeline: Annotated[
        str,
        typer.Option(help="Whose levels are shifted: flux (even ones), or sd3 (its scheduler's own, ending near 0)."),
    ] = "flux",
    level: Annotated[
        list[str] | None, typer.Option(help="One more row, KERNEL=VALUE as in flow_sde=0.9; may be repeated.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Translate the peers' noise levels to the gDDIM eta they amount to.

    Every method of reinforcement learning on flow models has its own unit of noise. Shown is the eta of gDDIM with the same
    standard deviation: for short steps (at sigma = 0.5), and at the first, middle and last stochastic step of a sampler. The
    step that starts at pure noise and the one that ends without any are left out: they are deterministic.

    ∞ means a step with at least as much fresh noise as its target level has in all: gDDIM redraws it all there, and has no
    eta for more.

    Examples:

    `etude theory peers`

    `etude theory peers --steps 10 --pipeline sd3`

    `etude theory peers --level flow_sde=0.9 --level cps=0.5`
    """
    from etude.theory.peers import cells, peer_table
    from etude.theory.peers import markdown as in_markdown

    table = peer_table(_steps(steps), _above(shift, 0.0, "--shift"), pipeline, [_level(text) for text in level or []])
    if markdown:
        typer.echo(in_markdown(table), nl=False)
        return
    titles, rows = cells(table)
    printed = _table(f"The gDDIM eta of a peer's noise: {steps} steps of {pipeline}, shift {shift:g}", *titles)
    for row in rows:
        printed.add_row(*row)
    _console().print(printed)


def _level(text: str) -> tuple[str, float]:
    kernel, _, value = text.partition("=")
    try:
        level = float(value)
    except ValueError:
        raise EtudeError(f"--level is '{text}', which is not KERNEL=VALUE: write flow_sde=0.9.") from None
    return kernel, level


def _numbers(text: str, option: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise EtudeError(f"{option} is '{text}', which is not a list of numbers: write 1 or 1,0.5,2.") from None
    return [_finite(value, option) for value in values]


def _finite(value: float, option: str) -> float:
    if not abs(value) < float("inf"):
        raise EtudeError(f"{option} is {value:g}: give a finite number.")
    return value


def _above(value: float, low: float, option: str) -> float:
    if not _finite(value, option) > low:
        raise EtudeError(f"{option} is {value:g}, but it must be above {low:g}.")
    return value


def _between(value: float, low: float, high: float, option: str) -> float:
    if _above(value, low, option) > high:
        raise EtudeError(f"{option} is {value:g}, but it must be at most {high:g}.")
    return value


def _at_least_zero(value: float, option: str) -> float:
    if _finite(value, option) < 0:
        raise EtudeError(f"{option} is {value:g}, but it must be zero or more.")
    return value


def _steps(value: int) -> int:
    if not 1 <= value <= 1000:
        raise EtudeError(f"--steps is {value}, but it must be between 1 and 1000.")
    return value


@contextmanager
def _directory(out: Path) -> Iterator[None]:
    """Makes the directory before anything is computed, and takes away what it made if nothing comes of it."""
    made: list[Path] = []
    try:
        if out.is_file():
            raise EtudeError(f"--out is {out}, which is a file: give a directory.")
        made = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        yield
    except BaseException as error:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            reason = (error.strerror or str(error)).lower()
            raise EtudeError(f"--out is {out}, which cannot be written ({reason}): give another directory.") from error
        raise


def _serialised(report: dict[str, Any]) -> str:
    try:
        return json.dumps(report, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise EtudeError(
            "some results are beyond the range of float64: give a mean, variance, reward and beta nearer to 1."
        ) from None


def _check_format(extension: str) -> None:
    from etude.theory.plots import FORMATS

    if extension not in FORMATS:
        raise EtudeError(f"--format is '{extension}': choose png or svg.")


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=140)


def _print(report: dict[str, Any]) -> None:
    console = _console()
    settings, optimum = report["settings"], report["optimum"]
    console.print(
        f"base N({_list(optimum['reference_mean'])}, {_list(optimum['reference_variance'])}), "
        f"tuned p* = N({_list(optimum['mean'])}, {_list(optimum['variance'])}) at beta {settings['beta']:g}\n"
        f"improvement: {optimum['improvement_exact']:.4f} between the laws, {optimum['improvement_ode']:.4f} between their "
        f"ODE samplers ({settings['schedule']}, continuous time{_exact(settings)})\n",
        highlight=False,
    )
    for table in (_rate_table(report), _split_table(report), _bound_table(report), _eta_table(report)):
        console.print(table)
        console.print()
    if report["mixture_skipped"]:
        console.print(report["mixture_skipped"] + "\n", highlight=False, markup=False)


def _exact(settings: dict[str, Any]) -> str:
    """Says where a score error that was given does not enter."""
    return ", exact score" if any(settings[name] for name in ("bias", "gain", "white")) else ""


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0)
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _rate_table(report: dict[str, Any]) -> Table:
    table = _table(
        f"Continuous time{_exact(report['settings'])}: how the gap closes",
        "path",
        "eta",
        "gap at the last T",
        "gap ≃",
        "fitted exponent",
    )
    for name, section in report["horizon"].items():
        for row in section["etas"]:
            law = f"{row['constant']:.4g} {section['variable']}^-{row['exponent']:g}" if row.get("constant") else "0"
            fitted = row.get("fitted_exponent")
            label = f"{name.upper()}, T = {section['T'][-1]:g}"
            table.add_row(
                label, f"{row['eta']:g}", f"{row['gap'][-1]:.3e}", law, "-" if fitted is None else f"{fitted:.3f}"
            )
    return table


def _split_table(report: dict[str, Any]) -> Table:
    title = f"N steps of {report['settings']['schedule']}: the gap and its parts"
    table = _table(title, "steps", "eta", "gap", "prior", "discretisation", "score error", "interaction", "largest")
    for row in report["split"]:
        parts = [row[name] for name in ("total", "prior", "discretisation", "score_error", "interaction")]
        table.add_row(
            str(row["steps"]), f"{row['eta']:g}", *(f"{x:+.4f}" for x in parts), row["dominant"].replace("_", " ")
        )
    return table


def _bound_table(report: dict[str, Any]) -> Table:
    table = _table(
        f"Bounds{_exact(report['settings'])}: never below the gap, and how tight",
        "model",
        "eta",
        "gap",
        "best bound",
        "bound / |gap|",
        "which",
    )
    section = report["bounds"]
    for name in ("ve", "vp"):
        curve = section[name]
        best = {key: values[-1] for key, values in curve["bounds"].items() if values[-1] is not None}
        which = min(best, key=lambda key: best[key]) if best else "-"
        label = f"Gaussian, {name.upper()} T = {curve['T'][-1]:g}"
        table.add_row(
            label,
            f"{section['eta']:g}",
            f"{curve['gap'][-1]:.3e}",
            *_pair(curve["best"][-1], curve["ratio"][-1]),
            which,
        )
    for row in report["mixture"]:
        gap = f"{row['gap']:+.4f} ± {row['error']:.0e}"
        table.add_row(
            f"two modes, {row['path']}", f"{row['eta']:g}", gap, *_pair(row["best"], row["ratio"]), row["best_name"]
        )
    return table


def _pair(bound: float | None, ratio: float | None) -> tuple[str, str]:
    return "-" if bound is None else f"{bound:.3e}", "-" if ratio is None else f"{ratio:.2f}"


def _eta_table(report: dict[str, Any]) -> Table:
    table = _table(
        "Which eta: W2 distance of the sampler to p*", "steps", "best eta", "error there", "at eta 0", "at eta 1"
    )
    for row in report["eta"]:
        at_one = row["errors"][min(range(len(row["etas"])), key=lambda i: abs(row["etas"][i] - 1.0))]
        best = f"{row['eta']:.2f}" + (" (the largest tried)" if row["at_limit"] else "")
        table.add_row(str(row["steps"]), best, *(f"{x:.4f}" for x in (row["error"], row["errors"][0], at_one)))
    return table


def _list(values: list[float]) -> str:
    return f"{values[0]:.4g}" if len(values) == 1 else "[" + ", ".join(f"{x:.4g}" for x in values) + "]"

"""`etude theory`: the gap of a Gaussian model, its parts, rates and bounds, and the best eta."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from etude.cli.errors import Group
from etude.cli.options import expanded, option
from etude.cli.theory_options import LINE, directory, json_text, number, numbers, step_count
from etude.cli.theory_training import training
from etude.errors import EtudeError
from etude.registry import KERNELS

app = typer.Typer(
    cls=Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(training)
_model = partial(option, rich_help_panel="The model and the reward")
_sampler = partial(option, rich_help_panel="The sampler")
_error = partial(option, rich_help_panel="The score error")
_output = partial(option, rich_help_panel="Output")


@app.callback(invoke_without_command=True)
def theory(
    ctx: typer.Context,
    mean: Annotated[str, _model(f"Mean of the base model's law N(m, C). {LINE}")] = "1",
    variance: Annotated[str, _model(f"Variances C. {LINE}")] = "1",
    curvature: Annotated[str, _model(f"Q of the reward r(x) = -Q (x - center)^2 + linear x. {LINE}")] = "1",
    center: Annotated[str, _model(f"Peak of the reward's square. {LINE}")] = "2",
    linear: Annotated[str, _model(f"Slope of the reward's linear part. {LINE}")] = "0",
    beta: Annotated[float, _model("Strength of the KL penalty; the tuned law is p* = p exp(r / beta).")] = 2.0,
    eta: Annotated[
        list[float] | None,
        _sampler("Stochasticity to compare with the ODE, in the kernel's unit; may be repeated. Default: 0.5, 1, 1.5."),
    ] = None,
    steps: Annotated[list[int] | None, _sampler("Number of steps; may be repeated. Default: 10, 20, 50.")] = None,
    schedule: Annotated[str, _sampler("Noise schedule: sd (SD1.5, SDXL), ddpm, or flow (rectified flow).")] = "sd",
    spacing: Annotated[str, _sampler("Timesteps: trailing, leading, linspace, log-snr or karras.")] = "trailing",
    kernel: Annotated[
        str, _sampler(f"{KERNELS.about()}; euler-maruyama: of the theory alone; or module:Class.")
    ] = "gddim",
    ve_horizon: Annotated[float, _sampler("Largest T of the VE curves, above 4, at most 1e6.")] = 100.0,
    vp_horizon: Annotated[float, _sampler("Largest T of the VP curves, above 2, at most 60.")] = 12.0,
    bias: Annotated[float, _error("Constant error of the noise prediction.")] = 0.0,
    gain: Annotated[float, _error("Relative error of the noise prediction: 0.05 is 5 % too large.")] = 0.0,
    white: Annotated[float, _error("Standard deviation of an independent error at every step.")] = 0.0,
    out: Annotated[
        Path, _output("Directory for theory.json and the figures; made if missing.", callback=expanded)
    ] = Path("runs/theory"),
    figures: Annotated[bool, _output("Draw the figures, or write theory.json alone.")] = True,
    format: Annotated[str, _output("Format of the figures: png or svg.")] = "png",
) -> None:
    """Compute the reward gap E r(ODE) - E r(SDE at eta) of a Gaussian model exactly.

    The model is tuned on a quadratic reward. The base model's law is N(mean, variance). Tuning with
    a KL penalty moves it to p* = p exp(r / beta), a Gaussian again. Both samplers start from noise
    and follow p*'s exact score (plus the score error you give). The command prints and writes:

    * the rate at which the continuous-time gap closes with the horizon T, for VE (a power) and VP
      (exponential), beside the asymptote; eta is in gDDIM's unit there;
    * the gap with N steps, split into the wrong start (prior), the steps (discretisation) and the
      score error;
    * bounds that need a few constants only, beside the exact gap, also for a mixture of two modes;
    * the eta whose sampler comes closest to p*: a small eta loses less to the steps, a large eta
      corrects start and score.

    A negative gap means that the stochastic sampler shows a higher reward than the ODE you would
    ship.

    Examples:

    `etude theory`

    `etude theory --schedule ddpm --steps 20 --eta 1.2 --bias 0.05 --out runs/ddpm`

    `etude theory --schedule flow --kernel flow_sde --eta 0.7`

    `etude theory --mean 1,0 --variance 1,0.25 --center 2,1 --beta 1 --no-figures`

    `etude theory peers`

    `etude theory training`
    """
    if ctx.invoked_subcommand:
        return
    from etude.cli.theory_tables import print_report
    from etude.theory.plots import FORMATS, draw
    from etude.theory.results import Settings, run

    if format not in FORMATS:
        raise EtudeError(f"--format is '{format}': choose png or svg.")
    settings = Settings(
        mean=numbers(mean, "--mean"),
        variance=numbers(variance, "--variance"),
        curvature=numbers(curvature, "--curvature"),
        center=numbers(center, "--center"),
        linear=numbers(linear, "--linear"),
        beta=number(beta, "--beta", above=0.0),
        etas=[number(e, "--eta", least=0.0) for e in dict.fromkeys(eta or [0.5, 1.0, 1.5])],
        steps=[step_count(n) for n in dict.fromkeys(steps or [10, 20, 50])],
        schedule=schedule,
        spacing=spacing,
        kernel=kernel,
        bias=number(bias, "--bias"),
        gain=number(gain, "--gain", above=-1.0),
        white=number(white, "--white", least=0.0),
        ve_horizon=number(ve_horizon, "--ve-horizon", above=4.0, most=1e6),
        vp_horizon=number(vp_horizon, "--vp-horizon", above=2.0, most=60.0),
    )
    with directory(out):
        report = run(settings)
        text = json_text(report)
        print_report(report)
        (out / "theory.json").write_text(text)
        written = [out / "theory.json", *(draw(report, out, format) if figures else [])]
    typer.echo(f"written: {', '.join(map(str, written))}")


@app.command()
def peers(
    steps: Annotated[int, option("Number of sampling steps, 3 to 1000.")] = 25,
    shift: Annotated[float, option("The model's time shift: 3 for SD3.5 and for FLUX as the peers train it.")] = 3.0,
    pipeline: Annotated[
        str, option("Levels before the shift: flux (even ones), or sd3 (its scheduler's own, ending near 0).")
    ] = "flux",
    level: Annotated[
        list[str] | None, option("One more row, KERNEL=VALUE as in flow_sde=0.9; may be repeated.")
    ] = None,
    markdown: Annotated[bool, option("Print a Markdown table.", "--markdown")] = False,
) -> None:
    """Translate the peers' noise levels to the gDDIM eta they amount to.

    Every method of reinforcement learning on flow models has its own unit of noise. The table gives
    the eta of gDDIM with the same standard deviation: for short steps (at sigma = 0.5), and at the
    first, middle and last stochastic step of a sampler. The step that starts at pure noise and the
    step that ends without noise are left out, because they are deterministic.

    ∞ means a step with at least as much fresh noise as its target level has in all: gDDIM redraws
    all of it there, and has no eta for more.

    Examples:

    `etude theory peers`

    `etude theory peers --steps 10 --pipeline sd3`

    `etude theory peers --level flow_sde=0.9 --level cps=0.5`
    """
    from etude.cli.theory_tables import print_rows
    from etude.theory.peers import cells, peer_table
    from etude.theory.peers import markdown as in_markdown

    shift, levels = number(shift, "--shift", above=0.0), []
    for text in level or []:
        name, _, value = text.partition("=")
        try:
            levels.append((name, float(value)))
        except ValueError:
            raise EtudeError(f"--level is '{text}', which is not KERNEL=VALUE: write flow_sde=0.9.") from None
    table = peer_table(step_count(steps), shift, pipeline, levels)
    if markdown:
        typer.echo(in_markdown(table), nl=False)
    else:
        print_rows(f"The gDDIM eta of a peer's noise: {steps} steps of {pipeline}, shift {shift:g}", *cells(table))

"""`etude theory training`: the gap of a Gaussian model along training, exactly."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from etude.cli.options import expanded, option
from etude.cli.theory_options import LINE, directory, json_text, number, numbers, step_count
from etude.errors import EtudeError
from etude.registry import KERNELS

_model = partial(option, rich_help_panel="The model and the reward")
_sampler = partial(option, rich_help_panel="The sampler")
_method = partial(option, rich_help_panel="The training")
_output = partial(option, rich_help_panel="Output")


def training(
    mean: Annotated[str, _model(f"Mean of the model's law N(m, C) before training. {LINE}")] = "1",
    variance: Annotated[str, _model(f"Variances C. {LINE}")] = "1",
    curvature: Annotated[str, _model(f"Q of the reward r(x) = -Q (x - center)^2 + linear x. {LINE}")] = "1",
    center: Annotated[str, _model(f"Peak of the reward's square. {LINE}")] = "2",
    linear: Annotated[str, _model(f"Slope of the reward's linear part. {LINE}")] = "0",
    bias: Annotated[float, _model("Constant error of the noise prediction before training.")] = 0.0,
    gain: Annotated[float, _model("Relative error of the noise prediction: 0.1 is 10 % too large.")] = 0.0,
    eta: Annotated[
        list[float] | None,
        _sampler("Stochasticity of training, in the kernel's unit; may be repeated. Default: 0.5, 1, 2."),
    ] = None,
    steps: Annotated[int, _sampler("Number of steps.")] = 10,
    schedule: Annotated[str, _sampler("Noise schedule: sd (SD1.5, SDXL), ddpm, or flow (rectified flow).")] = "sd",
    spacing: Annotated[str, _sampler("Timesteps: trailing, leading, linspace, log-snr or karras.")] = "trailing",
    kernel: Annotated[str, _sampler(f"{KERNELS.about()}; or module:Class.")] = "gddim",
    window: Annotated[
        str | None, _sampler("First step and size of the window, as 2,4; the ODE around it. Default: every step.")
    ] = None,
    measured_eta: Annotated[
        float | None, _sampler("One eta for the SDE of all weights. Default: the eta of their training.")
    ] = None,
    method: Annotated[
        str,
        _method(
            "policy-gradient (DDPO, GRPO), matching (NFT, from the ODE) or backpropagation (DRaFT, through the ODE)."
        ),
    ] = "policy-gradient",
    beta: Annotated[
        float, _method("Strength of the KL penalty, of the distance in matching and backpropagation.")
    ] = 0.0,
    kl: Annotated[
        str, _method("Gradient of the KL: of the steps, as in DDPO and etude, or of the whole path.")
    ] = "steps",
    prediction: Annotated[
        str | None, _method("Output of the network: sample, noise or velocity. Default: noise, and velocity for flow.")
    ] = None,
    shared: Annotated[
        bool, _method("One change of the network for all steps, in place of one for each.", "--shared")
    ] = False,
    optimizer: Annotated[str, _method("adam, or gradient for plain ascent.")] = "adam",
    rate: Annotated[float, _method("Learning rate.")] = 0.003,
    updates: Annotated[int, _method("Number of optimiser steps, at most 100000.")] = 600,
    out: Annotated[
        Path, _output("Directory for training.json and the figure; made if missing.", callback=expanded)
    ] = Path("runs/theory"),
    figures: Annotated[bool, _output("Draw the figure, or write training.json alone.")] = True,
    format: Annotated[str, _output("Format of the figure: png or svg.")] = "png",
) -> None:
    """Compute how the reward gap moves along training, exactly and without sampling.

    The model is the exact denoiser of N(mean, variance), with a correction in every step that
    training can change: a shift and a linear feedback. For such a model the expected reward of
    every sampler and its gradient are closed form, so training is followed without noise. The gap
    is E r(ODE) - E r(SDE at eta) of the same weights.

    The table has a row for each eta:

    * slope: the derivative of the gap at the start of a gradient flow. Below zero, the SDE gains
      more than the ODE. A KL does not change it.
    * widest: the gap that is largest in size, and after which update.
    * rise: what the ODE has gained at the end; gap / rise is the gap in that unit.
    * limit: where policy gradients with a KL end, in closed form.

    Noisy early steps matter to the ODE more than to the SDE, which forgets them; late steps matter
    to the SDE more. So the gap narrows or widens by which steps learn most, and `--prediction`,
    `--optimizer`, `--window` and `--shared` decide that.

    Examples:

    `etude theory training`

    `etude theory training --prediction sample --optimizer gradient --rate 0.02 --beta 0.05`

    `etude theory training --method matching --shared`

    `etude theory training --schedule flow --kernel flow_sde --eta 0.7 --window 2,4`
    """
    from etude.cli.theory_tables import print_training
    from etude.terminal import make_console
    from etude.theory import ScoreError, TrainingProblem
    from etude.theory.plots import FORMATS, TRAINING_FIGURES, draw
    from etude.theory.results import Settings
    from etude.theory.training_report import training_report

    if format not in FORMATS:
        raise EtudeError(f"--format is '{format}': choose png or svg.")
    if not 1 <= updates <= 100_000:
        raise EtudeError(f"--updates is {updates}, but it must be between 1 and 100000.")
    settings = Settings(
        mean=numbers(mean, "--mean"),
        variance=numbers(variance, "--variance"),
        curvature=numbers(curvature, "--curvature"),
        center=numbers(center, "--center"),
        linear=numbers(linear, "--linear"),
    )
    etas = [number(e, "--eta", least=0.0) for e in dict.fromkeys(eta or [0.5, 1.0, 2.0])]
    error = ScoreError(number(bias, "--bias"), number(gain, "--gain", above=-1.0))
    problem = TrainingProblem(
        settings.reference(),
        schedule,
        settings.reward(),
        etas,
        step_count(steps),
        spacing,
        kernel,
        method=method,
        beta=number(beta, "--beta", least=0.0),
        kl=kl,
        window=None if window is None else _window(window),
        score_error=error,
        prediction=prediction,
        shared=shared,
    )
    measured = None if measured_eta is None else number(measured_eta, "--measured-eta", least=0.0)
    with directory(out):
        with make_console(stderr=True).status("following the gradient") as status:
            report = training_report(
                problem,
                etas,
                lambda update: status.update(f"update {update} of {updates}"),
                updates=updates,
                rate=number(rate, "--rate", above=0.0),
                optimizer=optimizer,
                measured_eta=measured,
            )
        text = json_text(report)
        print_training(report)
        (out / "training.json").write_text(text)
        written = [out / "training.json", *(draw(report, out, format, TRAINING_FIGURES) if figures else [])]
    typer.echo(f"written: {', '.join(map(str, written))}")


def _window(text: str) -> tuple[float, ...]:
    values = numbers(text, "--window")
    if len(values) != 2:
        raise EtudeError(f"--window is '{text}', which is not a first step and a size: write 2,4.")
    return tuple(values)

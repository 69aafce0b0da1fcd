"""report.html: one self-contained page with the results of a run and their intervals."""

from __future__ import annotations

import base64
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.config import SamplerSettings
from etude.config.algorithm import algorithm
from etude.files import atomic_write_text
from etude.learning.metrics import metrics_of
from etude.measuring.statistics import format_interval, sure_since
from etude.report.doctor import clean_bill, examine
from etude.report.figures import PHASES, Line, bar_figure, line_figure, visits_figure, window_figure
from etude.report.strips import strips
from etude.rewards import WEIGHTED_SUM
from etude.runs.reader import Interval, Run, read_run
from etude.sampling.etas import eta_text, setting_text

if TYPE_CHECKING:
    from jinja2 import Environment

Panel = tuple[str, str, str]
"""A figure of a page: title, explanation, SVG."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's directory, atomically, and return its path.

    The page refers to nothing outside itself. Only `config.yaml` must exist: the page says in a
    sentence which other files of `etude train` are missing, so a run can be viewed while it goes on.

    Raises:
        EtudeError: the directory is no run, or one of its files is invalid.
    """
    html = render(read_run(Path(run_dir)))
    target = Path(run_dir) / "report.html"
    atomic_write_text(target, html)
    return target


@cache
def templates(*folders: str) -> Environment:
    """The templates in folders of the package, for pages in which all text is escaped; compiled once."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(f"etude.{folder}", ".") for folder in folders])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"interval": interval, "duration": duration}
    return environment


def render(run: Run) -> str:
    """The page as HTML."""
    template = templates("report").get_template("template.html")
    return template.render(
        run=run,
        title=f"{run.setting('model') or 'A model'} tuned on {', '.join(run.trained) or 'a reward'}",
        facts=_facts(run),
        headlines=_headlines(run),
        basis=_basis(run),
        table=_table(run),
        deployed=_deployed(run),
        curves=[(reward, reward in {*run.trained, WEIGHTED_SUM}, _curves(run, reward)) for reward in run.rewards],
        window=_window(run),
        grids=_grids(run),
        strips=strips(run),
        diagnostics=_diagnostics(run),
        findings=examine(run),
        clean_bill=clean_bill(run),
        time=_time(run),
        memory=_memory(run),
        environment=_environment(run),
        etas=_etas(run),
    )


def interval(estimate: Interval | None, signed: bool = True) -> str:
    """An estimate as `+1.27 [+1.02, +1.51]`, with real minus signs; a dash for None.

    Without its interval, as from a single seed, it is the mean alone.
    """
    if estimate is None:
        return "–"
    if estimate["low"] is None:
        return f"{estimate['mean']:{'+' if signed else ''}.3g}".replace("-", "−")
    return format_interval(estimate["mean"], estimate["low"], estimate["high"], signed).replace("-", "−")


def duration(seconds: float) -> str:
    """A duration as `3 h 20 min`, `4 min 05 s` or `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _facts(run: Run) -> list[tuple[str, str]]:
    done = max((row["iteration"] for row in run.rows), default=0)
    planned = run.config.get("iterations")
    short = planned and (not run.summary or run.summary.get("stopped"))
    facts = [("iterations", f"{done} of {planned}" if short else f"{done}")]
    if best := run.summary.get("best"):
        facts.append(("best weights", f"iteration {best['iteration']}, by {best['reward']}: {_best_figures(best)}"))
    if "sampling" in run.config:
        facts.append(("algorithm", algorithm(run.config)))
    settings = {"kernel": "kernel", "training eta": "eta", "steps": "num_steps", "guidance": "guidance_scale"}
    for label, key in settings.items():
        if (value := run.setting(key, "sampling")) is not None:
            schedule = key == "eta" and run.setting("eta_schedule", "sampling")
            facts.append((label, setting_text(value, schedule) if schedule else _number(value)))
    facts += [(key, str(run.setting(key))) for key in ("recipe", "seed") if run.setting(key) is not None]
    facts.append(("time", duration(sum(_phase_totals(run).values()))))
    if memory := _peak_memory(run):
        facts.append(("peak memory", _megabytes(memory)))
    return facts


def _best_figures(best: dict[str, Any]) -> str:
    """The ODE mean of the reward that chose the best weights, and its estimate from fresh noise."""
    evaluations = {"": best.get("evaluation"), ", from fresh noise ": best.get("confirmation")}
    means = {words: _estimate(e or {}, "ode", best["reward"]) for words, e in evaluations.items()}
    return "".join(f"{words}{interval(mean, signed=False)}" for words, mean in means.items() if mean)


def _estimate(evaluation: dict[str, Any], quantity: str, reward: str) -> Interval | None:
    return (evaluation.get(quantity) or {}).get(reward)


def _etas(run: Run) -> list[str]:
    """The eta of the SDE in each evaluation; before the first, the configured one."""
    configured = run.setting("eta", "sampling")
    return [_number(e.get("eta", configured)) for _, e in run.evaluations] or [_number(configured)]


def _headlines(run: Run) -> list[dict[str, Any]]:
    """Improvement and gap of each trained reward, as estimates and in words."""
    final = run.evaluations[-1][1] if run.evaluations else {}
    sde = f"the SDE at η = {_etas(run)[-1]} " + ("in every step" if _sampling_window(run) else "that was trained")
    made = "the reward of the images that the ODE sampler makes: the whole interval lies"
    sentences = {
        "improvement": (f"Tuning raised {made} above 0.", f"Tuning lowered {made} below 0.", "No improvement is shown"),
        "gap": (
            f"The ODE sampler, which you ship, scores higher than {sde}.",
            f"The ODE sampler scores lower than {sde}: part of the gain stays behind.",
            f"The ODE sampler and {sde} cannot be told apart",
        ),
    }
    return [
        {"reward": reward, **{name: _in_words(_estimate(final, name, reward), *s) for name, s in sentences.items()}}
        for reward in run.trained
        if reward in (final.get("ode") or {})
    ]


def _in_words(estimate: Interval | None, above: str, below: str, around: str) -> tuple[Interval | None, str]:
    """The estimate, and the sentence for an interval above, below or around 0."""
    if estimate is None:
        return None, "Not measured."
    words = above if estimate["low"] > 0 else below if estimate["high"] < 0 else f"{around}: the interval contains 0."
    return estimate, words


def _sampling_window(run: Run) -> dict[str, Any]:
    """The settings of the window of trained steps; empty if every step was stochastic."""
    return run.setting("window", "sampling") or {}


def _basis(run: Run) -> str:
    """A sentence on the data of the last evaluation: iteration, images, prompts, steps."""
    if not run.evaluations:
        return ""
    iteration, final = run.evaluations[-1]
    estimate: Interval = next(iter((final.get("ode") or {}).values()), {})
    prompts = estimate.get("clusters")
    kind = _prompts(run)
    of = f" of {prompts} {kind if prompts != 1 else kind.removesuffix('s')}" if prompts else f" of {kind}"
    by = "images, as there is one prompt only" if estimate.get("clustered") is False else "prompts"
    steps = f", {final['num_steps']} steps" if "num_steps" in final else ""
    return (
        f"Measured after iteration {iteration} on {estimate.get('n', '?')} pairs of images{of} from the same noise{steps}. "
        f"Square brackets are 95 % bootstrap intervals over {by}."
    )


def _prompts(run: Run) -> str:
    """Name for the prompts of the evaluations; "held-out" only if none of them was trained on."""
    return "evaluation prompts" if run.evaluations[-1][1].get("prompts_trained_on") else "held-out prompts"


def _table(run: Run) -> list[dict[str, Any]]:
    """Every reward of the last evaluation: before, after, improvement, gap."""
    if not run.evaluations:
        return []
    (iteration, first), (_, final) = run.evaluations[0], run.evaluations[-1]
    held_out = run.summary.get("held_out_rewards") or (run.config.get("evaluation") or {}).get("held_out_rewards")
    roles = dict.fromkeys(held_out or [], "held out") | dict.fromkeys(run.trained, "trained")
    roles[WEIGHTED_SUM] = "of the trained"
    return [
        {
            "reward": reward,
            "role": roles.get(reward, "measured"),
            "before": _estimate(first if iteration == 0 else {}, "ode", reward),
            **{quantity: _estimate(final, quantity, reward) for quantity in ("ode", "sde", "improvement", "gap")},
        }
        for reward in run.rewards
        if reward in (final.get("ode") or {})
    ]


def _deployed(run: Run) -> dict[str, Any] | None:
    """The last figures of the deployed sampler by reward, and its label; None where none was measured."""
    found = (run.evaluations[-1][1] if run.evaluations else {}).get("deployed")
    if not found:
        return None
    quantities = ("reward", "gap", "improvement")
    rows = [(name, *(found[quantity][name] for quantity in quantities)) for name in found["reward"]]
    return {"label": SamplerSettings.model_validate(found["sampler"]).label, "rows": rows}


def _curves(run: Run, reward: str) -> list[Panel]:
    figures = []
    (x, mean), (_, std) = (run.series("reward", reward, name) for name in ("mean", "std"))
    if x:
        low = high = None
        if banded := len(std) == len(mean):
            low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        line = Line(x, mean, "train", low=low, high=high, marks=False)
        alt = f"Training reward {reward}: {_first_to_last(mean)} over {len(x)} iterations."
        sampler = "Samples with noise in the window's steps" if _sampling_window(run) else "SDE samples"
        note = f"{sampler}, training prompts: mean" + (" and one standard deviation." if banded else ".")
        figures.append(("While training", note, line_figure([line], alt)))
    ode, sde = run.estimates("ode", reward), run.estimates("sde", reward)
    if ode:
        eta = _number(run.evaluations[-1][1].get("eta"))
        lines = [Line.of(ode, "ode", "ODE")] + ([Line.of(sde, "sde", f"SDE, η = {eta}")] if sde else [])
        alt = f"Reward {reward} on {_prompts(run)}: ODE {_first_to_last(lines[0].y)}"
        alt += f", SDE {_first_to_last(lines[1].y)}." if sde else "."
        note = "Both samplers from the same noise, with 95 % intervals."
        figures.append((f"On {_prompts(run)}", note, line_figure(lines, alt)))
    for quantity, colour, title, note in (
        ("gap", "gap", "Reward gap", "ODE minus SDE, same weights. Above 0: the ODE scores higher."),
        ("improvement", "gain", "Improvement", "ODE of the tuned minus ODE of the base model."),
    ):
        if points := run.estimates(quantity, reward):
            line = Line.of(points, colour)
            alt = f"{title} of {reward}: {_first_to_last(line.y)}; last {interval(points[-1][1])}."
            figures.append((title, note, line_figure([line], alt, zero=True)))
    if points := run.estimates("divergence", reward):
        line, since = Line.of(points, "gap"), sure_since(points)
        sure = "It is not sure." if since is None else f"It is sure since iteration {since}."
        note = f"Gain of the trained reward minus gain of {reward}, in standard deviations of the base model's images. {sure}"
        alt = f"Divergence from {reward}: {_first_to_last(line.y)}; last {interval(points[-1][1])}. {sure}"
        figures.append(("Divergence from this gold reward", note, line_figure([line], alt, zero=True)))
    return figures


def _window(run: Run) -> list[Panel]:
    """The figures of the window; empty for a run without a window."""
    x, starts = run.series("window", "start")
    same, sizes = run.series("window", "size")
    if not x or x != same:
        return []
    first, size = ([int(value) for value in values] for values in (starts, sizes))
    reach = max(start + length for start, length in zip(first, size, strict=True))
    num_steps = max(reach, int(run.setting("num_steps", "sampling") or 0))
    visits = [sum(a <= step < a + n for a, n in zip(first, size, strict=True)) for step in range(num_steps)]
    places = f"{len(set(first))} position{'s' if len(set(first)) > 1 else ''}"
    over = f"{len(x)} iteration{'s' if len(x) > 1 else ''}"
    alt = f"Window of trained steps over {over}: starts from step {first[0]} to step {first[-1]}, at {places}."
    rest = "the rest followed the ODE"
    if _sampling_window(run).get("compression") is not None:
        rest = "those before followed the ODE, and those after were replaced by fewer steps of a second-order solver"
    where = f"These steps of {num_steps} were sampled with noise and trained; {rest}. Step 0 starts from noise."
    counts = ", ".join(f"step {step} {count}" for step, count in enumerate(visits) if count)
    bars = visits_figure(visits, f"Iterations in which each step was in the window: {counts}.")
    return [
        ("Where the window was", where, window_figure(x, first, size, num_steps, alt)),
        ("How often each step was trained", f"Iterations whose window held the step, of {len(x)}.", bars),
    ]


def _grids(run: Run) -> list[tuple[str, str, str]]:
    """(title, alternative text, data URI) of the grids that exist."""
    shown = f"{len(run.prompts)} images: " + "; ".join(map(str, run.prompts)) if run.prompts else "grid of images"
    grids = []
    for name, png in run.grids.items():
        when, sampler = name.split("_")
        model = "base" if when == "before" else "tuned"
        alt = f"{sampler.upper()} sampler, {model} model, {shown}"
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        grids.append((f"{when.capitalize()}, {sampler.upper()}", alt, source))
    return grids


def _diagnostics(run: Run) -> list[Panel]:
    figures = []
    if points := run.estimates("path_kl"):
        line = Line.of(points, "train")
        alt = f"KL of the SDE from the model before training: {_first_to_last(line.y)} nats an image."
        note = "Of the SDE's path, exact at each stochastic step, in nats an image, with 95 % intervals."
        figures.append(("KL from the model before training", note, line_figure([line], alt, from_zero=True)))
    objective = str((run.config.get("objective") or {}).get("kind", "ppo"))
    for metric in metrics_of(objective):
        x, y = run.series(metric.name)
        if x:
            title = f"{metric.title[:1].upper()}{metric.title[1:]}"
            alt = f"{title}: {_first_to_last(y)} over {len(x)} iterations."
            line = Line(x, y, "train", marks=False)
            figures.append((title, metric.note, line_figure([line], alt, from_zero=metric.from_zero)))
    return figures


def _phase_totals(run: Run) -> dict[str, float]:
    """Seconds of each phase over the run, in the order of the iteration with the most phases."""
    rows = [row.get("seconds") or {} for row in run.rows]
    ordered = [phase for seconds in sorted(rows, key=len, reverse=True) for phase in seconds if phase != "total"]
    return {phase: sum(seconds.get(phase, 0.0) for seconds in rows) for phase in dict.fromkeys(ordered)}


def _time(run: Run) -> dict[str, Any] | None:
    totals = _phase_totals(run)
    if not totals:
        return None
    whole = sum(totals.values())
    parts = {phase: [(row.get("seconds") or {}).get(phase, 0.0) for row in run.rows] for phase in totals}
    listed = ", ".join(f"{phase} {duration(seconds)} in all" for phase, seconds in totals.items())
    rows = [
        (phase, PHASES[index % len(PHASES)], seconds, f"{100 * seconds / whole:.0f} %" if whole else "–")
        for index, (phase, seconds) in enumerate(totals.items())
    ]
    svg = bar_figure([row["iteration"] for row in run.rows], parts, f"Seconds of each iteration by phase: {listed}.")
    return {"svg": svg, "rows": rows, "total": whole}


def _memory(run: Run) -> Panel | None:
    x, y = run.series("memory_mb")
    if not x:
        return None
    alt = f"Peak memory so far: {_first_to_last(y)} MB."
    svg = line_figure([Line(x, y, "train", marks=False)], alt, from_zero=True)
    return "Memory", f"Peak so far, MB; {_megabytes(_peak_memory(run))} in all.", svg


def _peak_memory(run: Run) -> float:
    return float(run.summary.get("peak_memory_mb") or max(run.series("memory_mb")[1], default=0.0))


def _environment(run: Run) -> list[tuple[str, str]]:
    """Versions, machine and dates, as far as the summary has them."""
    rows = [(key, str(run.summary[key])) for key in ("started", "finished") if run.summary.get(key)]
    for section in ("versions", "machine"):
        rows += [(key, str(value)) for key, value in (run.summary.get(section) or {}).items() if value is not None]
    return rows


def _first_to_last(values: Any) -> str:
    return f"from {_number(values[0])} to {_number(values[-1])}" if len(values) > 1 else _number(values[0])


def _megabytes(value: float) -> str:
    return f"{value / 1024:.1f} GB" if value >= 1024 else f"{value:.0f} MB"


def _number(value: Any) -> str:
    if isinstance(value, int | float) and math.isfinite(value):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, list):  # eta by step
        return eta_text(value)
    return "?" if value is None else str(value)

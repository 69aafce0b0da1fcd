"""report.html: one self-contained page with the results of a run and their intervals."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.config.algorithm import algorithm
from etude.learning.metrics import metrics_of
from etude.measuring.statistics import format_interval
from etude.rewards import WEIGHTED_SUM
from etude.runs.reader import Interval, Run, read_run
from etude.sampling.etas import eta_text, setting_text

if TYPE_CHECKING:
    from etude.report.figures import Line

GRID_TITLES = {
    "before_ode": ("Before, ODE", "ODE sampler, base model"),
    "after_ode": ("After, ODE", "ODE sampler, tuned model"),
    "before_sde": ("Before, SDE", "SDE sampler, base model"),
    "after_sde": ("After, SDE", "SDE sampler, tuned model"),
}


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run's directory, atomically, and returns its path.

    The page refers to nothing outside itself. It needs `config.yaml`. If metrics, evaluations,
    grids or the summary are missing, it says so in their place, so that a run can be viewed while
    it goes on.

    Args:
        run_dir: directory of a run, with `config.yaml`, `metrics.jsonl`, `summary.json` and
            `samples/` as `etude train` writes them.

    Raises:
        EtudeError: the directory is no run, or one of its files is invalid.
    """
    from etude.files import atomic_write_text

    run_dir = Path(run_dir)
    html = render(read_run(run_dir))
    target = run_dir / "report.html"
    atomic_write_text(target, html)
    return target


def render(run: Run) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("etude.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["interval"] = interval
    environment.filters["duration"] = duration
    return environment.get_template("template.html").render(
        run=run,
        title=_title(run),
        facts=_facts(run),
        headlines=_headlines(run),
        basis=_basis(run),
        table=_table(run),
        curves=[(reward, reward in {*run.trained, WEIGHTED_SUM}, _curves(run, reward)) for reward in run.rewards],
        window=_window(run),
        grids=_grids(run),
        diagnostics=_diagnostics(run),
        time=_time(run),
        memory=_memory(run),
        environment=_environment(run),
        etas=_etas(run),
    )


def interval(estimate: Interval | None, signed: bool = True) -> str:
    """An estimate as `+1.27 [+1.02, +1.51]`, with real minus signs; a dash for None."""
    if estimate is None:
        return "–"
    return format_interval(estimate["mean"], estimate["low"], estimate["high"], signed).replace("-", "−")


def duration(seconds: float) -> str:
    """A duration as `3 h 20 min`, `4 min 05 s` or `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _title(run: Run) -> str:
    rewards = ", ".join(run.trained) or "a reward"
    return f"{run.setting('model') or 'A model'} tuned on {rewards}"


def _facts(run: Run) -> list[tuple[str, str]]:
    done = max((row["iteration"] for row in run.rows), default=0)
    planned = run.config.get("iterations")
    short = planned and (not run.summary or run.summary.get("stopped"))
    facts = [("iterations", f"{done} of {planned}" if short else f"{done}")]
    if best := run.summary.get("best"):
        facts.append(("best weights", f"iteration {best['iteration']}, by {best['reward']}: {_best_figures(best)}"))
    if "sampling" in run.config:
        facts.append(("algorithm", algorithm(run.config)))
    settings = {
        "kernel": ("kernel", "sampling"),
        "training eta": ("eta", "sampling"),
        "steps": ("num_steps", "sampling"),
        "guidance": ("guidance_scale", "sampling"),
    }
    for label, (key, section) in settings.items():
        if (value := run.setting(key, section)) is not None:
            schedule = key == "eta" and run.setting("eta_schedule", section)
            facts.append((label, setting_text(value, schedule) if schedule else _number(value)))
    facts += [(key, str(run.setting(key))) for key in ("recipe", "seed") if run.setting(key) is not None]
    facts.append(("time", duration(sum(_phase_totals(run).values()))))
    if memory := _peak_memory(run):
        facts.append(("peak memory", _megabytes(memory)))
    return facts


def _best_figures(best: dict[str, Any]) -> str:
    """The ODE mean of the reward that chose the best weights, and its estimate from fresh noise."""
    evaluations = {"": best.get("evaluation"), ", from fresh noise ": best.get("confirmation")}
    means = {words: ((e or {}).get("ode") or {}).get(best["reward"]) for words, e in evaluations.items()}
    return "".join(f"{words}{interval(mean, signed=False)}" for words, mean in means.items() if mean)


def _etas(run: Run) -> list[str]:
    """The eta of the SDE in each evaluation; before the first, the configured one."""
    configured = run.setting("eta", "sampling")
    return [_number(e.get("eta", configured)) for _, e in run.evaluations] or [_number(configured)]


def _headlines(run: Run) -> list[dict[str, Any]]:
    """Improvement and gap of each trained reward, as estimates and in words."""
    if not run.evaluations:
        return []
    final = run.evaluations[-1][1]
    eta = _number(final.get("eta", run.setting("eta", "sampling")))
    sde = f"the SDE at η = {eta} " + ("in every step" if _sampling_window(run) else "that was trained")
    return [
        {
            "reward": reward,
            "improvement": (final.get("improvement") or {}).get(reward),
            "improvement_words": _improvement_words((final.get("improvement") or {}).get(reward)),
            "gap": (final.get("gap") or {}).get(reward),
            "gap_words": _gap_words((final.get("gap") or {}).get(reward), sde),
        }
        for reward in run.trained
        if reward in (final.get("ode") or {})
    ]


def _improvement_words(estimate: Interval | None) -> str:
    if estimate is None:
        return "Not measured."
    if estimate["low"] > 0:
        return "Tuning raised the reward of the images that the ODE sampler makes: the whole interval lies above 0."
    if estimate["high"] < 0:
        return "Tuning lowered the reward of the images that the ODE sampler makes: the whole interval lies below 0."
    return "No improvement is shown: the interval contains 0."


def _gap_words(estimate: Interval | None, sde: str) -> str:
    if estimate is None:
        return "Not measured."
    if estimate["low"] > 0:
        return f"The ODE sampler, which you ship, scores higher than {sde}."
    if estimate["high"] < 0:
        return f"The ODE sampler scores lower than {sde}: part of the gain stays behind."
    return f"The ODE sampler and {sde} cannot be told apart: the interval contains 0."


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
    (first_at, first), (_, final) = run.evaluations[0], run.evaluations[-1]
    before = first if first_at == 0 else {}
    held_out = set(
        run.summary.get("held_out_rewards") or (run.config.get("evaluation") or {}).get("held_out_rewards") or []
    )
    roles = (
        dict.fromkeys(held_out, "held out") | dict.fromkeys(run.trained, "trained") | {WEIGHTED_SUM: "of the trained"}
    )
    columns = [("before", before, "ode"), ("ode", final, "ode"), ("sde", final, "sde")]
    columns += [("improvement", final, "improvement"), ("gap", final, "gap")]
    return [
        {
            "reward": reward,
            "role": roles.get(reward, "measured"),
            **{column: (source.get(quantity) or {}).get(reward) for column, source, quantity in columns},
        }
        for reward in run.rewards
        if reward in (final.get("ode") or {})
    ]


def _curves(run: Run, reward: str) -> list[tuple[str, str, str]]:
    """(title, explanation, svg) of one reward's figures."""
    from etude.report.figures import Line, line_figure

    figures = []
    x, mean = run.series("reward", reward, "mean")
    if x:
        _, std = run.series("reward", reward, "std")
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=False)] for sign in (-1, 1))
        banded = len(std) == len(mean)
        line = Line(x, mean, "train", low=low if banded else None, high=high if banded else None, marks=False)
        alt = f"Training reward {reward}: {_first_to_last(mean)} over {len(x)} iterations."
        sampler = "Samples with noise in the window's steps" if _sampling_window(run) else "SDE samples"
        note = f"{sampler}, training prompts: mean" + (" and one standard deviation." if banded else ".")
        figures.append(("While training", note, line_figure([line], alt)))
    ode, sde = run.intervals("ode", reward), run.intervals("sde", reward)
    if ode:
        eta = _number(run.evaluations[-1][1].get("eta"))
        lines = [_interval_line(ode, "ode", "ODE")] + ([_interval_line(sde, "sde", f"SDE, η = {eta}")] if sde else [])
        alt = f"Reward {reward} on {_prompts(run)}: ODE {_first_to_last(lines[0].y)}"
        alt += f", SDE {_first_to_last(lines[1].y)}." if sde else "."
        figures.append(
            (f"On {_prompts(run)}", "Both samplers from the same noise, with 95 % intervals.", line_figure(lines, alt))
        )
    for quantity, colour, title, note in (
        ("gap", "gap", "Reward gap", "ODE minus SDE, same weights. Above 0: the ODE scores higher."),
        ("improvement", "gain", "Improvement", "ODE of the tuned minus ODE of the base model."),
    ):
        if points := run.intervals(quantity, reward):
            line = _interval_line(points, colour)
            alt = f"{title} of {reward}: {_first_to_last(line.y)}; last {interval(points[-1][1])}."
            figures.append((title, note, line_figure([line], alt, zero=True)))
    return figures


def _interval_line(points: list[tuple[int, Interval]], colour: str, label: str = "") -> Line:
    from etude.report.figures import Line

    x = [iteration for iteration, _ in points]
    mean, low, high = ([estimate[key] for _, estimate in points] for key in ("mean", "low", "high"))
    return Line(x, mean, colour, label, low, high)


def _window(run: Run) -> list[tuple[str, str, str]]:
    """(title, explanation, svg) of the window's figures; empty for a run without a window."""
    from etude.report.figures import visits_figure, window_figure

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
    counts = ", ".join(f"step {step} {count}" for step, count in enumerate(visits) if count)
    return [
        (
            "Where the window was",
            f"These steps of {num_steps} were sampled with noise and trained; {rest}. Step 0 starts from noise.",
            window_figure(x, first, size, num_steps, alt),
        ),
        (
            "How often each step was trained",
            f"Iterations whose window held the step, of {len(x)}.",
            visits_figure(visits, f"Iterations in which each step was in the window: {counts}."),
        ),
    ]


def _grids(run: Run) -> list[tuple[str, str, str]]:
    """(title, alternative text, data URI) of the grids that exist."""
    shown = f"{len(run.prompts)} images: " + "; ".join(map(str, run.prompts)) if run.prompts else "grid of images"
    return [
        (
            GRID_TITLES[name][0],
            f"{GRID_TITLES[name][1]}, {shown}",
            f"data:image/png;base64,{base64.b64encode(png).decode()}",
        )
        for name, png in run.grids.items()
    ]


def _diagnostics(run: Run) -> list[tuple[str, str, str]]:
    from etude.report.figures import Line, line_figure

    figures = []
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
    from etude.report.figures import PHASES, bar_figure

    totals = _phase_totals(run)
    if not totals:
        return None
    whole = sum(totals.values())
    x = [row["iteration"] for row in run.rows]
    parts = {phase: [(row.get("seconds") or {}).get(phase, 0.0) for row in run.rows] for phase in totals}
    alt = (
        "Seconds of each iteration by phase: " + ", ".join(f"{p} {duration(s)} in all" for p, s in totals.items()) + "."
    )
    rows = [
        (phase, PHASES[index % len(PHASES)], seconds, f"{100 * seconds / whole:.0f} %" if whole else "–")
        for index, (phase, seconds) in enumerate(totals.items())
    ]
    return {"svg": bar_figure(x, parts, alt), "rows": rows, "total": whole}


def _memory(run: Run) -> tuple[str, str] | None:
    """The figure of the peak memory so far, and the peak in words; None without data."""
    from etude.report.figures import Line, line_figure

    x, y = run.series("memory_mb")
    if not x:
        return None
    peak = _megabytes(_peak_memory(run))
    svg = line_figure(
        [Line(x, y, "train", marks=False)], f"Peak memory so far: {_first_to_last(y)} MB.", from_zero=True
    )
    return svg, peak


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

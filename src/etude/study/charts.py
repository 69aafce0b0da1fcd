"""The figures of a study, as inline SVG in the colours of the page."""

from __future__ import annotations

import math
from typing import Any

from etude.report.figures import LEVELS, Line, line_figure
from etude.report.page import Panel, interval
from etude.study.labels import training_label
from etude.study.tables import final

Row = dict[str, Any]
SMALL = (3.3, 2.3)


def families(analysis: Row) -> list[tuple[str, str, list[Row]]]:
    """Group conditions that differ in kernel and eta alone: (label, reward, conditions)."""
    groups: dict[str, tuple[str, str, list[Row]]] = {}
    for c in analysis["conditions"]:
        rest = {k: v for k, v in c["values"].items() if not k.startswith(("sampling.eta", "sampling.kernel"))}
        for reward in c["trained"]:
            parts = [p for p in c["label"].split(", ") if not p.startswith("η = ") and p != c["kernel"]]
            label = ", ".join(parts) or c["model"]
            groups.setdefault(f"{rest} {reward}", (label, reward, []))[2].append(c)
    return list(groups.values())


def gap_over_training(members: list[Row], reward: str) -> list[Panel]:
    """The gap over training, one curve for each eta of gDDIM; no figure for fewer than two etas.

    A moving eta is left out: it has another SDE at every point.
    """
    curved = [c for c in _constant(members) if len(c["curves"][reward]["gap"]["iteration"]) > 1]
    if len(curved) < 2:
        return []
    lines = []
    for index, c in enumerate(curved):
        colour = LEVELS[round(index * (len(LEVELS) - 1) / (len(curved) - 1))]  # evenly spaced, from first to last
        gap = c["curves"][reward]["gap"]
        lines.append(Line(gap["iteration"], gap["mean"], colour, _training(c)))
    alt = f"Reward gap in {reward} over training: {'; '.join(map(_course, lines))}."
    svg = line_figure(lines, alt, zero=True, size=SMALL)
    return [("Reward gap over training", "ODE minus SDE at the training η, mean of the seeds.", svg)]


def trend_of_gap(family: Row) -> list[Panel]:
    """The slope of the gap against the training eta, and the gap of each eta with its band over seeds."""
    drawn = [row for row in family["rows"] if row["band"] and row["band"]["low"] is not None]
    panels = []
    slopes = [(row["eta"], row["slopes"][0]) for row in drawn if row["slopes"]]
    if len(slopes) > 1:
        said = "; ".join(f"{eta:g}: {interval(slope)}" for eta, slope in slopes)
        alt = f"Slope of the gap in {family['reward']} by training eta: {said}."
        line = Line.of(slopes, "gap")
        svg = line_figure([line], alt, zero=True, size=SMALL, xlabel="training η", integers=False)
        panels.append(
            ("Slope of the gap against training η", "In 100 iterations, with 95 % intervals over seeds.", svg)
        )
    values = [v for row in drawn for key in ("low", "high") for v in row["band"][key]]
    for row in drawn:
        band = row["band"]
        line = Line(row["iteration"], band["mean"], "gap", "", band["low"], band["high"])
        alt = f"Gap in {family['reward']} over training at eta {row['eta']:g}, {_course(line).strip()}."
        svg = line_figure([line], alt, zero=True, limits=(min(values), max(values)), size=SMALL)
        panels.append((f"Gap over training, η = {row['eta']:g}", "Mean and 95 % band over seeds.", svg))
    return panels


def reward_over_training(members: list[Row], reward: str) -> list[Panel]:
    """The ODE and the SDE reward over training, one small figure for each eta, all on one scale."""
    curved = [c for c in _by_eta(members) if len(c["curves"][reward]["ode"]["iteration"]) > 1]
    values = [v for c in curved for q in ("ode", "sde") for key in ("low", "high") for v in c["curves"][reward][q][key]]
    panels = []
    for c in curved:
        lines = [
            Line(v["iteration"], v["mean"], colour, label, v["low"], v["high"])
            for colour, label in (("ode", "ODE"), ("sde", "SDE"))
            for v in [c["curves"][reward][colour]]
            if v["iteration"]
        ]
        alt = f"{_training(c)}: {', '.join(map(_course, lines))}."
        panels.append((_training(c), "", line_figure(lines, alt, limits=(min(values), max(values)), size=SMALL)))
    return panels


def reward_against_eta(members: list[Row], reward: str) -> list[Panel]:
    """The final reward against the training eta, and the improvement on the base model.

    The improvement is paired, so its intervals are narrower.
    """
    points = [(c["eta"], final(c, reward)) for c in _constant(members)]
    if len(points) < 2:
        return []
    base = points[0][1]["base"]["mean"]
    panels = []
    for title, ode, sde, dashed, more in (
        ("Final reward", "ode", "sde", base, "Dashed: the ODE of the base model."),
        ("Improvement", "improvement", "sde_improvement", 0.0, "Paired with the same sampler of the base model."),
    ):
        lines = [
            Line.of([(eta, estimates[quantity]) for eta, estimates in points], colour, label)
            for quantity, colour, label in ((ode, "ode", "ODE"), (sde, "sde", "SDE"))
            if all(estimates[quantity] for _, estimates in points)
        ]
        said = "; ".join(f"{eta:g}: ODE {interval(estimates[ode], False)}" for eta, estimates in points)
        alt = f"{title} in {reward} by training eta: {said}."
        svg = line_figure(lines, alt, dashed=dashed, size=SMALL, xlabel="training η", integers=False)
        note = f"After training, with 95 % intervals over seeds and prompts. {more}"
        panels.append((f"{title} against training η", note, svg))
    return panels


def gap_against_steps(analysis: Row, reward: str) -> Panel | None:
    """The gap of the base and of the tuned model against the number of steps.

    Only etas that were run at several numbers of steps are shown; None where there are none.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for c in analysis["conditions"]:
        if reward in c["trained"] and c["eta"] is not None and final(c, reward)["gap"]:
            groups.setdefault((c["kernel"], c["eta_text"]), []).append(c)
    several = [(eta, cs) for (_, eta), cs in groups.items() if len({c["steps"] for c in cs}) > 1]
    if not several:
        return None
    lines = []
    for index, (eta, cs) in enumerate(several):
        suffix = f", η = {eta}" if len(several) > 1 else ""
        for key, colour, label in (("gap", "gap", "tuned"), ("base_gap", "train", "base")):
            points = [(c["steps"], final(c, reward)[key]) for c in sorted(cs, key=lambda c: c["steps"])]
            lines.append(Line.of(points, colour if len(several) == 1 else LEVELS[index % 8], label + suffix))
    alt = f"Gap in {reward} against steps: " + "; ".join(f"{line.label} {', '.join(map(_g, line.y))}" for line in lines)
    svg = line_figure(lines, f"{alt}.", zero=True, size=SMALL, xlabel="denoising steps")
    return "Gap against steps", "ODE minus SDE, with 95 % intervals; the base model's is there before training.", svg


def shade(table: Row) -> list[list[float]]:
    """The shade of each cell of a sampler matrix: 0 for the lowest mean, 1 for the highest."""
    means = [cell["mean"] for row in table["rows"] for cell in row["cells"] if cell]
    low, span = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return [[(cell["mean"] - low) / span if cell and span else 0.0 for cell in row["cells"]] for row in table["rows"]]


def _by_eta(members: list[Row]) -> list[Row]:
    """Sort conditions by eta: gDDIM first, and conditions without a single eta last."""
    return sorted(members, key=lambda c: (c["kernel"] != "gddim", math.inf if c["eta"] is None else c["eta"]))


def _constant(members: list[Row]) -> list[Row]:
    """The conditions with gDDIM at one eta, by eta."""
    return [c for c in _by_eta(members) if c["eta"] is not None and c["kernel"] == "gddim"]


def _training(condition: Row) -> str:
    return training_label(condition["kernel"], condition["eta_text"])


def _course(line: Line) -> str:
    return f"{line.label} from {_g(line.y[0])} to {_g(line.y[-1])}"


def _g(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")

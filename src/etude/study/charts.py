"""The figures of a study, as inline SVG in the colours of the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from etude.report.figures import COLOURS, LEVELS, Line, draw_line, figure
from etude.study.labels import training_label
from etude.study.tables import estimate, final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
Panel = tuple[str, str, str]
SMALL = (3.3, 2.3)


def families(analysis: Row) -> list[tuple[str, str, list[Row]]]:
    """Group conditions that differ in kernel and eta alone: (label, reward, conditions)."""
    groups: dict[str, tuple[str, str, list[Row]]] = {}
    for c in analysis["conditions"]:
        rest = {
            key: value for key, value in c["values"].items() if not key.startswith(("sampling.eta", "sampling.kernel"))
        }
        for reward in c["trained"]:
            groups.setdefault(f"{rest} {reward}", (family_label(c), reward, []))[2].append(c)
    return list(groups.values())


def family_label(condition: Row) -> str:
    """The label of a condition, without its sampler."""
    parts = [p for p in condition["label"].split(", ") if not p.startswith("η = ") and p != condition["kernel"]]
    return ", ".join(parts) or condition["model"]


def gap_over_training(members: list[Row], reward: str) -> Panel | None:
    """The gap over training, one curve for each eta of gDDIM; None for fewer than two etas.

    A moving eta is left out: it has another SDE at every point.
    """
    curved = [c for c in _constant(members) if len(c["curves"][reward]["gap"]["iteration"]) > 1]
    if len(curved) < 2:
        return None
    lines = [
        Line(
            c["curves"][reward]["gap"]["iteration"],
            c["curves"][reward]["gap"]["mean"],
            _colour(i, curved),
            _training(c),
        )
        for i, c in enumerate(curved)
    ]
    said = "; ".join(
        f"{_training(c)} from {_g(line.y[0])} to {_g(line.y[-1])}" for c, line in zip(curved, lines, strict=True)
    )
    svg = figure(_lines(lines, zero=True), f"Reward gap in {reward} over training: {said}.", size=SMALL)
    return "Reward gap over training", "ODE minus SDE at the training η, mean of the seeds.", svg


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
        alt = f"{_training(c)}: " + ", ".join(
            f"{line.label} from {_g(line.y[0])} to {_g(line.y[-1])}" for line in lines
        )
        svg = figure(_lines(lines, limits=(min(values), max(values))), f"{alt}.", size=SMALL)
        panels.append((_training(c), "", svg))
    return panels


def reward_against_eta(members: list[Row], reward: str) -> list[Panel]:
    """The final reward against the training eta, and the improvement on the base model.

    The improvement is paired, so its intervals are narrower.
    """
    points = _constant(members)
    if len(points) < 2:
        return []
    estimates = [final(c, reward) for c in points]
    base = estimates[0]["base"]["mean"]
    note = "After training, with 95 % intervals over seeds and prompts."
    return [
        (
            f"{title} against training η",
            f"{note} {more}",
            _against_eta([c["eta"] for c in points], estimates, quantities, zero, f"{title} in {reward}"),
        )
        for title, quantities, zero, more in (
            ("Final reward", ("ode", "sde"), base, "Dashed: the ODE of the base model."),
            ("Improvement", ("improvement", "sde_improvement"), 0.0, "Paired with the same sampler of the base model."),
        )
    ]


def _against_eta(x: list[float], estimates: list[Row], quantities: tuple[str, str], dashed: float, title: str) -> str:
    lines = []
    for quantity, colour, label in zip(quantities, ("ode", "sde"), ("ODE", "SDE"), strict=True):
        if all(e[quantity] for e in estimates):
            mean, low, high = ([e[quantity][key] for e in estimates] for key in ("mean", "low", "high"))
            lines.append(Line(x, mean, colour, label, low, high))

    def draw(axes: Axes) -> None:
        _lines(lines)(axes)
        axes.axhline(dashed, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))

    said = "; ".join(f"{e:g}: ODE {estimate(f[quantities[0]])}" for e, f in zip(x, estimates, strict=True))
    return figure(draw, f"{title} by training eta: {said}.", size=SMALL, xlabel="training η", integers=False)


def gap_against_steps(analysis: Row, reward: str) -> Panel | None:
    """The gap of the base and of the tuned model against the number of steps.

    Only etas that were run at several numbers of steps are shown; None where there are none.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for c in analysis["conditions"]:
        if reward in c["trained"] and c["eta"] is not None and final(c, reward)["gap"]:
            groups.setdefault((c["kernel"], c["eta_text"]), []).append(c)
    several = {
        key: sorted(cs, key=lambda c: c["steps"]) for key, cs in groups.items() if len({c["steps"] for c in cs}) > 1
    }
    if not several:
        return None
    lines = []
    for index, ((_, eta), cs) in enumerate(several.items()):
        suffix = f", η = {eta}" if len(several) > 1 else ""
        steps = [c["steps"] for c in cs]
        for key, colour, label in (("gap", "gap", "tuned"), ("base_gap", "train", "base")):
            mean, low, high = ([final(c, reward)[key][end] for c in cs] for end in ("mean", "low", "high"))
            lines.append(
                Line(steps, mean, colour if len(several) == 1 else LEVELS[index % 8], label + suffix, low, high)
            )
    alt = f"Gap in {reward} against steps: " + "; ".join(f"{line.label} {', '.join(map(_g, line.y))}" for line in lines)
    svg = figure(_lines(lines, zero=True), f"{alt}.", size=SMALL, xlabel="denoising steps")
    return "Gap against steps", "ODE minus SDE, with 95 % intervals; the base model's is there before training.", svg


def shade(table: Row) -> list[list[float]]:
    """The shade of each cell of a sampler matrix: 0 for the lowest mean, 1 for the highest."""
    means = [cell["mean"] for row in table["rows"] for cell in row["cells"] if cell]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return [
        [0.0 if not cell or high == low else (cell["mean"] - low) / (high - low) for cell in row["cells"]]
        for row in table["rows"]
    ]


def _lines(lines: list[Line], zero: bool = False, limits: tuple[float, float] | None = None) -> Any:
    def draw(axes: Axes) -> None:
        if zero:
            axes.axhline(0, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
        for line in lines:
            draw_line(axes, line)
        if limits is not None and limits[1] > limits[0]:
            margin = 0.05 * (limits[1] - limits[0])
            axes.set_ylim(limits[0] - margin, limits[1] + margin)
        if any(line.label for line in lines):
            columns = min(len(lines), 3 if max(len(line.label) for line in lines) <= 10 else 1)
            axes.legend(
                loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=columns, borderaxespad=0, handlelength=1.2,
                columnspacing=1.2,
            )  # fmt: skip

    return draw


def _by_eta(members: list[Row]) -> list[Row]:
    """Sort conditions by eta: gDDIM first, and conditions without a single eta last."""
    return sorted(members, key=lambda c: (c["kernel"] != "gddim", math.inf if c["eta"] is None else c["eta"]))


def _constant(members: list[Row]) -> list[Row]:
    """The conditions with gDDIM at one eta, by eta."""
    return [c for c in _by_eta(members) if c["eta"] is not None and c["kernel"] == "gddim"]


def _training(condition: Row) -> str:
    return training_label(condition["kernel"], condition["eta_text"])


def _colour(index: int, members: list[Row]) -> str:
    """The colour of a member, evenly spaced from the first to the last level."""
    return LEVELS[round(index * (len(LEVELS) - 1) / max(1, len(members) - 1))]


def _g(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")

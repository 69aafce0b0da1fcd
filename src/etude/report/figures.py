"""Figures as inline SVG. Colours are CSS variables, for light and dark pages alike.

Text in the figures is fixed wording and numbers. Reward names and prompts stay in the escaped HTML
around the figures.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib needs a colour, CSS a variable: each variable has a placeholder colour, replaced in the SVG.
PHASES = [f"phase-{letter}" for letter in "abcde"]
LEVELS = [f"level-{letter}" for letter in "abcdefgh"]
"""Colours of values in order, from low to high."""
_VARIABLES = ("ink", "muted", "rule", "ode", "sde", "train", "gain", "gap", *PHASES, *LEVELS)
COLOURS = {name: f"#0a0b{index:02x}" for index, name in enumerate(_VARIABLES, start=1)}
Span = tuple[float, float]
SIZE = (4.6, 2.55)  # inches of 72 points; the width is that of a column of the page
LOW = (4.6, 1.8)
_DASHED: Any = {"color": COLOURS["muted"], "linewidth": 1, "linestyle": (0, (4, 3))}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "etude",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "ytick.major.size": 0,
    "text.color": COLOURS["ink"],
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), COLOURS["rule"]),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), COLOURS["muted"]),
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8.5),
}


@dataclass(frozen=True)
class Line:
    """A curve in a colour of `COLOURS`, with a band from `low` to `high` and marked points."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    label: str = ""
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marks: bool = True

    @classmethod
    def of(cls, points: Sequence[tuple[float, Mapping[str, Any]]], colour: str, label: str = "") -> Line:
        """The curve through (x, estimate) pairs, with the intervals as its band."""
        mean, low, high = ([estimate[key] for _, estimate in points] for key in ("mean", "low", "high"))
        return cls([x for x, _ in points], mean, colour, label, low, high)


def line_figure(
    lines: Sequence[Line],
    alt: str,
    *,
    zero: bool = False,
    from_zero: bool = False,
    dashed: float | None = None,
    limits: Span | None = None,
    size: Span = SIZE,
    **axis: Any,
) -> str:
    """A figure of curves, over iterations unless `axis` says otherwise (`figure`).

    Args:
        zero: draw a horizontal line at 0, below the curves.
        from_zero: start the vertical axis at 0.
        dashed: height of a horizontal line above the curves. Default: no line.
        limits: values that the vertical axis spans, with a margin. Default: those of the curves.
    """

    def draw(axes: Axes) -> None:
        if zero:
            axes.axhline(0, **_DASHED)
        for line in lines:
            draw_line(axes, line)
        if from_zero:
            top = max((value for line in lines for value in line.y if math.isfinite(value)), default=0)
            axes.set_ylim(*((0, 1.08 * top) if top > 0 else (-0.02, 1)))
        if limits is not None and limits[1] > limits[0]:
            margin = 0.05 * (limits[1] - limits[0])
            axes.set_ylim(limits[0] - margin, limits[1] + margin)
        if any(line.label for line in lines):
            columns, spacing = len(lines), {"handlelength": 1.4}
            if size != SIZE:  # a small figure
                columns = min(columns, 3 if max(len(line.label) for line in lines) <= 10 else 1)
                spacing = {"handlelength": 1.2, "columnspacing": 1.2}
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=columns, borderaxespad=0, **spacing)
        if dashed is not None:
            axes.axhline(dashed, **_DASHED)

    return figure(draw, alt, size, **axis)


def window_figure(x: Sequence[int], starts: Sequence[int], sizes: Sequence[int], num_steps: int, alt: str) -> str:
    """A figure of the window [start, start + size) of each iteration: a band over steps 0..N-1."""

    def draw(axes: Axes) -> None:
        # Each step and each iteration is 1 wide and centred on its number, first and last too.
        low = [start - 0.5 for start in starts]
        high = [edge + size for edge, size in zip(low, sizes, strict=True)]
        edges = [x[0] - 0.5, *x, x[-1] + 0.5]
        low, high = ([values[0], *values, values[-1]] for values in (low, high))
        axes.fill_between(edges, low, high, step="mid", color=COLOURS["train"], alpha=0.75, linewidth=0)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(-0.5, num_steps - 0.5)
        axes.set_ylabel("step")

    return figure(draw, alt, size=LOW, whole=True)


def visits_figure(visits: Sequence[int], alt: str) -> str:
    """A figure of how often each of the steps 0..N-1 was trained, as bars."""

    def draw(axes: Axes) -> None:
        axes.bar(range(len(visits)), visits, width=0.8, color=COLOURS["train"], alpha=0.75)
        axes.set_xlim(-0.5, len(visits) - 0.5)
        axes.set_ylabel("iterations")

    return figure(draw, alt, size=LOW, xlabel="step", whole=True)


def bar_figure(x: Sequence[float], parts: Mapping[str, Sequence[float]], alt: str) -> str:
    """A figure of bars over iterations: `parts`, stacked in order in the colours `PHASES`."""

    def draw(axes: Axes) -> None:
        bottom = [0.0] * len(x)
        for colour, heights in zip(itertools.cycle(PHASES), parts.values(), strict=False):
            axes.bar(x, heights, width=0.8, bottom=bottom, color=COLOURS[colour])
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]

    return figure(draw, alt)


def draw_line(axes: Axes, line: Line) -> None:
    colour = COLOURS[line.colour]
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.2} if line.marks or len(line.x) == 1 else {}
    if line.low is not None and line.high is not None:
        if len(line.x) == 1:  # a band of no width would be invisible
            axes.vlines(line.x, line.low, line.high, color=colour, alpha=0.4, linewidth=3)
        else:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.17, linewidth=0)
    axes.plot(line.x, line.y, color=colour, label=line.label or None, **marker)


def figure(
    draw: Any, alt: str, size: Span = SIZE, xlabel: str = "iteration", whole: bool = False, integers: bool = True
) -> str:
    """An inline figure of all that `draw` draws on its axes, of a `size` in inches.

    `integers` labels the horizontal axis with integers, `whole` the vertical one.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_STYLE):
        sheet = Figure(figsize=size, layout="constrained")
        axes = sheet.add_subplot()
        draw(axes)
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=integers))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=whole))
        return _inline(sheet, alt)


def _inline(figure: Figure, alt: str) -> str:
    """The figure as an `<svg>` element without prologue, metadata and fonts, with unique ids."""
    from markupsafe import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]+;?", "", svg)
    prefix = f"f{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    head, _, body = svg.partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(alt)}">{body}'


def standalone(svg: str) -> str:
    """An inline figure as the text of an SVG file, with the page's colours, light and dark."""
    css = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    colours = css[: css.index("* {")]
    style = f"{colours}svg {{ background: var(--card); font-family: system-ui, sans-serif; }}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head, _, body = svg.partition(">")
    return f"{head.replace('<svg', f'<svg {spaces}', 1)}><style>{style}</style>{body}\n"

"""The figures of `etude theory`, drawn from its report; matplotlib is imported by the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from etude.errors import EtudeError

COLOURS = ("#3b5bdb", "#e8590c", "#2b8a3e", "#9c36b5", "#c92a2a", "#0b7285")
STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e9ecef",
    "axes.axisbelow": True,
    "font.size": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "etude",
    "svg.fonttype": "none",
}
FORMATS = ("png", "svg")


Figures: TypeAlias = dict[str, tuple[Callable[[list[Any], dict[str, Any]], None], int]]
"""Names of figures, what draws each, and its number of panels."""


def draw(report: dict[str, Any], directory: Path, extension: str = "png", figures: Figures | None = None) -> list[Path]:
    """Write every figure of the report into `directory`; return their paths. Default: `FIGURES`."""
    if extension not in FORMATS:
        raise EtudeError(f"figures cannot be written as '{extension}': choose png or svg.")
    import matplotlib
    from matplotlib.figure import Figure

    written = []
    with matplotlib.rc_context(STYLE):
        for name, (plot, panels) in (FIGURES if figures is None else figures).items():
            figure = Figure(figsize=(8.4 if panels == 2 or name == "gap-split" else 5.2, 3.2), layout="constrained")
            axes = figure.subplots(1, panels, squeeze=False)[0]
            plot(list(axes), report)
            path = directory / f"{name}.{extension}"
            figure.savefig(path, dpi=150, metadata={"Date": None} if extension == "svg" else None)
            written.append(path)
    return written


def _coloured(*lists: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Go through lists of one length side by side, each entry after a colour of its own."""
    rows = list(zip(*lists, strict=True))
    colours: Iterable[Any] = COLOURS
    if len(rows) > len(COLOURS):
        import matplotlib

        colours = (matplotlib.colormaps["turbo"](k / (len(rows) - 1)) for k in range(len(rows)))
    for colour, row in zip(colours, rows, strict=False):
        yield colour, *row


def _horizon(axes: list[Any], report: dict[str, Any]) -> None:
    exact = ", exact score" if any(report["settings"][name] for name in ("bias", "gain", "white")) else ""
    for ax, (name, section) in zip(axes, report["horizon"].items(), strict=True):
        for colour, row in _coloured(section["etas"]):
            ax.plot(section["T"], _size(row["gap"]), color=colour, label=f"eta {row['eta']:g}")
            if row.get("constant"):
                ax.plot(section["T"], _size(row["series"]), color=colour, linestyle=":", linewidth=1)
        ax.set(yscale="log", xlabel="T", ylabel="|reward gap|", title=_PATHS[name] + exact)
        sizes = [x for row in section["etas"] for x in _size(row["gap"]) if x == x]
        if sizes:
            ax.set_ylim(0.5 * min(sizes), 2.0 * max(sizes))
        if name == "ve":
            ax.set_xscale("log")
    axes[0].plot([], [], color="#868e96", linestyle=":", label="asymptotic series")
    axes[0].legend()


def _steps(axes: list[Any], report: dict[str, Any]) -> None:
    (ax,), section = axes, report["steps"]
    limits = section["limit"] or [None] * len(section["etas"])
    for colour, eta, gap, limit in _coloured(section["etas"], section["gap"], limits):
        ax.plot(section["steps"], _with_holes(gap), color=colour, marker=".", label=f"eta {eta:g}")
        if limit is not None:
            ax.axhline(limit, color=colour, linestyle=":", linewidth=1)
    dotted = " (dotted: N → ∞)" if section["limit"] else ""
    ax.set(xscale="log", xlabel="steps N", ylabel="reward gap", title=report["settings"]["schedule"] + dotted)
    ax.legend()


def _split(axes: list[Any], report: dict[str, Any]) -> None:
    (ax,), rows = axes, report["split"]
    parts = dict(zip(("prior", "discretisation", "score_error", "interaction"), COLOURS, strict=False))
    if not any(row["score_error"] for row in rows):
        del parts["score_error"]
    width = 0.8 / len(parts)
    for k, (part, colour) in enumerate(parts.items()):
        places = [i + (k - 0.5 * (len(parts) - 1)) * width for i in range(len(rows))]
        ax.bar(places, [row[part] for row in rows], width, color=colour, label=part.replace("_", " "))
    ax.scatter(range(len(rows)), [row["total"] for row in rows], color="#212529", marker="_", s=200, label="total")
    ax.set_xticks(range(len(rows)), [f"N {row['steps']}\neta {row['eta']:g}" for row in rows], fontsize=7)
    ax.axhline(0.0, color="#868e96", linewidth=0.8)
    ax.set(ylabel="reward gap", title="What the gap is made of")
    ax.legend()


def _bounds(axes: list[Any], report: dict[str, Any]) -> None:
    for ax, name in zip(axes, ("ve", "vp"), strict=True):
        section = report["bounds"][name]
        ax.plot(section["T"], section["gap"], color="#212529", linewidth=2, label="|gap|")
        for colour, label, values in _coloured(section["bounds"], section["bounds"].values()):
            ax.plot(section["T"], _with_holes(values), color=colour, lw=1, label=label)
        ax.set(yscale="log", xlabel="T", title=f"{_PATHS[name]}, eta {report['bounds']['eta']:g}")
        if name == "ve":
            ax.set_xscale("log")
    axes[0].set_ylabel("|reward gap| and its bounds")
    axes[0].legend(fontsize=7)


def _eta(axes: list[Any], report: dict[str, Any]) -> None:
    (ax,) = axes
    for colour, row in _coloured(report["eta"]):
        ax.plot(row["etas"], row["errors"], color=colour, label=f"N {row['steps']}: best eta {row['eta']:.2f}")
        ax.plot(row["eta"], row["error"], "o", color=colour)
        ax.plot(row["etas"], row["discretisation"], color=colour, linestyle=":", linewidth=1)
    first = report["eta"][0]
    ax.plot(first["etas"], first["prior"], color="#868e96", linestyle="--", linewidth=1, label="start alone")
    ax.plot([], [], color="#868e96", linestyle=":", linewidth=1, label="steps alone")
    ax.set(xlabel="eta", ylabel="W2 to the target", title="Which eta")
    ax.legend()


def _training(axes: list[Any], report: dict[str, Any]) -> None:
    gap, relative = axes
    shown = slice(report["updates"] // 20, None)  # the first rises are near 0
    for colour, row in _coloured(report["etas"]):
        gap.plot(row["gap"], color=colour, label=f"eta {row['eta']:g}")
        updates = range(report["updates"] + 1)
        relative.plot(updates[shown], _with_holes(row["relative"])[shown], color=colour)
        if row["limit"] is not None:
            gap.axhline(row["limit"], color=colour, linestyle=":", linewidth=1)
    dotted = " (dotted: its limit)" if report["etas"][0]["limit"] is not None else ""
    gap.set(xlabel="updates", ylabel="reward gap", title=f"Reward gap{dotted}")
    relative.set(xlabel="updates", ylabel="gap / rise of the ODE", title="In units of what was learnt")
    for ax in axes:
        ax.axhline(0.0, color="#868e96", linewidth=0.8)
    gap.legend()


def _with_holes(values: list[float | None]) -> list[float]:
    """Turn None into a hole of the curve."""
    return [float("nan") if value is None else value for value in values]


def _size(values: list[float]) -> list[float]:
    return [abs(value) or float("nan") for value in values]


_PATHS = {"ve": "VE, sigma = t", "vp": "VP, beta = 1"}
FIGURES: Figures = {
    "gap-against-horizon": (_horizon, 2),
    "gap-against-steps": (_steps, 1),
    "gap-split": (_split, 1),
    "bounds": (_bounds, 2),
    "recommended-eta": (_eta, 1),
}
TRAINING_FIGURES: Figures = {"gap-along-training": (_training, 2)}

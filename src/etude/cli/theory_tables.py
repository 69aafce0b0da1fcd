"""Tables of `etude theory`: its report as text on the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from etude.terminal import figures_table, make_console

GDDIM_UNIT = ("gddim", "ddim", "euler-maruyama")
"""Kernels whose eta is gDDIM's for short steps."""


def print_report(report: dict[str, Any]) -> None:
    """Print the optimum, the rates, the gap's parts, the bounds and the recommended etas."""
    console = make_console()
    settings, optimum = report["settings"], report["optimum"]
    console.print(
        f"base N({_list(optimum['reference_mean'])}, {_list(optimum['reference_variance'])}), "
        f"tuned p* = N({_list(optimum['mean'])}, {_list(optimum['variance'])}) at beta {settings['beta']:g}\n"
        f"improvement: {optimum['improvement_exact']:.4f} between the laws, {optimum['improvement_ode']:.4f} between their "
        f"ODE samplers ({settings['schedule']}, continuous time{_exact_score(settings)})\n",
        highlight=False,
    )
    for table in (
        _rate_table(report),
        _split_table(report),
        _bound_table(report),
        _general_table(report),
        _eta_table(report),
    ):
        console.print(table)
        console.print()
    if report["mixture_skipped"]:
        console.print(report["mixture_skipped"] + "\n", highlight=False, markup=False)


def print_rows(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = figures_table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    make_console().print(table)


def print_training(report: dict[str, Any]) -> None:
    """Print the gap along training, a row for each eta."""
    columns = ["eta", "slope", "gap before", "widest", "after", "gap at the end", "rise", "gap / rise", "limit"]
    rows = []
    for row in report["etas"]:
        relative, limit = row["relative"][-1], row["limit"]
        cells = [
            f"{row['slope']:+.3g}",
            f"{row['gap'][0]:+.4f}",
            f"{row['gap'][row['widest']]:+.4f}",
            str(row["widest"]),
        ]
        cells += [f"{row['gap'][-1]:+.4f}", f"{row['ode'][-1] - row['ode'][0]:+.4f}"]
        cells += ["-" if value is None else f"{value:+.4f}" for value in (relative, limit)]
        rows.append([f"{row['eta']:g}", *cells])
    print_rows(f"{report['updates']} updates of {report['method']}, beta {report['beta']:g}", columns, rows)


def _exact_score(settings: dict[str, Any]) -> str:
    """Say where the score error of the settings does not enter."""
    return ", exact score" if any(settings[name] for name in ("bias", "gain", "white")) else ""


def _continuous_time(settings: dict[str, Any]) -> str:
    """Describe the score of continuous-time samplers, and the unit of eta where N steps differ."""
    unit = "" if settings["kernel"] in GDDIM_UNIT else ", eta in gDDIM's unit"
    return _exact_score(settings) + unit


def _rate_table(report: dict[str, Any]) -> Table:
    title = f"Continuous time{_continuous_time(report['settings'])}: how the gap closes"
    table = figures_table("path", "eta", "gap at the last T", "gap ≃", "fitted exponent", title=title)
    for name, section in report["horizon"].items():
        for row in section["etas"]:
            law = f"{row['constant']:.4g} {section['variable']}^-{row['exponent']:g}" if row.get("constant") else "0"
            exponent = row.get("fitted_exponent")
            label = f"{name.upper()}, T = {section['T'][-1]:g}"
            fitted = "-" if exponent is None else f"{exponent:.3f}"
            table.add_row(label, f"{row['eta']:g}", f"{row['gap'][-1]:.3e}", law, fitted)
    return table


def _split_table(report: dict[str, Any]) -> Table:
    title = f"N steps of {report['settings']['schedule']}: the gap and its parts"
    table = figures_table(
        "steps", "eta", "gap", "prior", "discretisation", "score error", "interaction", "largest", title=title
    )
    for row in report["split"]:
        parts = [row[name] for name in ("total", "prior", "discretisation", "score_error", "interaction")]
        largest = row["dominant"].replace("_", " ")
        table.add_row(str(row["steps"]), f"{row['eta']:g}", *(f"{x:+.4f}" for x in parts), largest)
    return table


def _bound_table(report: dict[str, Any]) -> Table:
    title = f"Bounds{_continuous_time(report['settings'])}: never below the gap, and how tight"
    table = figures_table("model", "eta", "gap", "best bound", "bound / |gap|", "which", title=title)
    section = report["bounds"]
    for name in ("ve", "vp"):
        curve = section[name]
        last = {key: values[-1] for key, values in curve["bounds"].items() if values[-1] is not None}
        which = min(last, key=lambda key: last[key]) if last else "-"
        label = f"Gaussian, {name.upper()} T = {curve['T'][-1]:g}"
        tightness = _tightness(curve["best"][-1], curve["ratio"][-1])
        table.add_row(label, f"{section['eta']:g}", f"{curve['gap'][-1]:.3e}", *tightness, which)
    for row in report["mixture"]:
        gap = f"{row['gap']:+.4f} ± {row['error']:.0e}"
        tightness = _tightness(row["best"], row["ratio"])
        table.add_row(f"two modes, {row['path']}", f"{row['eta']:g}", gap, *tightness, row["best_name"])
    return table


def _general_table(report: dict[str, Any]) -> Table:
    title = "The general bound of arXiv 2510.10767, Theorem 4.1, for a linear reward of slope 1"
    columns = ("path", "eta", "exists to eta", "gap", "as published", "with the dimension", "bound / gap", "ours / gap")
    table = figures_table(*columns, title=title)
    for row in report["general_bound"]:
        exists = f"{row['largest_eta']:.2f}" if row["largest_eta"] else "none"
        bounds = ("-" if row[key] is None else f"{row[key]:.3e}" for key in ("published", "bound"))
        ratios = (
            "-" if not row["gap"] or row[key] is None else f"{row[key] / row['gap']:.2f}" for key in ("bound", "ours")
        )
        table.add_row(row["path"], f"{row['eta']:g}", exists, f"{row['gap']:.3e}", *bounds, *ratios)
    return table


def _tightness(bound: float | None, ratio: float | None) -> tuple[str, str]:
    return "-" if bound is None else f"{bound:.3e}", "-" if ratio is None else f"{ratio:.2f}"


def _eta_table(report: dict[str, Any]) -> Table:
    title = "Which eta: W2 distance of the sampler to p*"
    table = figures_table("steps", "best eta", "error there", "at eta 0", "at eta 1", title=title)
    for row in report["eta"]:
        at_one = row["errors"][min(range(len(row["etas"])), key=lambda i: abs(row["etas"][i] - 1.0))]
        best = f"{row['eta']:.2f}" + (" (the largest tried)" if row["at_limit"] else "")
        table.add_row(str(row["steps"]), best, *(f"{x:.4f}" for x in (row["error"], row["errors"][0], at_one)))
    return table


def _list(values: list[float]) -> str:
    return f"{values[0]:.4g}" if len(values) == 1 else "[" + ", ".join(f"{x:.4g}" for x in values) + "]"

"""Results of a study: report.html, tables.md, results.csv, results.json and figures/."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

from etude.errors import EtudeError
from etude.files import atomic_write_text
from etude.report.figures import standalone
from etude.report.page import duration
from etude.study import charts
from etude.study.analysis import analyse
from etude.study.collect import SAMPLER_KEYS, CellResult, Condition, collect, conditions, families
from etude.study.directory import StoredFile, StudyDirectory
from etude.study.labels import training_label
from etude.study.study_file import Study
from etude.study.tables import anchor, basis, count_of, estimate, final, markdown, tables, trained_rewards

QUANTITIES = ("base", "ode", "sde", "improvement", "gap")
Row = dict[str, Any]
Curves = tuple[str, list[charts.Panel], list[charts.Panel]]


def write_results(study: Study, directory: StudyDirectory) -> Path:
    """Write all results from the cells that are done, and return the path of the page.

    A cell whose files are damaged is left out and named on the page.

    Raises:
        EtudeError: there is no such directory, or its archive is damaged.
    """
    if not directory.root.is_dir():
        raise EtudeError(f"'{directory.root}' is not a directory: run the study first.")
    results, unusable = collect(study, directory)
    analysis = analyse(study, results)
    rows = analysis.pop("rows")
    atomic_write_text(
        directory.root / "results.json", json.dumps({**analysis, "rows": rows}, ensure_ascii=False) + "\n"
    )
    atomic_write_text(directory.root / "results.csv", comma_separated([*rows, *pooled_rows(analysis)]))
    atomic_write_text(directory.root / "tables.md", markdown(analysis))
    curves, steps = _curves(analysis), _steps(analysis)
    _write_figures(directory.root / "figures", figure_files(curves, steps))
    target = directory.root / "report.html"
    atomic_write_text(target, render(analysis, curves, steps, pictures(results, directory), unusable, study.text))
    return target


def _write_figures(folder: Path, files: dict[str, str]) -> None:
    """Write figures by name, and remove figures that the study no longer has."""
    folder.mkdir(exist_ok=True)
    for name, svg in files.items():
        atomic_write_text(folder / name, svg)
    for old in folder.glob("*.svg"):
        if old.name not in files:
            old.unlink()


def figure_files(curves: list[Curves], steps: dict[str, charts.Panel]) -> dict[str, str]:
    """The figures of the page as SVG files, named after the condition and the title."""
    figures: dict[str, str] = {}
    for label, large, small in curves:
        figures |= {f"{label} {title}": svg for title, _, svg in large}
        figures |= {f"{label} ODE and SDE over training {title}": svg for title, _, svg in small}
    figures |= {f"{reward} {title}": svg for reward, (title, _, svg) in steps.items()}
    return {f"{anchor(name)}.svg": standalone(svg) for name, svg in figures.items()}


def pooled_rows(analysis: Row) -> list[Row]:
    """The rows of the conditions, over their seeds, in the form of the rows of cells."""
    rows = []
    for c in analysis["conditions"]:
        for steps, by_reward in c["estimates"].items():
            for reward, estimates in by_reward.items():
                head = {"cell": c["label"], "model": c["model"], "kernel": c["kernel"], "eta": c["eta_text"]}
                place = {"evaluation": "final", "steps": int(steps), "reward": reward, "seeds": len(c["seeds"])}
                rows.append({**head, **place, **{q: estimates[q] for q in QUANTITIES}, "seconds": c["seconds"]})
    return rows


def comma_separated(rows: list[Row]) -> str:
    """The text of `results.csv`: a line for each cell, evaluation and reward.

    Each quantity has three columns, for the mean and the ends of its 95 % interval.
    """
    head = ["cell", "grid", "model", "kernel", "eta", "evaluation", "iteration", "steps", "reward", "seeds", "seed"]
    columns = [*head, *(f"{q}{end}" for q in QUANTITIES for end in ("", "_low", "_high")), "n", "seconds"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    for row in rows:
        flat = {name: row.get(name) for name in head} | {"n": (row["ode"] or {}).get("n"), "seconds": row["seconds"]}
        for quantity in QUANTITIES:
            value = row[quantity] or {}
            flat |= {quantity: value.get("mean"), f"{quantity}_low": value.get("low")}
            flat[f"{quantity}_high"] = value.get("high")
        writer.writerow({name: _short(value) for name, value in flat.items()})
    return text.getvalue()


def _short(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else value


def render(
    analysis: Row,
    curves: list[Curves],
    steps: dict[str, charts.Panel],
    shown: list[Any],
    unusable: dict[str, str],
    text: str,
) -> str:
    """The text of the page."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader("etude.study", "."), PackageLoader("etude.report", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown_tables = tables(analysis)
    matrices = [table for table in shown_tables if table.title.startswith("Sampler matrix")]
    results = [table for table in shown_tables if table.title.startswith(("Trained on", "Against"))]
    return environment.get_template("study.html").render(
        analysis=analysis,
        facts=_facts(analysis),
        basis=basis(analysis),
        sentences=sentences(analysis),
        results=results,
        more=[table for table in shown_tables if table not in results and table not in matrices],
        curves=curves,
        steps=list(steps.values()),
        matrix=[(table, charts.shade(each)) for table, each in zip(matrices, analysis["matrix"], strict=True)],
        pictures=shown,
        unusable=unusable,
        text=text,
    )


def sentences(analysis: Row) -> list[str]:
    """The result in sentences: the best condition of each reward, and the sure comparisons."""
    texts = []
    for reward in trained_rewards(analysis):
        members = [c for c in analysis["conditions"] if reward in c["trained"]]
        best = max(members, key=lambda c: final(c, reward)["improvement"]["mean"])
        improvement = final(best, reward)["improvement"]
        gain = f"{estimate(improvement, True)}, of {best['label']}"
        if improvement["low"] > 0:
            among = f" (of {len(members)} conditions)" if len(members) > 1 else ""
            texts.append(f"{reward}: the largest mean improvement{among} is {gain}.")
        else:
            texts.append(f"{reward}: no condition surely improved; the largest mean is {gain}.")
    if analysis["comparisons"]:
        sure = [row for row in analysis["comparisons"] if (row["difference"]["p_holm"] or 1.0) < 0.05]
        listed = "; ".join(f"{row['label']} ({estimate(row['difference'], True)})" for row in sure)
        number = count_of(len(analysis["comparisons"]), "comparison")
        count = f"Sure at 5 % after Holm's correction: {len(sure)} of {number} with the baseline"
        texts.append(f"{count}{': ' + listed if listed else ''}.")
    elif len(analysis["conditions"]) > 1:
        texts.append(
            "Nothing is compared: no condition has the values of the study's baseline and agrees with another in the rest."
        )
    return texts


def pictures(results: list[CellResult], directory: StudyDirectory) -> list[tuple[str, list[str], list[Any]]]:
    """Images of the base model and of every training eta from the same noise.

    Returns:
        (label, heads of the columns, [(prompt, images)]) for each family.
    """
    shown = []
    for label, members in families(conditions(results), SAMPLER_KEYS):
        seed = members[0].seeds[0]
        chosen = [(c, r) for c in members for r in c.results if r.cell.config.seed == seed]
        base = chosen[0][1].base_image
        if len(chosen) < 2 or base is None:
            continue
        strips = [directory.base_file(base), *(directory.file(r.cell, "samples/study.png") for _, r in chosen)]
        measurement = chosen[0][1].cell.measurement
        count = min(measurement.shown, measurement.num_images)
        try:
            columns = [_images(strip, count) for strip in strips]
        except OSError:  # a strip is missing or damaged: nothing to set side by side
            continue
        heads = ["base model", *(_head(c) for c, _ in chosen)]
        prompts, clusters = chosen[0][1].prompts, chosen[0][1].clusters
        rows = [(prompts[clusters[i]], [column[i] for column in columns]) for i in range(min(map(len, columns)))]
        shown.append((label, heads, rows))
    return shown


def _head(condition: Condition) -> str:
    return training_label(condition.config.sampling.kernel, condition.config.sampling.eta_text)


def _images(stored: StoredFile | None, count: int) -> list[str]:
    """The images of a strip as data URIs.

    Raises:
        OSError: there is no strip, or it is no image.
    """
    from PIL import Image

    if stored is None:
        raise FileNotFoundError
    images = []
    with Image.open(io.BytesIO(stored.data)) as strip:
        width = strip.width // count
        for index in range(count):
            buffer = io.BytesIO()
            strip.crop((index * width, 0, (index + 1) * width, strip.height)).save(buffer, format="PNG")
            images.append(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return images


def _facts(analysis: Row) -> list[tuple[str, str]]:
    models = ", ".join(dict.fromkeys(c["model"] for c in analysis["conditions"])) or "–"
    seeds = sorted({seed for c in analysis["conditions"] for seed in c["seeds"]})
    return [
        ("cells", f"{analysis['done']} of {analysis['cells']}"),
        ("conditions", str(len(analysis["conditions"]))),
        ("model", models),
        ("seeds", ", ".join(map(str, seeds)) or "–"),
        ("time", duration(analysis["seconds"])),
    ]


def _curves(analysis: Row) -> list[Curves]:
    """The figures over training and over eta: (heading, figures, small figures) for each family."""
    sections = []
    for label, reward, members in charts.families(analysis):
        large = [charts.gap_over_training(members, reward), *charts.reward_against_eta(members, reward)]
        sections.append((label, [p for p in large if p is not None], charts.reward_over_training(members, reward)))
    return [each for each in sections if each[1] or each[2]]


def _steps(analysis: Row) -> dict[str, charts.Panel]:
    """The figures of the gap against steps, by reward."""
    return {r: p for r in trained_rewards(analysis) if (p := charts.gap_against_steps(analysis, r)) is not None}

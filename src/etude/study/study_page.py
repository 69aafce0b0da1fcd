"""Results of a study: report.html, tables.md, results.csv, results.json and figures/."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from etude.errors import EtudeError
from etude.files import atomic_write_text
from etude.report.figures import standalone
from etude.report.page import Panel, duration, interval, templates
from etude.study import charts
from etude.study.analysis import analyse
from etude.study.collect import SAMPLER_KEYS, CellResult, collect, conditions, families
from etude.study.directory import StoredFile, StudyDirectory
from etude.study.labels import training_label
from etude.study.study_file import Study
from etude.study.tables import anchor, basis, count_of, final, markdown, tables, trained_rewards

QUANTITIES = ("base", "ode", "sde", "improvement", "gap")
Row = dict[str, Any]
Curves = tuple[str, list[Panel], list[Panel]]
"""The figures of a family: heading, figures, small figures."""


def write_results(study: Study, directory: StudyDirectory) -> Path:
    """Write all results from the cells that are done, and return the path of the page.

    A cell whose files are damaged is left out and named on the page.

    Raises:
        EtudeError: there is no such directory, or its archive is damaged.
    """
    root = directory.root
    if not root.is_dir():
        raise EtudeError(f"'{root}' is not a directory: run the study first.")
    results, unusable = collect(study, directory)
    analysis = analyse(study, results)
    atomic_write_text(root / "results.json", json.dumps(analysis, ensure_ascii=False) + "\n")
    atomic_write_text(root / "results.csv", comma_separated([*analysis["rows"], *pooled_rows(analysis)]))
    atomic_write_text(root / "tables.md", markdown(analysis))
    curves: list[Curves] = []
    for label, reward, members in charts.families(analysis):
        large = [*charts.gap_over_training(members, reward), *charts.reward_against_eta(members, reward)]
        curves.append((label, large, charts.reward_over_training(members, reward)))
    for family in analysis.get("trends", {"families": []})["families"]:
        curves.append((f"Trend of the gap: {family['reward']}, {family['label']}", charts.trend_of_gap(family), []))
    curves = [each for each in curves if each[1] or each[2]]
    steps = {r: p for r in trained_rewards(analysis) if (p := charts.gap_against_steps(analysis, r)) is not None}
    _write_figures(root / "figures", curves, steps)
    page = render(analysis, curves, list(steps.values()), pictures(results, directory), unusable, study.text)
    atomic_write_text(root / "report.html", page)
    return root / "report.html"


def _write_figures(folder: Path, curves: list[Curves], steps: dict[str, Panel]) -> None:
    """Write the page's figures as SVG files, and remove those that the study no longer has."""
    figures: dict[str, str] = {}
    for label, large, small in curves:
        figures |= {f"{label} {title}": svg for title, _, svg in large}
        figures |= {f"{label} ODE and SDE over training {title}": svg for title, _, svg in small}
    figures |= {f"{reward} {title}": svg for reward, (title, _, svg) in steps.items()}
    files = {f"{anchor(name)}.svg": standalone(svg) for name, svg in figures.items()}
    folder.mkdir(exist_ok=True)
    for name, svg in files.items():
        atomic_write_text(folder / name, svg)
    for old in folder.glob("*.svg"):
        if old.name not in files:
            old.unlink()


def pooled_rows(analysis: Row) -> list[Row]:
    """The rows of the conditions, over their seeds, in the form of the rows of cells."""
    rows = []
    for c in analysis["conditions"]:
        head = {"cell": c["label"], "model": c["model"], "kernel": c["kernel"], "eta": c["eta_text"]}
        head |= {"evaluation": "final", "seeds": len(c["seeds"]), "seconds": c["seconds"]}
        for steps, by_reward in c["estimates"].items():
            rows += [{**head, "steps": int(steps), "reward": reward, **each} for reward, each in by_reward.items()]
    return rows


def comma_separated(rows: list[Row]) -> str:
    """The text of `results.csv`: a line for each cell, evaluation and reward."""
    head = ["cell", "grid", "model", "kernel", "eta", "evaluation", "iteration", "steps", "reward", "seeds", "seed"]
    ends = {"": "mean", "_low": "low", "_high": "high"}  # the columns of each quantity
    columns = [*head, *(f"{quantity}{end}" for quantity in QUANTITIES for end in ends), "n", "seconds"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {name: row.get(name) for name in head} | {"n": (row["ode"] or {}).get("n"), "seconds": row["seconds"]}
        for quantity in QUANTITIES:
            flat |= {f"{quantity}{end}": (row[quantity] or {}).get(key) for end, key in ends.items()}
        writer.writerow({name: f"{v:.7g}" if isinstance(v, float) else v for name, v in flat.items()})
    return text.getvalue()


def render(
    analysis: Row, curves: list[Curves], steps: list[Panel], shown: list[Any], unusable: dict[str, str], text: str
) -> str:
    """The text of the page."""
    shown_tables = tables(analysis)
    matrices = [table for table in shown_tables if table.title.startswith("Sampler matrix")]
    results = [table for table in shown_tables if table.title.startswith(("Trained on", "Against"))]
    models = dict.fromkeys(c["model"] for c in analysis["conditions"])
    seeds = sorted({seed for c in analysis["conditions"] for seed in c["seeds"]})
    facts = [("cells", f"{analysis['done']} of {analysis['cells']}"), ("conditions", str(len(analysis["conditions"])))]
    facts += [("model", ", ".join(models) or "–"), ("seeds", ", ".join(map(str, seeds)) or "–")]
    facts += [("time", duration(analysis["seconds"]))]
    template = templates("study", "report").get_template("study.html")
    return template.render(
        analysis=analysis,
        facts=facts,
        basis=basis(analysis),
        sentences=sentences(analysis),
        results=results,
        more=[table for table in shown_tables if table not in results and table not in matrices],
        curves=curves,
        steps=steps,
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
        gain = f"{interval(improvement)}, of {best['label']}"
        among = f" (of {len(members)} conditions)" if len(members) > 1 else ""
        largest = f"the largest mean improvement{among}"
        if improvement["low"] <= 0:
            largest = "no condition surely improved; the largest mean"
        texts.append(f"{reward}: {largest} is {gain}.")
    if analysis["comparisons"]:
        sure = [row for row in analysis["comparisons"] if (row["difference"]["p_holm"] or 1.0) < 0.05]
        listed = "; ".join(f"{row['label']} ({interval(row['difference'])})" for row in sure)
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

    Each family has its label, the heads of the columns, and (prompt, images) for each row.
    """
    shown = []
    for label, members in families(conditions(results), SAMPLER_KEYS):
        chosen = [r for c in members for r in c.results if r.cell.config.seed == members[0].seeds[0]]
        first = chosen[0]
        if len(chosen) < 2 or first.base_image is None:
            continue
        strips = [directory.base_file(first.base_image), *(directory.file(r.cell, "samples/study.png") for r in chosen)]
        count = min(first.cell.measurement.shown, first.cell.measurement.num_images)
        try:
            columns = [_images(strip, count) for strip in strips]
        except OSError:  # a strip is missing or damaged: nothing to set side by side
            continue
        samplings = [r.cell.config.sampling for r in chosen]
        heads = ["base model", *(training_label(sampling.kernel, sampling.eta_text) for sampling in samplings)]
        rows = [(first.prompts[c], list(images)) for c, *images in zip(first.clusters, *columns, strict=False)]
        shown.append((label, heads, rows))
    return shown


def _images(stored: StoredFile | None, count: int) -> list[str]:
    """The images of a strip as data URIs; an OSError where there is no strip, or it is no image."""
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

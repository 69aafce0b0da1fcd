"""What a study leaves for its reader: report.html, tables.md, results.csv, results.json and figures/."""

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
from etude.study.study_file import Study
from etude.study.tables import basis, count_of, estimate, file_name, markdown, tables

QUANTITIES = ("base", "ode", "sde", "improvement", "gap")
Row = dict[str, Any]
Curves = tuple[str, list[charts.Panel], list[charts.Panel]]


def write_results(study: Study, directory: StudyDirectory) -> Path:
    """Writes all of them from the cells that are done, and returns the page's path.

    Raises:
        EtudeError: there is no such directory, or a cell's files cannot be understood.
    """
    if not directory.root.is_dir():
        raise EtudeError(f"'{directory.root}' is not a directory: run the study first.")
    results, unusable = collect(study, directory)
    found = analyse(study, results)
    rows = found.pop("rows")
    atomic_write_text(directory.root / "results.json", json.dumps({**found, "rows": rows}, ensure_ascii=False) + "\n")
    atomic_write_text(directory.root / "results.csv", comma_separated([*rows, *pooled_rows(found)]))
    atomic_write_text(directory.root / "tables.md", markdown(found))
    curves, steps = _curves(found), _steps(found)
    _write_figures(directory.root / "figures", figure_files(curves, steps))
    target = directory.root / "report.html"
    atomic_write_text(target, render(found, curves, steps, pictures(results, directory), unusable, study.text))
    return target


def _write_figures(folder: Path, files: dict[str, str]) -> None:
    """The files, and none that an earlier state of the study had under other names."""
    folder.mkdir(exist_ok=True)
    for name, svg in files.items():
        atomic_write_text(folder / name, svg)
    for old in folder.glob("*.svg"):
        if old.name not in files:
            old.unlink()


def figure_files(curves: list[Curves], steps: dict[str, charts.Panel]) -> dict[str, str]:
    """The figures of the page as SVG files, by name: what was trained on, what is shown."""
    made: dict[str, str] = {}
    for label, large, small in curves:
        made |= {f"{label} {title}": svg for title, _, svg in large}
        made |= {f"{label} ODE and SDE over training {title}": svg for title, _, svg in small}
    made |= {f"{reward} {title}": svg for reward, (title, _, svg) in steps.items()}
    return {f"{file_name(name)}.svg": standalone(svg) for name, svg in made.items()}


def pooled_rows(found: Row) -> list[Row]:
    """The rows of the conditions, over their seeds, as those of the cells."""
    rows = []
    for c in found["conditions"]:
        for steps, by_reward in c["estimates"].items():
            for reward, estimates in by_reward.items():
                head = {"cell": c["label"], "model": c["model"], "kernel": c["kernel"], "eta": c["eta_text"]}
                place = {"evaluation": "final", "steps": int(steps), "reward": reward, "seeds": len(c["seeds"])}
                rows.append({**head, **place, **{q: estimates[q] for q in QUANTITIES}, "seconds": c["seconds"]})
    return rows


def comma_separated(rows: list[Row]) -> str:
    """One line per cell x evaluation x reward; of each quantity the mean and the ends of its 95 % interval."""
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
    found: Row,
    curves: list[Curves],
    steps: dict[str, charts.Panel],
    shown: list[Any],
    unusable: dict[str, str],
    text: str,
) -> str:
    """The page."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader("etude.study", "."), PackageLoader("etude.report", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = tables(found)
    matrices = [table for table in made if table.title.startswith("Sampler matrix")]
    results = [table for table in made if table.title.startswith(("Trained on", "Against"))]
    return environment.get_template("study.html").render(
        found=found,
        facts=_facts(found),
        basis=basis(found),
        sentences=sentences(found),
        results=results,
        more=[table for table in made if table not in results and table not in matrices],
        curves=curves,
        steps=list(steps.values()),
        matrix=[(table, charts.shade(each)) for table, each in zip(matrices, found["matrix"], strict=True)],
        pictures=shown,
        unusable=unusable,
        text=text,
    )


def sentences(found: Row) -> list[str]:
    """The best condition of each reward, and what the comparisons allow to say."""
    said = []
    for reward in _rewards(found):
        members = [c for c in found["conditions"] if reward in c["trained"]]
        best = max(members, key=lambda c: _final(c, reward)["improvement"]["mean"])
        improvement = _final(best, reward)["improvement"]
        gain = f"{estimate(improvement, True)}, of {best['label']}"
        if improvement["low"] > 0:
            among = f" (of {len(members)} conditions)" if len(members) > 1 else ""
            said.append(f"{reward}: the largest mean improvement{among} is {gain}.")
        else:
            said.append(f"{reward}: no condition surely improved; the largest mean is {gain}.")
    if found["comparisons"]:
        sure = [row for row in found["comparisons"] if (row["difference"]["p_holm"] or 1.0) < 0.05]
        listed = "; ".join(f"{row['label']} ({estimate(row['difference'], True)})" for row in sure)
        number = count_of(len(found["comparisons"]), "comparison")
        count = f"Sure at 5 % after Holm's correction: {len(sure)} of {number} with the baseline"
        said.append(f"{count}{': ' + listed if listed else ''}.")
    elif len(found["conditions"]) > 1:
        said.append(
            "Nothing is compared: no condition has the values of the study's baseline and agrees with another in the rest."
        )
    return said


def pictures(results: list[CellResult], directory: StudyDirectory) -> list[tuple[str, list[str], list[Any]]]:
    """(label, heads, [(prompt, images)]) of each family: the base model and every training eta from the same noise."""
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
        except OSError:  # one is missing or damaged: nothing to set side by side
            continue
        heads = ["base model", *(_head(c) for c, _ in chosen)]
        prompts, clusters = chosen[0][1].prompts, chosen[0][1].clusters
        rows = [(prompts[clusters[i]], [column[i] for column in columns]) for i in range(min(map(len, columns)))]
        shown.append((label, heads, rows))
    return shown


def _head(condition: Condition) -> str:
    sampling = condition.config.sampling
    return f"{'' if sampling.kernel == 'gddim' else sampling.kernel + ' '}η = {sampling.eta_text}"


def _images(stored: StoredFile | None, count: int) -> list[str]:
    """The images of a strip as data URIs.

    Raises:
        OSError: there is no strip, or it is no image.
    """
    from PIL import Image

    if stored is None:
        raise FileNotFoundError
    found = []
    with Image.open(io.BytesIO(stored.data)) as strip:
        width = strip.width // count
        for index in range(count):
            buffer = io.BytesIO()
            strip.crop((index * width, 0, (index + 1) * width, strip.height)).save(buffer, format="PNG")
            found.append(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return found


def _facts(found: Row) -> list[tuple[str, str]]:
    models = ", ".join(dict.fromkeys(c["model"] for c in found["conditions"])) or "–"
    seeds = sorted({seed for c in found["conditions"] for seed in c["seeds"]})
    return [
        ("cells", f"{found['done']} of {found['cells']}"),
        ("conditions", str(len(found["conditions"]))),
        ("model", models),
        ("seeds", ", ".join(map(str, seeds)) or "–"),
        ("time", duration(found["seconds"])),
    ]


def _curves(found: Row) -> list[Curves]:
    """(heading, figures, small figures) of each family."""
    made = []
    for label, reward, members in charts.families(found):
        large = [charts.gap_over_training(members, reward), *charts.reward_against_eta(members, reward)]
        made.append((label, [p for p in large if p is not None], charts.reward_over_training(members, reward)))
    return [each for each in made if each[1] or each[2]]


def _steps(found: Row) -> dict[str, charts.Panel]:
    """The gap against steps, by reward."""
    return {r: p for r in _rewards(found) if (p := charts.gap_against_steps(found, r)) is not None}


def _rewards(found: Row) -> list[str]:
    return list(dict.fromkeys(reward for c in found["conditions"] for reward in c["trained"]))


def _final(condition: Row, reward: str) -> Row:
    found: Row = condition["estimates"][str(condition["steps"])][reward]
    return found

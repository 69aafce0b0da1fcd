"""Files of a benchmark for people: results.json, results.md, index.html and the contact sheet."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from etude.bench.bench_results import Row
from etude.bench.cells import SHOWN, Cell
from etude.files import atomic_write_bytes, atomic_write_text
from etude.report.grids import picture_grid
from etude.report.page import interval, templates
from etude.report.result_table import Table

LARGEST_SIDE = 256
"""Largest side of an image on the contact sheet in pixels; `cells/` holds the images as they were drawn."""
LOUD = "NOT COMPARABLE"
"""The word on results of another protocol."""


def write_bench(out: Path, results: Row, cells: Sequence[Cell], text: str) -> Path:
    """Write the results into the benchmark's directory, and return the path of the page.

    Args:
        out: directory of the benchmark.
        results: content of `results.json`.
        cells: cells, whose pictures make the contact sheet.
        text: text of the protocol's file.
    """
    atomic_write_text(out / "results.json", json.dumps(results, ensure_ascii=False) + "\n")
    atomic_write_text(out / "results.md", markdown(results))
    sheet = contact_sheet(cells, results["prompts"])
    atomic_write_bytes(out / "contact-sheet.png", sheet)
    page = templates("bench", "report").get_template("bench.html")
    html = page.render(
        results=results,
        tables=tables(results),
        notices=notices(results),
        facts=facts(results),
        sheet=f"data:image/png;base64,{base64.b64encode(sheet).decode()}",
        text=text,
    )
    atomic_write_text(out / "index.html", html)
    return out / "index.html"


def facts(results: Row) -> list[tuple[str, str]]:
    """The settings of the measurement, as label and value."""
    protocol = results["protocol"]
    return [
        ("model", results["model"]),
        ("protocol", f"{results['name']}, {results['hash'][:12]}"),
        ("sampler", results["sampler"]),
        ("images", f"{protocol['num_prompts']} prompts x {protocol['images_per_prompt']}"),
        ("seed", str(protocol["seed"])),
        ("dtype", protocol["dtype"]),
        *(("measured with", _software(each)) for each in results["environments"]),
    ]


def notices(results: Row) -> list[str]:
    """A loud sentence on each of the earlier results that another protocol made, and one on mixed software."""
    told = [
        f"{LOUD}: {each['file']} was measured under another protocol ({each['hash'][:12]}, and here {results['hash'][:12]}). "
        f"Different: {each['differs']}. No difference is shown."
        for each in results["earlier"]
        if not each["comparable"]
    ]
    environments = results["environments"]
    compared = [each for each in results["earlier"] if each["comparable"]]
    others = [other for each in compared for other in each["environments"] if other not in environments]
    if len(environments) > 1 or others:
        every = "; ".join(dict.fromkeys(map(_software, [*environments, *others])))
        told.append(f"Measured with several versions or processors, whose rounding enters the differences: {every}.")
    return told


def tables(results: Row) -> list[Table]:
    """All tables that have rows."""
    point, rewards = results["sampler"], list(results["estimates"][0]["estimates"])
    own = [row for row in results["estimates"] if row["sampler"] == point]
    listed = [
        Table(
            "Models", f"Mean rewards under the protocol's sampler, {point}.", ["model", *rewards], _means(own, rewards)
        )
    ]
    earlier = [row for each in results["earlier"] for row in each["differences"]]
    between = [(f"{row['model']} - {row['against']}", row) for row in [*results["between_models"], *earlier]]
    note = "Paired differences from the same noise, with 95 % intervals clustered by prompt."
    listed.append(Table("Between models", note, ["difference", *rewards], _differences(between, rewards)))
    several = len(own) > 1
    for kind, title in (("sampler", "Between samplers"), ("sensitivity", "Sensitivity")):
        rows = [row for row in results["around_the_sampler"] if row["kind"] == kind]
        named = [(f"{row['model']}: {row['sampler']}" if several else row["sampler"], row) for row in rows]
        note = f"Reward there minus reward under {point}, of the same model from the same noise."
        if any(" px" in row["sampler"] for row in rows):
            note += " Images of two sizes share the prompt and no noise."
        listed.append(Table(title, note, ["sampler", *rewards], _differences(named, rewards)))
        gains = [
            (f"{row['model']}: {row['sampler']}", {"difference": row["improvement"]})
            for row in rows
            if "improvement" in row
        ]
        note = "Improvement over the base model under each sampler: whether the result depends on the sampler."
        listed.append(
            Table(f"{title}: improvement", note, ["model and sampler", *rewards], _differences(gains, rewards))
        )
    return [table for table in listed if table.rows]


def markdown(results: Row) -> str:
    """The text of `results.md`."""
    lines = [f"# {results['name']}: {results['model']}\n", f"Protocol `{results['hash']}`.\n"]
    lines += [f"**{notice}**\n" for notice in notices(results)]
    lines += [f"* {label}: {value}" for label, value in facts(results)]
    return "\n".join([*lines, "", *(f"## {table.title}\n\n{table.markdown()}" for table in tables(results))])


def contact_sheet(cells: Sequence[Cell], prompts: Sequence[str]) -> bytes:
    """The first images of every cell, a row each, as a PNG. A column is one prompt from one noise."""
    columns, buffer = min(SHOWN, len(prompts)), io.BytesIO()
    width, height = max((Image.open(path).size for cell in cells for path in cell.pictures), default=(8, 8))
    factor = max(1, max(width, height) / LARGEST_SIDE)
    size, shown = (round(width / factor), round(height / factor)), []
    for path in (path for cell in cells for path in cell.pictures[:columns]):
        with Image.open(path) as picture:
            how = Image.Resampling.LANCZOS if picture.width > size[0] else Image.Resampling.NEAREST
            shown.append(picture.convert("RGB").resize(size, how))
    titles = [f"{cell.entry}, {cell.sampler.label}" for cell in cells]
    labels = [*prompts[:columns]] * len(cells)
    picture_grid(shown, columns, max(1, 96 // size[0]), labels, titles).save(buffer, format="PNG")
    return buffer.getvalue()


def _software(environment: Row) -> str:
    """Versions and processor, as `etude 0.1.0, torch 2.13.0, ..., AMD EPYC`."""
    return ", ".join(str(value) if name == "processor" else f"{name} {value}" for name, value in environment.items())


def _means(rows: Sequence[Row], rewards: Sequence[str]) -> list[list[str]]:
    return [[row["model"], *(interval(row["estimates"][name], signed=False) for name in rewards)] for row in rows]


def _differences(rows: Sequence[tuple[str, Any]], rewards: Sequence[str]) -> list[list[str]]:
    return [[label, *(interval(row["difference"].get(name)) for name in rewards)] for label, row in rows]

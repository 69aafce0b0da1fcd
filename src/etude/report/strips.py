"""Strips: the same images from the same noise along training, a row for each prompt, a column for each evaluation."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from etude.errors import EtudeError, brief
from etude.files import atomic_write_bytes, atomic_write_text
from etude.report.grids import picture_grid, pictures_of

if TYPE_CHECKING:
    from torch import Tensor

    from etude.runs.reader import Run

FOLDER = Path("samples") / "along"
LARGEST_SIDE = 128
"""Largest side of a kept image in pixels."""
COLUMNS = 8
"""Largest number of evaluations that a page shows: the first, the last and those evenly between them."""


def thumbnails(images: Tensor) -> Tensor:
    """The images `[n, 3, h, w]` uint8 as averages over squares of pixels, at most `LARGEST_SIDE` high and wide."""
    from torch.nn.functional import adaptive_avg_pool2d

    height, width = images.shape[2:]
    factor = -(-max(height, width) // LARGEST_SIDE)
    if factor == 1:
        return images
    return adaptive_avg_pool2d(images.float(), (max(1, height // factor), max(1, width // factor))).round().byte()


def write_strip(out: Path, iteration: int, images: Tensor, prompts: list[str]) -> None:
    """Writes one evaluation's images side by side to `samples/along/NUMBER.png`, and the prompts beside them."""
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    height, width = images.shape[2:]
    row, buffer = Image.new("RGB", (len(images) * width, height)), io.BytesIO()
    for index, picture in enumerate(pictures_of(images)):
        row.paste(picture, (index * width, 0))
    row.save(buffer, format="PNG")
    atomic_write_bytes(out / FOLDER / f"{iteration:06d}.png", buffer.getvalue())
    atomic_write_text(out / FOLDER / "prompts.json", json.dumps(prompts, ensure_ascii=False))


def strips(run: Run) -> tuple[str, str] | None:
    """Alternative text and data URI of a run's strips; None if fewer than two evaluations kept images.

    Raises:
        EtudeError: a kept file is no picture, or of another size than the others.
    """
    found = [iteration for iteration, _ in run.evaluations if iteration in run.strips]
    if len(found) < 2 or not run.strip_prompts:
        return None
    last, count = len(found) - 1, min(COLUMNS, len(found))
    shown = [found[round(i * last / (count - 1))] for i in range(count)]
    rows, prompts = [_read(run.strips[iteration]) for iteration in shown], [str(each) for each in run.strip_prompts]
    for iteration, row in zip(shown, rows, strict=True):
        if row.size != rows[0].size or row.width < len(prompts):
            raise EtudeError(
                f"'{run.strips[iteration]}' is {row.width} x {row.height}, and '{run.strips[shown[0]]}' "
                f"{rows[0].width} x {rows[0].height}, for {len(prompts)} prompts: delete '{run.directory / FOLDER}'."
            )
    width, height = rows[0].width // len(prompts), rows[0].height
    cells = [row.crop((i * width, 0, (i + 1) * width, height)) for i in range(len(prompts)) for row in rows]
    labels = [f"iteration {iteration}" if iteration else "base model" for iteration in shown] * len(prompts)
    buffer = io.BytesIO()
    picture_grid(cells, count, max(1, 96 // width), labels, prompts).save(buffer, format="PNG")
    after = ", ".join(map(str, shown))
    alt = f"ODE images from the same noise after iterations {after}, a row for each of: {'; '.join(prompts)}"
    return alt, f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise EtudeError(f"'{path}' is not a picture ({brief(error)}): delete it.") from None

"""Images side by side in one picture, each with its caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from etude.errors import EtudeError

if TYPE_CHECKING:
    from torch import Tensor

GAP = 6
MIN_LABELLED_WIDTH = 84
FONT_SIZE = 11
LINE_HEIGHT = 14
MAX_LINES = 3


def image_grid(
    images: Tensor,
    columns: int,
    scale: int = 1,
    labels: list[str] | None = None,
    titles: list[str] | None = None,
) -> Image.Image:
    """One picture of all images, row by row on white.

    Args:
        images: images, uint8 `[n, 3, h, w]`.
        columns: largest number of images in a row.
        scale: enlargement; every pixel becomes scale x scale equal pixels, without smoothing.
        labels: a caption under each image, of up to three lines; an ellipsis ends a longer one.
        titles: a line above each row. Default: none.

    Raises:
        EtudeError: fewer than 1 image, column or scale, or another number of labels than of images,
            or of titles than of rows.
    """
    return picture_grid(pictures_of(images), columns, scale, labels, titles)


def pictures_of(images: Tensor) -> list[Image.Image]:
    """The images, uint8 `[n, 3, h, w]`, as pictures."""
    return [Image.fromarray(pixels) for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]


def picture_grid(
    pictures: Sequence[Image.Image],
    columns: int,
    scale: int = 1,
    labels: list[str] | None = None,
    titles: list[str] | None = None,
) -> Image.Image:
    """The grid of `image_grid`, of pictures of one size."""
    count = len(pictures)
    if count < 1 or columns < 1 or scale < 1:
        raise EtudeError(
            f"a grid needs an image, a column and a scale of at least 1, not {count}, {columns} and {scale}."
        )
    if labels is not None and len(labels) != count:
        raise EtudeError(f"a grid of {count} images needs as many labels, not {len(labels)}.")
    width, height = (side * scale for side in pictures[0].size)
    cell = width if labels is None else max(width, MIN_LABELLED_WIDTH)
    font = ImageFont.load_default(size=FONT_SIZE)
    captions = [_wrap(label, cell, font) for label in labels or [""] * count]
    columns, above = min(columns, count), 0 if titles is None else LINE_HEIGHT
    rows = -(-count // columns)
    if titles is not None and len(titles) != rows:
        raise EtudeError(f"a grid of {rows} rows needs as many titles, not {len(titles)}.")
    row = above + height + GAP + LINE_HEIGHT * max(len(lines) for lines in captions)
    grid = Image.new("RGB", (GAP + columns * (cell + GAP), GAP + rows * row), "white")
    draw = ImageDraw.Draw(grid)
    for index, lines in enumerate(captions):
        left, top = GAP + index % columns * (cell + GAP), GAP + above + index // columns * row
        picture = pictures[index].resize((width, height), Image.Resampling.NEAREST)
        grid.paste(picture, (left + (cell - width) // 2, top))
        for number, line in enumerate(lines):
            position = (left + cell / 2, top + height + 1 + number * LINE_HEIGHT)
            draw.text(position, line, fill=(60, 60, 60), font=font, anchor="ma")
    for index, title in enumerate(titles or []):
        draw.text((GAP, GAP + index * row), _shorten(title, grid.width - 2 * GAP, font), fill="black", font=font)
    return grid


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The text in at most MAX_LINES lines, broken at spaces, each at most `width` pixels wide."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"{lines[MAX_LINES - 1]}…"]
    return [_shorten(line, width, font) for line in lines]


def _shorten(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"

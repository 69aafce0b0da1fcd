"""Files of preferences: Pick-a-Pic's fields, ties left out, and each mistake one sentence."""

from __future__ import annotations

import base64
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from etude.errors import EtudeError
from etude.prompts.preference_pairs import load_pairs
from support.fuzzing import fuzz


def encoded(colour: tuple[int, int, int], size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def record(**changes: Any) -> dict[str, Any]:
    images = {"jpg_0": base64.b64encode(encoded((255, 0, 0))).decode(), "image_1": "blue.png"}
    return {"caption": "red heart", **images, "label_0": 1, "label_1": 0, "user_id": 7, **changes}


def write(folder: Path, *records: Any) -> str:
    (folder / "blue.png").write_bytes(encoded((0, 0, 255)))
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(each) + "\n\n" for each in records))
    return str(path)


def test_the_preferred_image_comes_first_whichever_side_it_was_on(tmp_path: Path) -> None:
    source = write(tmp_path, record(), record(label_0=0, label_1=1.0), record(label_0=0.5, label_1=0.5))
    pairs = load_pairs(source)
    assert [pair.caption for pair in pairs] == ["red heart"] * 2
    red, blue = pairs[0].images(6, 6)
    assert red.shape == (6, 6, 3)
    assert red.dtype == np.uint8
    assert red[0, 0].tolist() == [255, 0, 0]
    assert blue[0, 0].tolist() == [0, 0, 255]
    assert pairs[1].images(6, 6)[0][0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"caption": " "}, "line 1: its caption is"),
        ({"label_0": 2}, r"label_0 and label_1 are \[2, 0\]"),
        ({"label_1": None}, "give 1 and 0, 0 and 1, or 0.5 twice"),
        ({"image_1": "../none.png"}, "image_1 = '../none.png' is no file"),
        ({"image_1": None}, "neither image_1, a file, nor jpg_1"),
        ({"jpg_0": "???"}, "jpg_0 is not base64"),
        ({"label_0": 0.5, "label_1": 0.5}, "all of its 1 lines are ties"),
    ],
)
def test_a_line_that_is_no_preference_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(EtudeError, match=says):
        load_pairs(write(tmp_path, record(**changes)))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(EtudeError, match="does not exist: give a JSONL file"):
        load_pairs(str(tmp_path / "none.jsonl"))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EtudeError, match="cannot be read as UTF-8 text"):
        load_pairs(str(tmp_path / "bytes.jsonl"))


def test_an_image_that_is_none_is_named_when_it_is_needed(tmp_path: Path) -> None:
    (pair,) = load_pairs(write(tmp_path, record(jpg_0=base64.b64encode(b"no image").decode())))
    with pytest.raises(EtudeError, match="line 1: an image in base64 cannot be read"):
        pair.images(8, 8)


@fuzz("files of pairs", 30, text=st.text(max_size=60), key=st.sampled_from(["caption", "image_0", "jpg_0", "label_0"]))
def test_any_line_is_read_or_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, text: str, key: str
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    source = write(folder, record(**{key: text}))
    with suppress(EtudeError):
        load_pairs(source)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(EtudeError):
        load_pairs(source)

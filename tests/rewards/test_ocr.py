"""The OCR reward: the edit distance, the wanted text, and the share of it that a reader finds."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from etude.errors import EtudeError
from etude.rewards import get, names, score
from etude.rewards.ocr import OCR, edit_distance, share_shown, squeezed, wanted_text
from support.fuzzing import fuzz, refused

IMAGES = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 4, 4).contiguous()


class Reader:
    """Reads from each picture the text that belongs to its first pixel."""

    def __init__(self, texts: list[list[str]]) -> None:
        self.texts, self.seen = texts, []

    def __call__(self, picture: Image.Image) -> list[str]:
        self.seen.append(picture.size)
        return self.texts[picture.getpixel((0, 0))[0]]


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_the_edit_distance_is_levenshteins(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_the_edit_distance_is_a_metric():
    words = ["", "a", "ab", "ba", "abc", "cab", "zzz"]
    for middle in words:
        for first, last in pairwise(words):
            assert edit_distance(first, last) <= edit_distance(first, middle) + edit_distance(middle, last)


def test_the_reward_is_one_minus_the_share_of_edits_and_never_below_zero():
    reward = OCR(Reader([["HEL", "LO world"], ["Hxllo", "World"], ["nothing like this at all"]]))
    scores = reward(IMAGES, ['a sign that says "Hello World"'] * 3)
    assert scores.tolist() == pytest.approx(
        [1.0, 0.9, max(0, 1 - edit_distance("helloworld", "nothinglikethisatall") / 10)]
    )
    assert scores.dtype == torch.float32
    assert share_shown("open", "") == 0
    assert share_shown("open", "weareopentoday") == 1  # other text beside the wanted one does no harm
    assert reward.reader.seen == [(4, 4)] * 3


def test_the_wanted_text_is_the_metadatas_or_what_stands_in_quotes():
    reward = OCR(Reader([["one"], ["two"], ["threefour"]]))
    prompts = ["one", 'a "six"', "“three” and «four»"]
    assert reward(IMAGES, prompts, text=["ONE", "t w o", None]).tolist() == [1, 1, 1]
    assert wanted_text("„Straße“ und “Weg”", None) == "strasseweg"
    with pytest.raises(EtudeError, match="the prompt 'a cat' wants no text"):
        reward(IMAGES, ["a cat"] * 3)
    with pytest.raises(EtudeError, match="wants no text"):
        reward(IMAGES, ['"x"'] * 3, text=["x", " ", "x"])


def test_it_has_a_name_and_says_what_to_install(monkeypatch):
    assert "ocr" in names()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(EtudeError, match=r"ocr needs RapidOCR and onnxruntime .*pip install 'etude\[ocr\]'"):
        score(["ocr"], IMAGES, ['"a"'] * 3)
    assert get("ocr").revisions() == {}


@fuzz("wanted texts", 300, text=st.text(st.sampled_from('"“”„«» a\t\u3000Ü'), max_size=12))
def test_any_prompt_ends_in_a_text_or_one_sentence(text: str):
    if refused(wanted_text, text, None) is None:
        assert wanted_text(text, None) == squeezed(wanted_text(text, None)) != ""

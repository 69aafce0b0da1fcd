"""Every row of the page on what etude reads is so: for a run, and for its outline in a dry run, in the same words."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from etude.errors import EtudeError
from etude.policies import load_policy
from etude.sampling.sampler import ODE
from support.readable import ROWS, Row, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "what-etude-reads.md"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [row for row in ROWS if row.says is None], ids=lambda row: row.what)
def test_what_is_read_makes_an_image(row: Row, tmp_path: Path) -> None:
    arguments = row.make(tmp_path)
    load_policy(**arguments, outline=True)
    images = ODE(2, 1.0).draw(load_policy(**arguments, device="cpu"), ["red heart"])
    assert images.dtype == torch.uint8
    assert len(images.unique()) > 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [row for row in ROWS if row.says is not None], ids=lambda row: row.what)
def test_what_is_refused_is_refused_in_one_sentence_by_the_run_and_the_dry_run(row: Row, tmp_path: Path) -> None:
    arguments = row.make(tmp_path)
    sentences = []
    for outline in [False] if row.only_loading else [False, True]:
        with pytest.raises(EtudeError, match=row.says) as refusal:
            load_policy(**arguments, device="cpu", outline=outline)
        sentences.append(str(refusal.value))
    assert len(set(sentences)) == 1
    assert sentences[0].endswith(".")


@pytest.mark.parametrize("row", [row for row in ROWS if "with a word" in row.outcome], ids=lambda row: row.what)
@pytest.mark.parametrize("outline", [True, False])
def test_a_word_is_one_warning(row: Row, outline: bool, tmp_path: Path) -> None:
    arguments = row.make(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_policy(**arguments, device="cpu", outline=outline)
    assert len([each for each in told if str(tmp_path) in str(each.message)]) == 1


def test_the_page_shows_the_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")

"""Votes go out with Pick-a-Pic's names and come back the same; what is hostile stays out."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etude.errors import EtudeError
from etude.preferences.agreement import measure
from etude.preferences.pairing import Pairing
from etude.preferences.pictures import encode_pictures
from etude.preferences.pool import Pool
from etude.preferences.vote_exchange import export_votes, import_votes
from support.fuzzing import fuzz, refused
from support.preferences import fill, pictures, quick


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    pool = fill(quick(tmp_path / "pool"), prompts=4, each=3)
    pairing = Pairing(pool, seed=0)
    for rater, answer in zip(
        ["ann", "bob", "ann", "bob", "ann"], ["left", "tie", "right", "skip", "left"], strict=True
    ):
        pool.vote(pairing.next(rater), rater, answer, seconds=2.5)
    return pool


def _content(pool: Pool) -> set[tuple]:
    images = {image.id: image for image in pool.images()}
    ballots = pool.ballots()
    return {
        (images[int(a)].prompt, images[int(a)].digest, images[int(b)].digest, int(outcome), str(rater))
        for a, b, outcome, rater in zip(ballots.left, ballots.right, ballots.outcome, ballots.rater, strict=True)
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_goes_out_comes_back_the_same_and_twice_counts_once(
    pool: Pool, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="Parquet is tested where pyarrow is installed")
    monkeypatch.setattr("etude.preferences.vote_exchange._BATCH", 3)  # the rows come in two parts
    out = tmp_path / f"votes{suffix}"
    assert export_votes(pool, out) == 4  # the skip is no vote
    other = quick(tmp_path / "other")
    assert import_votes(other, out) == (4, len({d for row in _content(pool) for d in row[1:3]}))
    assert _content(other) == _content(pool)
    assert import_votes(other, out) == (0, 0)
    assert len(other.ballots()) == 4


def test_pairs_that_came_back_and_the_seconds_are_known_after_an_import(pool: Pool, tmp_path: Path) -> None:
    number, left, right, *_ = next(row for row in pool.pairs() if row[3] == "ann")
    pool.vote(pool.add_pair(right, left, "ann", repeats=number), "ann", "right", seconds=1.0)
    export_votes(pool, tmp_path / "votes.jsonl")
    other = quick(tmp_path / "other")
    for votes in (5, 0):
        assert import_votes(other, tmp_path / "votes.jsonl")[0] == votes
    one, two = pool.ballots(), other.ballots()
    assert two.seconds.tolist() == one.seconds.tolist() == [2.5] * 4 + [1.0]
    prompts = {image.id: image.prompt for image in other.images()}
    assert measure(two, prompts).own == measure(one, {image.id: image.prompt for image in pool.images()}).own
    assert measure(two, prompts).own.mean == 1.0


def test_the_fields_are_pick_a_pics(pool: Pool, tmp_path: Path) -> None:
    export_votes(pool, tmp_path / "votes.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    for row in rows:
        wanted = {"caption", "image_0", "image_1", "image_0_uid", "image_1_uid", "label_0", "label_1", "has_label"}
        assert wanted | {"are_different", "best_image_uid", "model_0", "user_id", "ranking_id", "created_at"} <= set(
            row
        )
        assert row["label_0"] + row["label_1"] == 1
        assert row["are_different"] == (row["label_0"] != 0.5)
        with Image.open(tmp_path / row["image_0"]) as picture:
            assert picture.size == (16, 16)
    assert sorted(row["label_0"] for row in rows) == [0, 0.5, 1, 1]


def test_rows_of_pick_a_pic_and_images_without_a_vote_come_in(tmp_path: Path) -> None:
    """JPEG bytes become PNG without metadata; a row without a label is no vote."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is tested where pyarrow is installed")
    import pyarrow.parquet as parquet

    def jpeg(seed: int) -> bytes:
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x010E] = "secret place"
        Image.fromarray(pictures(1, 24, seed)[0].transpose(1, 2, 0)).save(buffer, format="JPEG", exif=exif)
        return buffer.getvalue()

    rows = [
        {"caption": "a cat", "jpg_0": jpeg(0), "jpg_1": jpeg(1), "label_0": 0.0, "label_1": 1.0, "has_label": True, "user_id": 7},
        {"caption": "a cat", "jpg_0": jpeg(2), "jpg_1": jpeg(1), "label_0": 0.5, "label_1": 0.5, "has_label": True, "user_id": 8},
        {"caption": "a dog", "jpg_0": jpeg(3), "jpg_1": jpeg(4), "label_0": None, "label_1": None, "has_label": False, "user_id": 8},
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pick.parquet")
    pool = quick(tmp_path / "pool")
    assert import_votes(pool, tmp_path / "pick.parquet") == (2, 3)
    assert pool.ballots().outcome.tolist() == [-1, 0]
    assert pool.ballots().rater.tolist() == ["7", "8"]
    for image in pool.images():
        data = pool.read_image(image.digest)
        assert data.startswith(b"\x89PNG")
        assert b"secret place" not in data
    (tmp_path / "a.png").write_bytes(encode_pictures(pictures(1, 24, 9))[0])
    (tmp_path / "images.jsonl").write_text('{"prompt": "a cat", "file": "a.png"}\n')
    assert import_votes(pool, tmp_path / "images.jsonl") == (0, 1)


def test_images_in_base64_come_in(tmp_path: Path) -> None:
    jpg = [base64.b64encode(data).decode() for data in encode_pictures(pictures(2, 24))]
    row = {"caption": "a cat", "jpg_0": jpg[0], "jpg_1": jpg[1], "label_0": 1, "label_1": 0}
    (tmp_path / "votes.jsonl").write_text(json.dumps(row))
    pool = quick(tmp_path / "pool")
    assert import_votes(pool, tmp_path / "votes.jsonl") == (1, 2)
    (tmp_path / "votes.jsonl").write_text(json.dumps(row | {"jpg_0": "?"}))
    with pytest.raises(EtudeError, match="line 1: jpg_0 is not base64"):
        import_votes(pool, tmp_path / "votes.jsonl")


def test_no_path_leads_out_of_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encode_pictures(pictures(1))[0])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    pool = quick(tmp_path / "pool")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "x/../../secret.png", "", "a\0b", 3, None):
        (folder / "images.jsonl").write_text(json.dumps({"prompt": "a cat", "file": name}))
        with pytest.raises(EtudeError, match="line 1"):
            import_votes(pool, folder / "images.jsonl")
    assert pool.images() == []


def test_a_bomb_and_a_picture_that_is_none_are_refused_with_their_line(tmp_path: Path) -> None:
    pool = quick(tmp_path / "pool")
    (tmp_path / "wide.png").write_bytes(encode_pictures([np.zeros((3, 1, 9000), np.uint8)])[0])
    (tmp_path / "page.png").write_text("<svg onload=alert(1)>")
    for name, words in (("wide.png", "sides of at most 8192"), ("page.png", "cannot be read as PNG, JPEG or WebP")):
        (tmp_path / "images.jsonl").write_text(json.dumps({"prompt": "a cat", "file": name}))
        with pytest.raises(EtudeError, match=words):
            import_votes(pool, tmp_path / "images.jsonl")


def _records() -> dict:
    from hypothesis import strategies as st

    value = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.just("a.png") | st.just([])
    )
    names = ["caption", "image_0", "image_1", "label_0", "label_1", "user_id", "prompt", "file", "has_label", "jpg_0"]
    fields = st.dictionaries(st.sampled_from(names), value, max_size=8)
    vote = st.fixed_dictionaries(
        {"caption": st.text(max_size=8), "image_0": value, "image_1": st.just("a.png"),
         "label_0": st.sampled_from([0, 1, 0.5, True]), "label_1": st.sampled_from([0, 1, 0.5])}
    )  # fmt: skip
    return {"line": (fields | vote).map(json.dumps) | st.text(max_size=40)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("incoming")
    (root / "a.png").write_bytes(encode_pictures(pictures(1))[0])
    quick(root / "pool").close()
    return root


@fuzz("imported votes", 200, **_records())
def test_any_line_is_imported_or_refused_in_a_sentence(place: Path, line: str) -> None:
    (place / "lines.jsonl").write_text(line, encoding="utf-8", errors="surrogatepass")
    pool = quick(place / "pool")
    before = len(pool.ballots())
    sentence = refused(import_votes, pool, place / "lines.jsonl")
    assert sentence is None or len(pool.ballots()) == before
    pool.close()

"""The store: what was acknowledged stays, what failed leaves nothing, and no name leads out of the pool."""

from __future__ import annotations

import io
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from etude.errors import EtudeError
from etude.preferences.agreement import measure
from etude.preferences.pairing import REPEAT_DISTANCE, Pairing
from etude.preferences.pictures import LARGEST_FILE, encode_pictures, open_picture
from etude.preferences.pool import ANSWERS, Pool, VoteError, check_rater
from support.fuzzing import fuzz, refused
from support.preferences import fill, quick, vote_texts


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return fill(quick(tmp_path / "pool"), prompts=6, each=4)


def test_a_vote_is_there_for_another_process_as_soon_as_it_is_acknowledged(tmp_path: Path) -> None:
    pool = fill(Pool(tmp_path / "pool", create=True), prompts=2, each=2)
    pair = Pairing(pool, seed=0).next("ann")
    assert pool.vote(pair, "ann", "left")
    with sqlite3.connect(pool.root / "votes.sqlite") as other:
        assert other.execute("SELECT answer FROM votes").fetchall() == [("left",)]
    assert pool._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: on the disk, not in its cache
    assert pool._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_repeated_request_counts_once_and_another_answer_is_refused(pool: Pool) -> None:
    pair = Pairing(pool, seed=0).next("ann")
    assert [pool.vote(pair, "ann", "left"), pool.vote(pair, "ann", "left")] == [True, False]
    assert pool.count() == 1
    with pytest.raises(VoteError, match="has the answer 'left' already"):
        pool.vote(pair, "ann", "right")
    with pytest.raises(VoteError, match="was not shown to 'bob'"):
        pool.vote(pair, "bob", "left")


def test_undo_opens_the_last_pair_again_and_keeps_the_withdrawn_vote(pool: Pool) -> None:
    pairing = Pairing(pool, seed=0)
    first, second = pairing.next("ann"), pairing.next("ann")
    pool.vote(first, "ann", "left")
    pool.vote(second, "ann", "tie")
    assert pool.undo("ann") == second
    assert [pair for pair, *_ in pool.open_pairs("ann")] == [second]
    pool.vote(second, "ann", "right")
    assert pool.ballots().outcome.tolist() == [1, -1]
    assert pool._connection.execute("SELECT count(*) FROM votes").fetchone() == (3,)
    assert pool.undo("bob") is None


def test_a_full_disk_stores_nothing_says_so_and_the_vote_can_be_given_again(tmp_path: Path) -> None:
    pool = fill(quick(tmp_path / "pool"), prompts=30, each=6)
    pairing = Pairing(pool, seed=0)
    pages = pool._connection.execute("PRAGMA page_count").fetchone()[0]
    pool._connection.execute(f"PRAGMA max_page_count = {pages}")
    stored, sentence, pair = 0, None, None
    while sentence is None and stored < 400:
        try:
            pair = pair or pairing.next("ann")
            stored += pool.vote(pair, "ann", "left")
            pair = None
        except EtudeError as error:
            sentence = str(error)
    assert sentence is not None
    assert "full" in sentence
    assert "nothing was stored; free some space" in sentence
    assert pool.count() == stored > 0
    pool._connection.execute("PRAGMA max_page_count = 1000000")
    assert pool.vote(pair or pairing.next("ann"), "ann", "left")
    assert pool.count() == stored + 1
    assert pool._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_two_servers_and_many_raters_on_one_pool_lose_and_double_nothing(pool: Pool) -> None:
    others = [quick(pool.root), quick(pool.root)]
    failures = []

    def work(place: Pool, rater: str) -> None:
        try:
            pairing = Pairing(place, seed=1)
            for _ in range(15):
                place.vote(pairing.next(rater), rater, "left")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(others[i % 2], f"rater {i}")) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    ballots = pool.ballots()
    assert len(ballots) == 90
    assert len(set(ballots.pair.tolist())) == 90
    for i in range(6):
        assert pool.count(f"rater {i}") == 15


def test_a_rater_sees_every_pair_once_then_no_more_and_images_take_turns(pool: Pool) -> None:
    pairing = Pairing(pool, repeat_share=0.0, seed=0)
    seen = [pairing.next("ann") for _ in range(pairing.total)]
    assert pairing.total == 6 * 6
    assert pairing.next("ann") is None
    rows = {frozenset((left, right)) for _, left, right, _, _ in pool.pairs()}
    assert len(rows) == len(seen) == 36
    assert all(image_prompts(pool, pair) == 1 for pair in rows)
    assert pairing.next("bob") is not None
    first = [row[1:3] for row in pool.pairs()][:12]
    assert (
        len({image for pair in first for image in pair}) == 24
    )  # 24 images: each was shown once before any came again


def image_prompts(pool: Pool, pair: frozenset[int]) -> int:
    return len({pool.image(number).prompt for number in pair})


def test_a_tenth_comes_back_with_sides_swapped_and_never_at_once(tmp_path: Path) -> None:
    pool = fill(quick(tmp_path / "large"), prompts=40, each=5)
    pairing = Pairing(pool, seed=0)
    for _ in range(300):
        pool.vote(pairing.next("ann"), "ann", "left")
    rows = {row[0]: row for row in pool.pairs()}
    repeated = [row for row in rows.values() if row[4]]
    assert 15 <= len(repeated) <= 45
    for number, left, right, _, first in repeated:
        assert (left, right) == (rows[first][2], rows[first][1])
        assert number - first > REPEAT_DISTANCE
    assert len({row[4] for row in repeated}) == len(repeated)


def test_sides_are_random(tmp_path: Path) -> None:
    pool = fill(quick(tmp_path / "sides"), prompts=50, each=4)
    pairing = Pairing(pool, repeat_share=0.0, seed=3)
    for _ in range(300):
        pairing.next("ann")
    swapped = sum(left > right for _, left, right, _, _ in pool.pairs())
    assert 110 <= swapped <= 190  # 150 +- 4.6 standard deviations


def test_an_informed_choice_takes_what_teaches_most_and_still_takes_turns(pool: Pool) -> None:
    def only_first_prompt(pairs: list[tuple[int, int]]) -> np.ndarray:
        return np.array([10.0 if max(pair) <= 4 else 1.0 for pair in pairs])

    pairing = Pairing(pool, only_first_prompt, repeat_share=0.0, seed=0)
    for _ in range(30):
        pairing.next("ann")
    first = [max(left, right) <= 4 for _, left, right, _, _ in pool.pairs()]
    assert all(first[:2])
    assert not all(first[:8])  # its images were seen often by then


def test_agreement_counts_the_same_image_on_either_side(pool: Pool) -> None:
    """A rater who always takes the smaller number agrees with itself; one who always takes the left side never does."""
    prompts = {image.id: image.prompt for image in pool.images()}
    for rater, swap in (("steady", True), ("lefty", False)):
        for a, b in [(1, 2), (3, 4), (5, 6), (7, 8)]:
            first = pool.add_pair(a, b, rater)
            pool.vote(first, rater, "left")
            pool.vote(pool.add_pair(b, a, rater, repeats=first), rater, "right" if swap else "left")
    ballots = pool.ballots()
    steady = measure(ballots.take(ballots.rater == "steady"), prompts)
    lefty = measure(ballots.take(ballots.rater == "lefty"), prompts)
    assert (steady.own.mean, steady.left.mean, steady.ceiling.mean) == (1.0, 0.5, 1.0)
    assert (lefty.own.mean, lefty.left.mean, lefty.ceiling.mean) == (0.0, 1.0, 0.5)
    assert measure(ballots, prompts).between.mean == 1.0  # their first votes are the same


def test_a_directory_with_other_files_is_no_place_for_a_pool(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(EtudeError, match="holds other files"):
        Pool(tmp_path, create=True)
    with pytest.raises(EtudeError, match="is no pool of images: make one with"):
        Pool(tmp_path / "nowhere")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "votes.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(EtudeError, match="cannot be used"):
        Pool(tmp_path / "torn")


def test_a_pool_with_values_that_are_none_is_refused_in_a_sentence(pool: Pool) -> None:
    pool._connection.execute("UPDATE makers SET settings = '{'")
    pool._connection.execute("INSERT INTO facts VALUES ('sides', '[[')")
    for read in (pool.makers, lambda: pool.fact("sides")):
        with pytest.raises(EtudeError, match="which is no JSON"):
            read()
    pool._connection.execute("PRAGMA user_version = 9")
    with pytest.raises(EtudeError, match="has version 9 of the layout"):
        Pool(pool.root)


def test_no_digest_and_no_link_leads_out_of_the_pool(pool: Pool, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    for name in ("../secret.png", "/etc/passwd", "..%2f..%2fsecret", "a" * 64, "", "\0", "A" * 64):
        with pytest.raises(EtudeError, match="holds no image"):
            pool.read_image(name)
    digest = pool.images()[0].digest
    path = pool._place(digest)
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(EtudeError, match="link out of the pool"):
        pool.read_image(digest)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(EtudeError, match="no regular file"):
        pool.read_image(digest)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(EtudeError, match="no regular file of at most 64 MiB"):
        pool.read_image(digest)


def test_an_image_of_many_pixels_is_refused_by_its_header() -> None:
    wide = encode_pictures([np.zeros((3, 1, 9000), np.uint8)])[0]
    with pytest.raises(EtudeError, match="sides of at most 8192 pixels"):
        open_picture(wide, "wide.png")


def test_a_picture_is_upright_its_transparent_parts_are_white_and_16_bits_are_refused() -> None:
    def saved(picture: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **how)
        return buffer.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was turned by a quarter
    assert open_picture(saved(Image.new("RGB", (8, 4), "red"), "JPEG", exif=exif), "a").size == (4, 8)
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert open_picture(saved(clear), "b").getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(saved(Image.new("RGB", (2, 2), "red")), "c").getpixel((0, 0)) == (255, 0, 0)
    deep = Image.fromarray(np.full((2, 2), 20_000, np.uint16))
    with pytest.raises(EtudeError, match="more than 8 bits"):
        open_picture(saved(deep), "d")


def test_drawing_again_adds_nothing(pool: Pool) -> None:
    before = pool.images()
    fill(pool, prompts=6, each=4)
    assert pool.images() == before


@fuzz("votes", 300, **vote_texts())
def test_any_vote_is_stored_once_or_refused_in_a_sentence(
    shared_pool: Pool, rater: str, answer: str, pair: int
) -> None:
    before = shared_pool.count()
    sentence = refused(shared_pool.vote, pair, rater, answer)
    assert shared_pool.count() - before in ({0} if sentence else {0, 1})
    assert sentence is not None or answer in ANSWERS
    name = refused(check_rater, rater)
    assert name is None or not (0 < len(" ".join(rater.split())) <= 40 and " ".join(rater.split()).isprintable())


@pytest.fixture(scope="module")
def shared_pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    pool = fill(quick(tmp_path_factory.mktemp("fuzz") / "pool"), prompts=3, each=3)
    pairing = Pairing(pool, seed=0)
    for _ in range(5):
        pairing.next("ann")
    return pool

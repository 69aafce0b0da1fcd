"""A vision-language model as judge: its answers, both places, ties, the cache, retries and the key."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from etude.errors import EtudeError
from etude.rewards import WeightedRewards, get
from etude.rewards.remote.judge import VLMJudge, _pairs, _read_cache, score_said, winner_said
from support.fuzzing import fuzz, refused

IMAGES = torch.tensor([10, 90, 50, 90], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 4, 6).contiguous()
PROMPTS = ["a cat", "a cat", "a cat", "a cat"]
KEY = "sk-secret"


def brightness_of(part: dict[str, Any]) -> int:
    """The first pixel of a picture in a message."""
    scheme, _, text = part["image_url"]["url"].partition(",")
    assert scheme == "data:image/png;base64"
    return int(Image.open(io.BytesIO(base64.b64decode(text))).getpixel((0, 0))[0])


def said(text: str) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def fair(message: dict[str, Any], number: int) -> tuple[int, bytes]:
    """A judge that likes bright pictures and answers as asked."""
    shown = [brightness_of(part) for part in message["messages"][0]["content"] if part["type"] == "image_url"]
    if len(shown) == 1:
        return said(f"{shown[0] / 10}")
    return said("tie" if shown[0] == shown[1] else "A" if shown[0] > shown[1] else "B")


@contextmanager
def judging(script: Callable[[dict[str, Any], int], tuple[int, bytes]]) -> Iterator[tuple[str, list[Any]]]:
    """The url of an endpoint that answers by a script, and the (path, headers, message) of each request."""
    seen: list[Any] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, dict(self.headers), message))
                number = len(seen)
            status, body = script(message, number)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def test_pointwise_it_is_a_tenth_of_the_score_and_each_image_is_asked_about_once():
    with judging(fair) as (url, seen):
        judge = get(f"vlm_judge:{url}#model=tiny/vlm,backoff=0")
        assert judge(IMAGES, PROMPTS).tolist() == pytest.approx([0.1, 0.9, 0.5, 0.9])
        assert judge(IMAGES[:1], ["a dog"]).tolist() == pytest.approx([0.1])
        assert judge(IMAGES, PROMPTS).tolist() == pytest.approx([0.1, 0.9, 0.5, 0.9])
        asked = len(seen)
    assert asked <= 5  # equal images of one prompt may be under way together
    path, headers, message = seen[0]
    assert (path, message["model"], message["temperature"]) == ("/v1/chat/completions", "tiny/vlm", 0)
    assert "made for this prompt: a cat\n" in message["messages"][0]["content"][0]["text"]
    assert "Authorization" not in headers


def test_pairwise_it_is_the_share_of_opponents_beaten_and_sums_to_half_the_group():
    with judging(fair) as (url, seen):
        judge = get(f"vlm_judge:{url}#model=m,mode=pairwise")
        scores = judge(IMAGES, PROMPTS, groups=[0, 0, 0, 0])
        assert scores.tolist() == pytest.approx([0, 2.5 / 3, 1 / 3, 2.5 / 3])
        assert scores.sum() == pytest.approx(2)
        assert len(seen) <= 12
        two = judge(IMAGES, ["a", "a", "b", "b"], groups=[7, 7, 3, 3])
        assert two.tolist() == [0, 1, 0, 1]
        with pytest.raises(EtudeError, match="there is one image of the prompt 'a cat', and a pairwise vlm_judge"):
            judge(IMAGES, PROMPTS, groups=[0, 0, 0, 1])


def test_a_judge_that_favours_a_place_gives_ties_alone():
    with judging(lambda message, number: said("A")) as (url, _):
        assert get(f"vlm_judge:{url}#model=m,mode=pairwise")(IMAGES, PROMPTS, groups=[0] * 4).tolist() == [0.5] * 4


def test_in_a_ring_every_image_has_as_many_opponents():
    for count, reach in ((6, 1), (6, 2), (5, 2), (4, 9), (2, 1), (2, 3)):
        pairs = _pairs(["p"] * count, [0] * count, reach)
        met = [sum(row in pair for pair in pairs) for row in range(count)]
        assert len(set(met)) == 1
        assert met[0] == min(2 * reach, count - 1)
    assert len(_pairs(["p"] * 6, [0] * 6, 0)) == 15


def test_weighted_rewards_hand_it_whole_groups():
    with judging(fair) as (url, _):
        rewards = WeightedRewards({f"vlm_judge:{url}#model=m,mode=pairwise": 1.0})
        assert rewards.whole_groups
        found = rewards.start(IMAGES, PROMPTS, groups=[0, 0, 1, 1]).result(timeout=30)
        assert next(iter(found.values())).tolist() == [0, 1, 0, 1]


def test_failures_are_repeated_and_an_answer_beside_the_question_is_asked_again():
    def moody(message: dict[str, Any], number: int) -> tuple[int, bytes]:
        return (429, b"slow down") if number == 1 else said("A lovely cat!") if number == 2 else said("7/10.")

    with judging(moody) as (url, seen):
        assert get(f"vlm_judge:{url}#model=m,backoff=0")(IMAGES[:1], ["a cat"]).tolist() == pytest.approx([0.7])
    assert len(seen) == 3
    assert "You answered 'A lovely cat!'" in seen[2][2]["messages"][0]["content"][-1]["text"]


def test_what_cannot_be_mended_is_one_sentence():
    with judging(lambda message, number: said("I cannot rate this.")) as (url, seen):
        with pytest.raises(EtudeError, match=r"answered 'I cannot rate this\.' 3 times, where a number from 0 to 10"):
            get(f"vlm_judge:{url}#model=m,retries=2,backoff=0")(IMAGES[:1], ["a cat"])
        assert len(seen) == 3
    with (
        judging(lambda message, number: (200, b'{"choices": []}')) as (url, _),
        pytest.raises(EtudeError, match="is no chat completion"),
    ):
        get(f"vlm_judge:{url}#model=m")(IMAGES[:1], ["a cat"])
    with (
        judging(lambda message, number: (401, b"no")) as (url, _),
        pytest.raises(
            EtudeError, match=r"status 401 \(no\): set the server's token in .*ETUDE_REWARD_TOKEN \(it is not set\)"
        ),
    ):
        get(f"vlm_judge:{url}#model=m")(IMAGES[:1], ["a cat"])


def test_the_key_is_sent_and_never_written(monkeypatch, tmp_path):
    monkeypatch.setenv("ETUDE_REWARD_TOKEN", KEY)
    cache = tmp_path / "answers.jsonl"
    with judging(lambda message, number: said(f"{KEY} 5" if number == 1 else "7 7")) as (url, seen):
        judge = VLMJudge(url, model="m", cache=str(cache), retries=0)
        judge(IMAGES[:1], ["a cat"])
        with pytest.raises(EtudeError, match=r"answered '7 7' 1 times") as caught:
            judge(IMAGES[1:2], ["a cat"])
    assert seen[0][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in cache.read_text() + str(caught.value)


def test_answers_outlive_the_process_and_a_torn_line_is_asked_again(tmp_path):
    cache = tmp_path / "answers.jsonl"
    with judging(fair) as (url, seen):
        first = VLMJudge(url, model="m", cache=str(cache))(IMAGES[:3], PROMPTS[:3])
        assert torch.equal(VLMJudge(url, model="m", cache=str(cache))(IMAGES[:3], PROMPTS[:3]), first)
        assert len(seen) == 3
        VLMJudge(url, model="other", cache=str(cache))(IMAGES[:1], PROMPTS[:1])
        assert len(seen) == 4
        whole = cache.read_bytes()
        cache.write_bytes(whole[:-9])
        VLMJudge(url, model="other", cache=str(cache))(IMAGES[:1], PROMPTS[:1])
        assert (len(seen), cache.read_bytes()) == (5, whole)


def test_a_question_of_ones_own_replaces_the_built_in_one(tmp_path):
    file = tmp_path / "question.txt"
    file.write_text("How {sharp} is it? {prompt}\n")
    with judging(fair) as (url, seen):
        judge = get(f"vlm_judge:{url}#model=m,question={file}")
        judge(IMAGES[:1], ["a {cat}"])
        assert judge.files() == {str(file): file}
    assert seen[0][2]["messages"][0]["content"][0]["text"] == "How {sharp} is it? a {cat}"
    file.write_text("no place for it")
    with pytest.raises(EtudeError, match=r"does not hold \{prompt\}"):
        VLMJudge("http://h/v1", model="m", question=str(file))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("", "names no model of http://h/v1"),
        ("#model=m,mode=triple", "mode of vlm_judge 'triple'"),
        ("#model=m,opponents=-1", "opponents = -1"),
        ("#model=m,temperature=1", "option of a remote reward 'temperature'"),
        ("#model=m,question=/none", "cannot be read"),
    ],
)
def test_a_wrong_option_is_one_sentence(options: str, problem: str) -> None:
    with pytest.raises(EtudeError, match=problem):
        get(f"vlm_judge:http://h/v1{options}")


@pytest.mark.parametrize(
    ("text", "score"),
    [("7", 0.7), (" 10/10 ", 1.0), ("Score: 7.5.", 0.75), ("0", 0.0), ("-1", None), ("11", None), ("7 or 8", None), ("", None),
     ("7 / 10", 0.7), ("8 out of 10.", 0.8), ("1/100", None), ("10", 1.0)],
)  # fmt: skip
def test_a_score_is_the_only_number_from_0_to_10(text: str, score: float | None) -> None:
    assert score_said(text) == score


@pytest.mark.parametrize(
    ("text", "winner"),
    [("A", 1.0), ("B.", 0.0), ("tie", 0.5), ("Image B", 0.0), ("A or B", None), ("Both", None), ("", None)],
)
def test_a_winner_is_the_only_one_that_is_named(text: str, winner: float | None) -> None:
    assert winner_said(text) == winner


@fuzz("answers of a judge", 300, text=st.text(st.sampled_from("0123456789.-/ABtie \n"), max_size=12))
def test_any_answer_is_a_number_of_the_range_or_none(text: str) -> None:
    for reading in (score_said, winner_said):
        value = reading(text)
        assert value is None or 0 <= value <= 1


@fuzz("caches of a judge", 200, data=st.binary(max_size=60))
def test_any_cache_ends_in_answers_or_one_sentence(tmp_path_factory: Any, data: bytes) -> None:
    file: Path = tmp_path_factory.mktemp("cache", numbered=True) / "answers.jsonl"
    file.write_bytes(b'{"question": "q", "answer": 0.5}\n' + data)
    if refused(_read_cache, file) is None:
        assert _read_cache(file)["q"] == 0.5

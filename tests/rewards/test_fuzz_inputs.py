"""Prompt files, images and rewards of every wrong kind: refused in one sentence, or taken for what they are."""

from __future__ import annotations

import base64
import io
import json
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from etude.errors import EtudeError
from etude.prompts import PromptSet, load_prompts
from etude.report.grids import image_grid
from etude.rewards import get, register
from etude.rewards.remote.server import _RefusedError, _Scorer
from etude.rewards.remote.wire import ScoreAnswer, decode_images, encode_image
from etude.rewards.scoring import WeightedRewards, score_one
from support.fuzzing import fuzz, refused

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
words = st.text(st.characters(), max_size=30) | st.sampled_from(
    [
        "שלום עולם",
        "مرحبا",
        "\u202ereversed",
        "👩\u200d👩\u200d👧",
        "\ufeff",
        "\u2028",
        "e\u0301" * 50,
        "# comment",
        "\0",
        "\x1b[31m",
        "<script>",
        "a" * 5000,
    ]
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


def prompts_of(file: Path) -> None:
    """What is accepted can be written, drawn and sent: non-empty UTF-8 texts, one entry of every field for each."""
    prompts = load_prompts(str(file))
    assert len(prompts) > 0
    for text in prompts.texts:
        assert text.strip()
        assert text.encode("utf-8").decode("utf-8") == text
    assert all(len(column) == len(prompts) for column in prompts.metadata.values())
    assert prompts.select([0, 0]).texts == [prompts.texts[0]] * 2


@fuzz("prompts", 200, lines=st.lists(words, max_size=8), end=st.sampled_from(["\n", "\r\n", "\r", ""]))
def test_a_text_file_is_refused_in_a_sentence_or_holds_whole_prompts(place: Path, lines: list[str], end: str) -> None:
    file = place / "set.txt"
    file.write_bytes(end.join(lines).encode("utf-8", "surrogatepass"))
    refused(prompts_of, file)


@fuzz("prompts", 100, data=st.binary(max_size=60) | st.binary(max_size=20).map(lambda b: b"\xef\xbb\xbf" + b))
def test_a_binary_file_is_refused_in_a_sentence_or_is_text_after_all(place: Path, data: bytes) -> None:
    for name in ("set.txt", "set.jsonl"):
        (place / name).write_bytes(data)
        refused(prompts_of, place / name)


JSON_LINES = [
    "",
    "{}",
    "[]",
    "null",
    "1",
    '"a"',
    '{"prompt": "\\ud83d"}',
    '{"prompt": "\\u0000"}',
    '{"prompt": 1}',
    "[" * 2000,
    "9" * 5000,
    '{"prompt": "a", "self": 1}',
    '{"prompt": "a", "images": 1}',
    '{"prompt": "a", "x": NaN}',
    "{",
    "\u2028",
]


@fuzz(
    "prompts",
    150,
    rows=st.lists(
        st.dictionaries(st.just("prompt") | st.text(max_size=5), words | anything, max_size=3).map(json.dumps)
        | st.sampled_from(JSON_LINES),
        max_size=4,
    ),
)
def test_json_lines_of_any_types_are_refused_in_a_sentence_or_hold_whole_prompts(place: Path, rows: list[str]) -> None:
    file = place / "set.jsonl"
    file.write_text("\n".join(rows), encoding="utf-8")
    refused(prompts_of, file)


@fuzz(
    "prompts",
    150,
    source=words | st.text(max_size=12).map("hub:".__add__) | st.from_regex(r"[\w.]{0,8}:[\w.]{0,8}", fullmatch=True),
)
def test_a_source_that_is_nothing_is_refused_in_a_sentence(place: Path, source: str) -> None:
    refused(load_prompts, source)
    refused(load_prompts, str(place) + "/" + source)


@fuzz("prompts", 40, captions=st.lists(words, min_size=1, max_size=3))
def test_any_prompt_can_be_a_caption(captions: list[str]) -> None:
    shown = [text.encode("utf-8", "replace").decode() for text in captions]
    assert image_grid(torch.zeros(len(shown), 3, 8, 8, dtype=torch.uint8), 2, labels=shown).size[0] > 8


def test_ten_thousand_lines_and_a_line_of_a_megabyte_are_prompts(place: Path) -> None:
    file = place / "long.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(10_000)), encoding="utf-8")
    assert load_prompts(str(file)).texts[-1] == "prompt 9999"
    file.write_text("a" * 1_000_000, encoding="utf-8")
    assert len(load_prompts(str(file)).texts[0]) == 1_000_000


def test_a_prompt_source_that_never_ends_is_refused(place: Path) -> None:
    os.mkfifo(place / "pipe")
    for source in ("/dev/zero", str(place / "pipe")):
        assert "is a device or a pipe" in (refused(load_prompts, source) or "")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"prompt": "a\\ud83d"}', "half of a surrogate pair"),
        ('{"prompt": "a\\u0000b"}', "holds a NUL character"),
        ('{"prompt": "a", "self": 1}', "have a field 'self'"),
    ],
)
def test_json_cannot_carry_what_no_file_or_reward_could_hold(place: Path, line: str, part: str) -> None:
    file = place / "set.jsonl"
    file.write_text(line, encoding="utf-8")
    with pytest.raises(EtudeError, match=part):
        load_prompts(str(file))


FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
shapes = st.lists(st.integers(0, 4), max_size=4)
numbers = st.sampled_from([0.0, 1.0, -3.5, float("nan"), float("inf"), -float("inf"), 1e300, 1e-300])


def tensor(dtype: torch.dtype, shape: list[int], value: float) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64).to(dtype)


tensors = st.builds(tensor, st.sampled_from(DTYPES), shapes | st.just([3]), numbers)
returned = st.one_of(
    tensors,
    tensors.map(lambda t: t.to("meta")),
    tensors.map(lambda t: t.to_sparse() if t.ndim and t.dtype in FLOATS[:2] else t),
    tensors.map(lambda t: torch.nn.Parameter(t) if t.is_floating_point() or t.is_complex() else t),
    tensors.map(lambda t: t.numpy() if t.dtype in FLOATS[:3] else t),
    st.lists(numbers, max_size=4),
    anything,
    st.just(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
    st.just(torch.nested.nested_tensor([torch.zeros(2)] * 3, layout=torch.jagged)),
    st.sampled_from([Future(), object(), print, np.float32(1), torch.Size([3]), iter([1.0])]),
)


@fuzz("rewards", 250, value=returned, offset=st.integers(0, 5))
def test_whatever_a_reward_returns_is_refused_in_a_sentence_or_is_three_finite_scores(value: Any, offset: int) -> None:
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)

    def scored() -> None:
        scores = score_one("mine", lambda images, prompts, **_: value, images, ["a", "b", "c"], offset=offset)
        assert (scores.shape, scores.dtype, scores.is_sparse, scores.requires_grad) == (
            (3,),
            torch.float32,
            False,
            False,
        )
        assert bool(scores.isfinite().all())

    message = refused(scored)
    assert message is None or "'mine'" in message


class _SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


@pytest.mark.parametrize(
    "raised",
    [
        SystemExit(0),
        StopIteration(),
        RecursionError(),
        MemoryError(),
        AssertionError(),
        _SilentError(),
        KeyError(3),
        OSError(5),
    ],
)
def test_whatever_a_reward_raises_names_the_reward(raised: BaseException) -> None:
    def broken(images: Tensor, prompts: list[str], **_: Any) -> Tensor:
        raise raised

    register("broken")(broken)
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for call in (
        lambda: score_one("broken", broken, images, ["a"]),
        lambda: WeightedRewards({"broken": 1.0})(images, ["a"]),
    ):
        assert "reward 'broken' failed" in (refused(call) or "")


BUILT_IN = ("jpeg_compressibility", "colorfulness")


@fuzz(
    "rewards",
    200,
    images=tensors
    | st.lists(st.integers(), max_size=2)
    | st.none()
    | st.builds(
        tensor,
        st.just(torch.uint8),
        st.tuples(st.integers(0, 2), st.integers(2, 4), st.integers(0, 9), st.integers(0, 9)).map(list),
        st.sampled_from([0.0, 7.0]),
    ),
    prompts=st.lists(st.text(max_size=3), max_size=3),
)
def test_images_of_any_shape_and_dtype_are_refused_in_a_sentence_or_scored(images: Any, prompts: list[str]) -> None:
    rewards = WeightedRewards(dict.fromkeys(BUILT_IN, 1.0))

    def scored() -> None:
        assert all(values.shape == (len(images),) for values in rewards.evaluate(images, prompts).values())

    refused(scored)


@fuzz(
    "rewards",
    100,
    name=st.text(max_size=12)
    | st.tuples(st.sampled_from(["pickscore", "hpsv2", "http", "https", "json", "os", ""]), st.text(max_size=10)).map(
        ":".join
    )
    | st.sampled_from(
        [
            "http://[",
            "http://a:b/",
            "https://x/#timeout=nan",
            "pickscore:batch_size=0",
            "aesthetic:device=x",
            "hpsv2:~nobody/x",
            "os:path.join.x",
            "a" * 300,
        ]
    ),
)
def test_a_reward_that_is_none_is_refused_in_a_sentence_or_found(name: str) -> None:
    refused(get, name)


PNG = base64.b64decode(encode_image(torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)))


def spoiled(data: bytes, edits: list[tuple[int, int]], length: int) -> bytes:
    """Some bytes replaced, and the end cut off."""
    copy = bytearray(data)
    for place, value in edits:
        copy[place % len(copy)] = value
    return bytes(copy[: max(0, len(copy) - length)])


edits = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4)


@fuzz("rewards", 200, edits=edits, cut=st.sampled_from([0, 0, 0, 1, 12, 40]), raw=st.none() | st.text(max_size=10))
def test_a_spoiled_picture_is_refused_in_a_sentence_or_unpacked(
    edits: list[tuple[int, int]], cut: int, raw: str | None
) -> None:
    text = base64.b64encode(spoiled(PNG, edits, cut)).decode() if raw is None else raw

    def unpacked() -> None:
        images = decode_images([text, text], 1 << 16)
        assert (images.dtype, images.shape[:2]) == (torch.uint8, (2, 3))

    refused(unpacked)


def test_a_picture_that_unpacks_to_gigabytes_is_refused_before_it_is() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (6_000, 2_000)).save(buffer, format="PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    with pytest.raises(EtudeError, match="more than 65536 pixels"):
        decode_images([text], 1 << 16)


bodies = st.one_of(
    st.binary(max_size=40),
    anything.map(json.dumps).map(str.encode),
    st.fixed_dictionaries(
        {
            "images": anything | st.lists(st.just(base64.b64encode(PNG).decode()) | st.text(max_size=4), max_size=3),
            "prompts": anything | st.lists(st.text(max_size=4), max_size=3),
        },
        optional={"metadata": anything, "extra": anything},
    )
    .map(json.dumps)
    .map(str.encode),
    st.sampled_from([b"[" * 5000, b'{"images": ' + b"9" * 5000]),
)


@fuzz("rewards", 150, body=bodies)
def test_a_request_gets_scores_or_a_reason_from_the_server(body: bytes) -> None:
    scorer = _Scorer("colorfulness", "", 1 << 20, 1 << 16)
    refusals = []
    try:
        scores = scorer._score(body)
    except _RefusedError as refusal:
        refusals.append(refusal)
    else:
        assert scores
        assert all(isinstance(value, float) for value in scores)
    assert all(refusal.status in (400, 422) and len(str(refusal)) < 2000 for refusal in refusals)


@fuzz(
    "rewards",
    100,
    text=st.binary(max_size=20)
    | anything.map(json.dumps).map(str.encode)
    | st.fixed_dictionaries({"scores": anything | st.lists(numbers, max_size=3)}).map(json.dumps).map(str.encode),
)
def test_an_answer_is_finite_scores_or_not_valid(text: bytes) -> None:
    try:
        answer = ScoreAnswer.model_validate_json(text)
    except ValidationError:
        return
    assert all(np.isfinite(answer.scores))


def test_fields_of_prompts_are_as_long_as_the_prompts() -> None:
    with pytest.raises(EtudeError, match="2 prompts but 1 entries"):
        PromptSet(["a", "b"], {"tag": [1]})

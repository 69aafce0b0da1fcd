"""A fingerprint tells whether a file has changed, from a small part of a large file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from etude import files
from etude.files import fingerprint, fingerprints
from support.fuzzing import fuzz, in_time


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights that counts as large: 40 tensors, one of them longer than a stride."""
    monkeypatch.setattr(files, "WHOLE", 1 << 15)
    monkeypatch.setattr(files, "SAMPLE", 64)
    monkeypatch.setattr(files, "STRIDE", 1 << 14)
    weights = {f"layer.{number}": torch.full((1000,), float(number)) for number in range(39)}
    save_file({**weights, "long": torch.zeros(40_000)}, tmp_path / "large.safetensors")
    return tmp_path / "large.safetensors"


def test_the_fingerprint_of_a_small_file_is_that_of_its_content(tmp_path: Path) -> None:
    for name, content in (("a", b"red heart"), ("b", b"red heart"), ("c", b"red hearT")):
        (tmp_path / name).write_bytes(content)
    os.utime(tmp_path / "b", (0, 0))
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("changed", ["layer.0", "layer.38", "long"])
def test_a_large_file_of_which_any_one_tensor_was_trained_is_another(large: Path, changed: str) -> None:
    before, size = fingerprint(large), large.stat().st_size
    weights = load_file(large)
    weights[changed] = weights[changed] + 1e-3
    save_file(weights, large)
    assert large.stat().st_size == size
    assert fingerprint(large) != before


def test_a_large_file_is_read_in_small_part(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, pread = [], os.pread

    def counted(descriptor: int, length: int, place: int) -> bytes:
        read.append(length)
        return pread(descriptor, length, place)

    monkeypatch.setattr(os, "pread", counted)
    fingerprint(large)
    assert sum(read) < large.stat().st_size / 10


def test_a_large_file_of_another_format_is_sampled_too(large: Path) -> None:
    large.write_bytes(b"\xff" * (1 << 18))
    before = fingerprint(large)
    large.write_bytes(b"\xff" * (1 << 17) + b"\xfe" * (1 << 17))
    assert fingerprint(large) != before


def test_a_file_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    assert list(fingerprints({"there": tmp_path / "there", "gone": tmp_path / "gone"})) == ["there"]


numbers = st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3) | st.none()
entries = st.dictionaries(st.text(max_size=4), st.dictionaries(st.just("data_offsets"), st.lists(numbers, max_size=3)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers") / "spoiled.safetensors"


@fuzz("headers of weights", 100, header=entries | numbers, length=st.integers(-1, 1) | st.integers(0, 2**64 - 1))
def test_any_header_of_a_large_file_is_read_in_time(place: Path, header: object, length: int) -> None:
    text = json.dumps(header).encode()
    stated = (len(text) + length if abs(length) < 2 else length) % 2**64
    place.write_bytes(stated.to_bytes(8, "little") + text + bytes(1 << 17))
    with pytest.MonkeyPatch.context() as patch, in_time():
        patch.setattr(files, "WHOLE", 1 << 15)
        assert len(fingerprint(place)) == 64

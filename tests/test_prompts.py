"""Prompt sets: what a file may hold, and what each mistake is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from etude.errors import EtudeError
from etude.prompts import load_prompts, prompt_set_names


def test_every_built_in_set_holds_distinct_lower_case_prompts() -> None:
    sizes = {"animals": 45, "emoji-40": 40, "emoji-eval": 64, "emoji-train": 120}
    assert prompt_set_names() == sorted(sizes)
    for name, size in sizes.items():
        prompts = load_prompts(name)
        assert len(prompts) == len(set(prompts)) == size
        assert all(prompt == prompt.strip().lower() for prompt in prompts)


def test_evaluation_emoji_are_never_trained_on() -> None:
    assert not set(load_prompts("emoji-train")) & set(load_prompts("emoji-eval"))


def test_the_animals_are_those_of_ddpo() -> None:
    animals = load_prompts("animals")
    assert animals[0] == "cat"
    assert animals[-1] == "kangaroo"
    assert {"llama", "hedgehog", "raccoon", "lizard"} <= set(animals)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_blank_lines_comments_and_a_byte_order_mark_are_no_prompts(tmp_path: Path, newline: str, mark: bytes) -> None:
    file = tmp_path / "prompts.txt"
    text = newline.join(["# a set", "", "  a red fox  ", "  # not me", "crème brûlée, 4k", "a # inside", "a red fox"])
    file.write_bytes(mark + text.encode())
    assert load_prompts(str(file)) == ["a red fox", "crème brûlée, 4k", "a # inside", "a red fox"]


def test_a_misspelt_set_suggests_the_nearest() -> None:
    with pytest.raises(EtudeError, match=r"'emoji-trian'.*did you mean 'emoji-train'"):
        load_prompts("emoji-trian")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no prompt"),
        (b"# only\n\n   \n", "holds no prompt"),
        (b"fine\nalso fine\nbad \xff byte\n", "line 3: byte 0xff is not UTF-8"),
        (b"fine\nbad \x00 byte\n", "line 2: it holds a NUL byte"),
        ("utf sixteen".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    ],
)
def test_a_file_that_holds_no_prompts_is_one_clear_sentence(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(EtudeError) as caught:
        load_prompts(str(file))
    assert str(file) in str(caught.value)
    assert reason in str(caught.value)
    assert "one" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(EtudeError, match=r"absent\.txt' does not exist"):
        load_prompts(str(tmp_path / "absent.txt"))
    with pytest.raises(EtudeError, match="is a directory"):
        load_prompts(str(tmp_path))
    with pytest.raises(EtudeError, match="unknown prompt set or file ''"):
        load_prompts("")

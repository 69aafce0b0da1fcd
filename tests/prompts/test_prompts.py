"""Prompt sets: what a source may hold, and what each mistake is called."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from etude.errors import EtudeError
from etude.prompts import PromptSet, clusters, load_prompts, overlap, part_of, prompt_set_names


def test_every_built_in_set_holds_distinct_lower_case_prompts() -> None:
    sizes = {"animals": 45, "animals-eval": 32, "emoji-40": 40, "emoji-8": 8, "emoji-eval": 64, "emoji-train": 120}
    assert prompt_set_names() == sorted(sizes)
    for name, size in sizes.items():
        prompts = load_prompts(name).texts
        assert len(prompts) == len(set(prompts)) == size
        assert all(prompt == prompt.strip().lower() for prompt in prompts)


def test_evaluation_emoji_are_never_trained_on() -> None:
    assert not set(load_prompts("emoji-train").texts) & set(load_prompts("emoji-eval").texts)
    assert set(load_prompts("emoji-8").texts) < set(load_prompts("emoji-train").texts)


def test_evaluation_animals_are_never_trained_on() -> None:
    assert overlap(load_prompts("animals"), load_prompts("animals-eval")) == []


def test_the_two_parts_of_a_source_are_a_tenth_and_the_rest_and_share_no_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    texts = [f"a picture of {i}" for i in range(2000)]
    file.write_text("".join(json.dumps({"prompt": t, "i": i}) + "\n" for i, t in enumerate([*texts, *texts[:50]])))
    train, held_out = load_prompts(f"{file}#train"), load_prompts(f"{file}#eval")
    assert 150 < len(held_out) < 260  # 2050 draws at 26/256: 208 on average, standard deviation 14
    assert sorted([*train.metadata["i"], *held_out.metadata["i"]]) == list(range(2050))
    assert train.metadata["i"] == sorted(train.metadata["i"]), "the order is the source's"
    assert overlap(train, held_out) == []


def test_a_prompts_part_depends_on_its_words_alone() -> None:
    assert [part_of(f"prompt {i}") for i in range(8)] == [part_of(f"  Prompt  {i} ") for i in range(8)]
    assert {text for text in load_prompts("emoji-train").texts if part_of(text) == "eval"} == set(
        load_prompts("emoji-train#eval").texts
    )


def test_a_part_without_prompts_is_said_and_a_file_of_that_name_wins(tmp_path: Path) -> None:
    alone = next(f"prompt {i}" for i in range(99) if part_of(f"prompt {i}") == "train")
    (tmp_path / "one.txt").write_text(alone)
    assert load_prompts(f"{tmp_path}/one.txt#train").texts == [alone]
    with pytest.raises(EtudeError, match=r"one.txt#eval' are none: all 1 of"):
        load_prompts(f"{tmp_path}/one.txt#eval")
    (tmp_path / "one.txt#eval").write_text("another")
    assert load_prompts(f"{tmp_path}/one.txt#eval").texts == ["another"]


def test_overlapping_prompts_are_told_in_order_whatever_their_case_and_blanks() -> None:
    assert overlap(PromptSet(["a Cat", "dog"]), PromptSet(["dog", "bird", "a  cat", "dog"])) == ["dog", "a  cat"]


def test_the_animals_are_those_of_ddpo() -> None:
    animals = load_prompts("animals").texts
    assert animals[0] == "cat"
    assert animals[-1] == "kangaroo"
    assert {"llama", "hedgehog", "raccoon", "lizard"} <= set(animals)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_blank_lines_comments_and_a_byte_order_mark_are_no_prompts(tmp_path: Path, newline: str, mark: bytes) -> None:
    file = tmp_path / "prompts.txt"
    text = newline.join(["# a set", "", "  a red fox  ", "  # not me", "crème brûlée, 4k", "a # inside", "a red fox"])
    file.write_bytes(mark + text.encode())
    assert load_prompts(str(file)) == PromptSet(["a red fox", "crème brûlée, 4k", "a # inside", "a red fox"])


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
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_file_that_holds_no_prompts_is_one_clear_sentence(
    tmp_path: Path, content: bytes, reason: str, suffix: str
) -> None:
    if suffix == "jsonl" and content.startswith(b"#"):
        content = b"\n  \n"  # JSON has no comments
    file = tmp_path / f"prompts.{suffix}"
    file.write_bytes(content)
    with pytest.raises(EtudeError) as caught:
        load_prompts(str(file))
    assert str(file) in str(caught.value)
    assert reason in str(caught.value)
    assert "one" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    for name in ("absent.txt", "absent.jsonl"):
        with pytest.raises(EtudeError, match=rf"{name}' does not exist"):
            load_prompts(str(tmp_path / name))
    with pytest.raises(EtudeError, match="is a directory"):
        load_prompts(str(tmp_path))
    with pytest.raises(EtudeError, match="unknown prompt set or file ''"):
        load_prompts("")


def test_every_field_of_a_json_line_but_the_prompt_is_metadata(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": " a cat ", "tag": "one", "count": 1}, {"tag": "two", "prompt": "two 🐈"}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert load_prompts(str(file)) == PromptSet(["a cat", "two 🐈"], {"tag": ["one", "two"], "count": [1, None]})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"', "line 2: it is not JSON"),
        ("[" * 100_000, "line 2: it is not JSON"),
        ('{"text": "a"}', "line 2: its prompt is None"),
        ('{"prompt": "  "}', r"line 2: its prompt is '  '"),
        ('{"prompt": 3}', "line 2: its prompt is 3"),
        ("[1, 2]", r"line 2: its prompt is \[1, 2\]"),
        ('{"prompt": "a", "images": 1}', "a field 'images'"),
    ],
)
def test_a_json_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(EtudeError, match=reason):
        load_prompts(str(file))


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_prompt_module", raising=False)
    return tmp_path / "my_prompt_module.py"


def test_a_function_may_return_strings_or_dicts(beside: Path) -> None:
    beside.write_text(
        "def texts():\n    return ['a', 'b']\n"
        "def records():\n    return ({'prompt': 'a', 'k': [1]}, {'prompt': 'b', 'k': [2]}, 'c')\n"
        "def nothing():\n    return []\n"
        "def one():\n    return 'a cat'\n"
        "def broken():\n    raise OSError('no disk')\n"
        "def bad():\n    return ['a', 7]\n"
    )
    assert load_prompts("my_prompt_module:texts") == PromptSet(["a", "b"])
    assert load_prompts("my_prompt_module:records") == PromptSet(["a", "b", "c"], {"k": [[1], [2], None]})
    for name, words in {
        "nothing": "holds no prompt",
        "one": "returned str",
        "broken": "failed: OSError: no disk",
        "bad": "entry 1: its prompt is 7",
        "absent": "no attribute 'absent'",
    }.items():
        with pytest.raises(EtudeError, match=words):
            load_prompts(f"my_prompt_module:{name}")
    with pytest.raises(EtudeError, match="cannot be imported"):
        load_prompts("no_such_module_at_all:f")


class Table(dict):
    """A dataset as `datasets` shows it: columns by name."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, dict[str, Any]]]:
    calls: list[tuple[str, Any, dict[str, Any]]] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> Table:
        calls.append((path, name, options))
        if path == "owner/private":
            raise PermissionError("log in")
        return Table(prompt=["a", " b "], caption=["c", "d"], tag=[1, 2], count=[3.0, 4.0])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_dataset_gives_a_column_and_the_metadata_that_is_asked_for(hub: list[Any]) -> None:
    assert load_prompts("hub:owner/set") == PromptSet(["a", "b"])
    query = "split=train+test[:9]&column=caption&metadata=tag,prompt&config=en&revision=abc"
    expected = PromptSet(["c", "d"], {"tag": [1, 2], "prompt": ["a", " b "]})
    assert load_prompts(f"hub:owner/set?{query}") == expected
    assert hub == [
        ("owner/set", None, {"split": "train", "revision": None}),
        ("owner/set", "en", {"split": "train+test[:9]", "revision": "abc"}),
    ]


def test_a_file_anywhere_is_a_dataset_of_its_format(hub: list[Any]) -> None:
    load_prompts("hub:csv?data_files=https://host/at/COMMIT/set.csv&column=caption")
    expected = {"split": "train", "revision": None, "data_files": "https://host/at/COMMIT/set.csv"}
    assert hub == [("csv", None, expected)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hub:owner/set?colum=caption", "did you mean 'column'"),
        ("hub:owner/set?split=a&split=b", "give an option twice"),
        ("hub:owner/set?column=captoin", "did you mean 'caption'"),
        ("hub:owner/set?metadata=tags", "did you mean 'tag'"),
        ("hub:?column=tag", "name no dataset"),
        ("hub:owner/set?column=tag", "row 0: its prompt is 1"),
        ("hub:owner/private", r"cannot be loaded \(PermissionError: log in\)"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_one_sentence(hub: list[Any], source: str, words: str) -> None:
    with pytest.raises(EtudeError, match=words):
        load_prompts(source)


def test_without_the_extra_a_dataset_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etude.prompts.find_spec", lambda name: None)
    with pytest.raises(EtudeError, match=r"pip install 'etude\[datasets\]'"):
        load_prompts("hub:owner/set")


def test_selected_prompts_keep_their_metadata() -> None:
    prompts = PromptSet(["a", "b", "c"], {"tag": [1, 2, 3]})
    assert prompts.select([2, 0, 2]) == PromptSet(["c", "a", "c"], {"tag": [3, 1, 3]})
    assert prompts.head(2) == PromptSet(["a", "b"], {"tag": [1, 2]})
    assert prompts.head(9) == prompts
    with pytest.raises(EtudeError, match="3 prompts but 2 entries in 'tag'"):
        PromptSet(["a", "b", "c"], {"tag": [1, 2]})


TWO = PromptSet(["a cat", "two\ndogs, 4k"], {"tag": ["one", "two"]})
OBJECTS = [{"prompt": "a cat", "tag": "one"}, {"prompt": "two\ndogs, 4k", "tag": "two"}]
ROWS = 'prompt,tag\na cat,one\n\n"two\ndogs, 4k",two\n'


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("set.json", json.dumps(OBJECTS), TWO),
        ("set.json", json.dumps(OBJECTS, indent=2), TWO),
        ("set.JSON", json.dumps(OBJECTS), TWO),
        ("set.json", "".join(json.dumps(each) + "\n" for each in OBJECTS), TWO),
        ("set.ndjson", "".join(json.dumps(each) + "\n\n" for each in OBJECTS), TWO),
        ("set.txt", json.dumps(OBJECTS, indent=2), TWO),
        ("set", "\ufeff\n" + "".join(json.dumps(each) + "\n" for each in OBJECTS), TWO),
        ("set.json", json.dumps(TWO.texts), PromptSet(TWO.texts)),
        ("set.txt", json.dumps(TWO.texts, indent=1), PromptSet(TWO.texts)),
        ("set.json", '{"prompt": "a cat"}', PromptSet(["a cat"])),
        ("set.csv", ROWS, TWO),
        ("set.csv", ROWS.replace("\n", "\r\n"), PromptSet(["a cat", "two\r\ndogs, 4k"], TWO.metadata)),
        ("set.tsv", "tag\tprompt\none\ta cat\n", PromptSet(["a cat"], {"tag": ["one"]})),
        ("set.txt", "[photo] a cat\n{x}\n", PromptSet(["[photo] a cat", "{x}"])),
        ("set.txt", "prompt,tag\na, b\n", PromptSet(["prompt,tag", "a, b"])),
    ],
)
def test_a_structured_file_is_read_as_what_it_is(tmp_path: Path, name: str, text: str, prompts: PromptSet) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert load_prompts(str(tmp_path / name)) == prompts
    assert load_prompts(f"{tmp_path / name}#train").texts == [t for t in prompts.texts if part_of(t) == "train"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("set.parquet", b"PAR1\x15\x04\x00PAR1", "is Parquet, which is not read: .*hub: and its directory"),
        ("set.txt", b"PAR1\x15\x04\x00PAR1", "is Parquet, which is not read"),
        ("set.arrow", b"ARROW1\0\0", "is Arrow"),
        ("set.xlsx", b"PK\x03\x04..", "is Excel"),
        ("set.zip", b"PK\x03\x04..", "is ZIP"),
        ("set.jsonl.gz", b"\x1f\x8b\x08..", "is gzip"),
        ("set.txt", b"\x28\xb5\x2f\xfd..", "is Zstandard"),
        ("set.npy", b"\x93NUMPY", "is NumPy"),
        ("set.pkl", b"\x80\x04.", "is pickle"),
        ("set.db", b"SQLite format 3\0", "is SQLite"),
        ("set.yaml", b"- a cat\n- a dog\n", "is YAML, which is not read: write one prompt per line, a JSON list"),
        ("set.YML", b"prompts: [a cat]\n", "is YAML"),
        ("set.toml", b'prompts = ["a cat"]\n', "is TOML"),
        ("set.txt", b'<?xml version="1.0"?>\n<p>a cat</p>', "is XML"),
        ("set.html", b"<p>a cat</p>", "is HTML"),
        ("set.json", b'["a cat",\n', "is not JSON"),
        ("set.json", b"a cat\n", "is not JSON"),
        ("set.txt", b'[\n "red heart",\n "pizza",\n]', "is not JSON"),
        ("set.txt", b'{"prompt": "a cat"}\n{"prompt": \n', "line 2: it is not JSON"),
        ("set.json", b"3", "holds int: give a JSON list"),
        ("set.json", b'{"prompts": ["a cat"]}', "holds an object of 'prompts': give a JSON list"),
        ("set.txt", b'{"prompt": ["a cat"], "tag": [1]}', "holds an object of 'prompt', 'tag'"),
        ("set.json", b'["a cat", 3]', "entry 1: its prompt is 3"),
        ("set.json", b'["a cat", ""]', "entry 1: its prompt is ''"),
        ("set.json", b"[]", "holds no prompt"),
        ("set.json", b"[" * 100_000, "is not JSON"),
        ("set.csv", b"a cat\na dog\n", "its first line names the columns 'a cat'; .* 'prompt'"),
        ("set.csv", b"prompt;tag\na;b\n", "names the columns 'prompt;tag'"),
        ("set.csv", b"prompt,prompt\na,b\n", "a name of its own"),
        ("set.csv", b"prompt,tag\na cat, in the sea,1\n", "line 2: it has 3 of 2 cells"),
        ("set.csv", b'prompt\n"a cat\n', "line 2: it is no row of a table"),
        ("set.csv", b"prompt,tag\n,b\n", "line 2: its prompt is ''"),
        ("set.csv", b"prompt\n", "holds no prompt"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EtudeError, match=reason) as caught:
        load_prompts(str(tmp_path / name))
    assert f"'{tmp_path / name}'" in str(caught.value)


def test_repeated_prompts_are_one_cluster_whatever_their_case_and_blanks() -> None:
    assert clusters(["moon", "a cat", "Moon ", "sea", "a  CAT", "moon"]) == [0, 1, 0, 3, 1, 0]
    assert clusters(load_prompts("emoji-eval").texts) == list(range(64))

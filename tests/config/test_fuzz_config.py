"""Configurations of every kind of nonsense: refused in one sentence, or read into a run that its own YAML reproduces."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from typer.testing import CliRunner

from etude.bench.protocol import Pinned, read_protocol
from etude.cli.app import app
from etude.config import describe_fields, load_config, parse_config, parse_rewards, parse_sampler, recipe_text
from etude.config.tree import set_key
from etude.config.yaml_text import DEEPEST, LONGEST, MOST_VALUES, parse_yaml
from etude.errors import EtudeError
from etude.prompts import PromptSet
from etude.study.study_file import parse_study
from support.fuzzing import check_sentence, contents, fuzz, refused

KEYS = [key for key, _, _ in describe_fields()]
EXTREME = [0, -1, 1, 2, 10**30, -(10**30), 0.0, -0.0, 1e-320, 1e308, float("inf"), float("nan"), True, None]
scalars = st.one_of(
    st.sampled_from(EXTREME), st.integers(), st.floats(), st.text(max_size=20), st.booleans(), st.dates()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | scalars, inner, max_size=4),
    max_leaves=8,
)
keys = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(KEYS).map(lambda key: key.rpartition(".")[0] or key),
    st.sampled_from(KEYS).map(lambda key: key[:-1]),
    st.text(min_size=1, max_size=12),
)
TOKENS = [
    "seed: 1",
    "sampling:",
    "  eta: 0.5",
    "  eta: [1, 2]",
    "\n",
    "  ",
    "- ",
    "a",
    ": ",
    "&x ",
    "*x",
    "*y",
    "<<: *x",
    "? ",
    "| ",
    "> ",
    "!!int ",
    '!!int ""',
    "!!float x",
    "!!bool maybe",
    "!!timestamp x",
    "!!binary x",
    "!!set {a}",
    "!!omap [a: 1]",
    "!!python/object/apply:os.system [id]",
    "!!python/name:os.system",
    "!x ",
    "%YAML 9.9",
    "---",
    "...",
    "{",
    "}",
    "[",
    "]",
    ",",
    "'",
    '"',
    "\\x",
    "\t",
    "#",
    "2001-99-99",
    "2001-01-01",
    "1:99:99",
    "0x" + "f" * 5000,
    "9" * 5000,
    "0b2",
    "1e999",
    ".nan",
    ".inf",
    "~",
    "yes",
    "=",
    "\0",
    "\ufeff",
    "\u202e",
    "😀",
    "\ud83d",
    "\x85",
    "rewards:",
    "  alignment: 1",
    "  m:f: 1",
    "window: {size: 3}",
    "null: null",
    "1: 2",
    "[1]: 2",
    "seed: 2",
]


def holds(tree: dict[Any, Any]) -> None:
    """A tree that is accepted is a run that its own config.yaml reproduces."""
    config = parse_config(tree)
    again = parse_config(parse_yaml(config.to_yaml(), "config.yaml"))
    assert again.model_dump() == config.model_dump()


@fuzz("configurations", 300, changes=st.lists(st.tuples(keys, values), min_size=1, max_size=5))
def test_a_tree_is_refused_in_a_sentence_or_reproduces_itself(changes: list[tuple[str, Any]]) -> None:
    tree: dict[str, Any] = {}
    for key, value in changes:
        refused(set_key, tree, key, value, "here")
    refused(holds, tree)


@fuzz("configurations", 100, tree=st.dictionaries(scalars | st.sampled_from(KEYS), values, max_size=4))
def test_a_tree_with_keys_that_are_no_texts_is_refused_in_a_sentence(tree: dict[Any, Any]) -> None:
    refused(holds, tree)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@fuzz("configurations", 200, parts=st.lists(st.sampled_from(TOKENS) | st.text(max_size=6), max_size=12))
def test_a_recipe_file_is_refused_in_a_sentence_or_read(place: Path, parts: list[str]) -> None:
    file = place / "mine.yaml"
    file.write_bytes("".join(parts).encode("utf-8", "surrogatepass"))
    refused(load_config, str(file))


@fuzz("configurations", 100, data=st.binary(max_size=200))
def test_a_binary_recipe_file_is_refused_in_a_sentence(place: Path, data: bytes) -> None:
    file = place / "mine.yaml"
    file.write_bytes(data)
    refused(load_config, str(file))


@fuzz("configurations", 80, edits=st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(TOKENS)), max_size=3))
def test_a_recipe_with_nonsense_in_the_middle_is_refused_in_a_sentence_or_read(
    place: Path, edits: list[tuple[int, str]]
) -> None:
    text = recipe_text("emoji-mixgrpo")
    for where, token in edits:
        where %= len(text)
        text = text[:where] + token + text[where:]
    file = place / "mine.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(load_config, str(file))


arguments = st.lists(
    st.one_of(
        st.tuples(keys, st.sampled_from(TOKENS) | st.text(max_size=8)).map("=".join),
        st.text(max_size=20),
        st.sampled_from(["=", "a.=1", ".=1", "..", "rewards.=1", "rewards.a=b=1", "seed={a: *b}"]),
    ),
    max_size=3,
)


@fuzz("configurations", 150, items=arguments)
def test_overrides_and_rewards_are_refused_in_a_sentence_or_taken(place: Path, items: list[str]) -> None:
    file = place / "short.yaml"
    file.write_text("evaluation: {held_out_rewards: [alignment]}")
    refused(load_config, str(file), items)
    refused(load_config, str(file), None, parse_rewards(items))


@fuzz(
    "configurations",
    100,
    tree=st.fixed_dictionaries(
        {"name": st.just("s") | values, "base": st.sampled_from(["emoji-ddpo", "absent", {}, {"seed": 1}, 3])},
        optional={
            "grids": values
            | st.fixed_dictionaries({"keys": st.dictionaries(keys, st.lists(values, max_size=3), max_size=2)}),
            "cells": values | st.lists(st.dictionaries(keys, values, max_size=2), max_size=2),
            "seeds": values,
            "overrides": st.dictionaries(keys, values, max_size=2),
            "baseline": values,
            "measurement": values,
        },
    ),
)
def test_a_study_is_refused_in_a_sentence_or_laid_out(tree: dict[str, Any]) -> None:
    refused(parse_study, tree)


options = st.lists(
    st.one_of(
        st.sampled_from(
            ["train", "recipes", "sample", "gap", "report", "study", "models", "--help", "--version", "serve-reward"]
        ),
        st.sampled_from(
            [
                "--set",
                "--out",
                "--resume",
                "--reward",
                "--model",
                "--dry-run",
                "--keys",
                "--eta",
                "--prompt",
                "--lora",
                "--dtype",
            ]
        ),
        st.sampled_from(
            [
                "--eta=nan",
                "--steps=0",
                "--steps=-1",
                "--guidance=inf",
                "--seed=-1",
                "--port=70000",
                "--images=1e9",
                "--lora=~nobody/x",
            ]
        ),
        st.sampled_from(
            ["absent", "./absent", "~nobody/x", "a" * 300, "x:y", "\ud83d", "\u202e", "-", "--", "", "nan", "a\0b"]
        ),
        st.text(max_size=8),
    ),
    max_size=6,
)


@fuzz("command lines", 80, words=options)
def test_a_command_line_ends_with_a_sentence_and_writes_nothing(
    place: Path, monkeypatch_module: pytest.MonkeyPatch, words: list[str]
) -> None:
    empty = place / "work"
    empty.mkdir(exist_ok=True)
    monkeypatch_module.chdir(empty)
    result = CliRunner().invoke(app, ["train", "absent", *words] if words[:1] != ["recipes"] else words)
    assert result.exit_code in (0, 1, 2), (words, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    assert "defect" not in result.output, (words, result.output)
    check_sentence(result.output) if result.exit_code else None
    assert contents(empty) == {}


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def laughs(depth: int, width: int = 10) -> str:
    """A few hundred bytes that stand for width^depth values."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines)


def test_aliases_cannot_stand_for_more_values_than_a_file_may_hold(place: Path) -> None:
    file = place / "laughs.yaml"
    file.write_text(f"rewards:\n  a: 1\n{laughs(30)}")
    start = time.process_time()
    message = refused(load_config, str(file))
    assert message is not None
    assert f"stands for more than {MOST_VALUES} values" in message
    assert time.process_time() - start < 5
    assert parse_yaml("a: &x [1, 2]\nb: *x", "here") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: &x [*x]", "an alias stands for a value that contains it"),
        ("seed: 1\nseed: 2", "the key 'seed' is there twice"),
        ("[" * 1100, "nests values deeper"),
        ("a: " + "[" * (DEEPEST + 5) + "]" * (DEEPEST + 5), f"deeper than {DEEPEST} levels"),
        ("a" * (LONGEST + 1), "longer than"),
        ("seed: !!python/object/apply:os.system [id]", "is no setting"),
        ("seed: !!timestamp 2001-01-01", "write a number, or a text in quotes"),
        ('seed: !!int ""', "is not valid YAML"),
        ("seed: !!bool maybe", "is not valid YAML"),
        ("seed: " + "9" * 5000, "is not valid YAML"),
    ],
)
def test_yaml_holds_plain_values_once_and_in_bounds(text: str, part: str) -> None:
    with pytest.raises(EtudeError, match=part):
        parse_yaml(text, "here")


def test_a_number_too_long_to_be_written_is_refused_without_writing_it() -> None:
    message = refused(parse_config, {"seed": -(16**5000)})
    assert message is not None
    assert "a int too long to show" in message


SIZES = [
    "iterations",
    "seed",
    "resolution",
    "lora.rank",
    "sampling.num_steps",
    "rollout.images_per_iteration",
    "evaluation.num_images",
    "evaluation.num_steps",
]


@pytest.mark.parametrize("key", [*SIZES, "evaluation.grid_images"])
def test_a_size_that_no_machine_has_is_refused_before_anything_is_made_of_it(key: str) -> None:
    tree: dict[str, Any] = {}
    set_key(tree, key, 2**63, "here")
    with pytest.raises(EtudeError, match=f"{key} = {2**63}: input should be less than"):
        parse_config(tree)


def test_a_recipe_file_that_is_no_file_is_named() -> None:
    assert "is no file" in (refused(load_config, "/dev/zero") or "")
    assert "unknown recipe" in (refused(load_config, "a" * 300) or "")


def test_as_many_cases_are_drawn_as_the_security_page_says() -> None:
    """Each test fails if it draws fewer than it declares, so that the sum of what they declare is how many run."""
    tests = Path(__file__).parents[1]
    declared = [
        int(count)
        for file in sorted(tests.glob("*/test_*.py"))
        for count in re.findall(r"^@fuzz\(\s*\"[a-z ]+\",\s*(\d+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sum(declared) >= 2000
    assert f"{sum(declared):,} cases" in (tests.parent / "SECURITY.md").read_text(encoding="utf-8")


PARTS = [
    "heun",
    "ode",
    "eta",
    "steps",
    "guidance",
    "size",
    "kernel",
    "cps",
    "first_step",
    "=",
    ",",
    "1",
    "-1",
    "1e9",
    "nan",
    "yes",
]


@fuzz("samplers", 300, text=st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PARTS), max_size=9).map("".join)))
def test_any_text_is_a_sampler_or_one_sentence(text: str) -> None:
    if refused(parse_sampler, text) is None:
        settings = parse_sampler(text)
        settings.sampler()
        assert (
            parse_sampler(",".join(f"{k}={v}" for k, v in settings.model_dump(exclude_none=True).items())) == settings
        )


LINES = [
    "name: p",
    "prompts: emoji-eval",
    "rewards: [colorfulness]",
    "sampler: {steps: 3}",
    "sampler: {eta: x}",
    "seed: -1",
]
LINES += [
    "samplers: [{solver: heun, eta: 1}]",
    "num_prompts: 0",
    "sensitivity: {steps: [0]}",
    "rewards: {}",
    "dtype: int8",
]


@fuzz("protocols", 150, lines=st.lists(st.sampled_from(LINES) | st.text(max_size=12), max_size=7))
def test_any_file_is_a_protocol_or_one_sentence(lines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    if refused(read_protocol, str(file)) is None:
        refused(lambda: Pinned(read_protocol(str(file)), PromptSet(["sun"])).variations)
    assert list(contents(tmp_path)) == ["p.yaml"]

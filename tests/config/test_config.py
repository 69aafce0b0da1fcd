"""The configuration reproduces itself, refuses what it does not know, and says what to write instead."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from etude.config import (
    TrainConfig,
    WindowConfig,
    describe_fields,
    difference,
    load_config,
    parse_config,
    parse_rewards,
    recipe_names,
    recipe_text,
)
from etude.config.yaml_text import dump_yaml, parse_yaml
from etude.errors import EtudeError


def failure(source: str, *overrides: str) -> str:
    with pytest.raises(EtudeError) as caught:
        load_config(source, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_its_resolved_file_gives_the_same_configuration(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(str(file)) == config
    assert recipe_text(name).startswith("# ")


def test_awkward_values_survive_the_resolved_file(tmp_path: Path) -> None:
    config = load_config("emoji-ddpo", ["optimizer.learning_rate=1e-7", "sampling.eta=0.1", "prompts.train=é x.txt"])
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert config.optimizer.learning_rate == 1e-7


def test_overrides_are_applied_in_order_and_read_as_yaml() -> None:
    config = load_config("sd15-ddpo", ["seed=1", "seed=2", "lora.targets=[to_q, to_k]", "optimizer.learning_rate=1e-4"])
    assert config.seed == 2
    assert config.lora.targets == ["to_q", "to_k"]
    assert config.optimizer.learning_rate == 1e-4


def test_giving_one_clip_range_takes_back_the_other() -> None:
    config = load_config("sd15-ddpo", ["objective.clip_nats=1.6"])
    assert (config.objective.clip_range, config.objective.clip_nats) == (None, 1.6)
    config = load_config("emoji-ddpo", ["objective.clip_range=1e-3"])
    assert (config.objective.clip_range, config.objective.clip_nats) == (1e-3, None)


def test_a_window_can_be_made_changed_and_closed_by_overrides() -> None:
    assert load_config("sd15-ddpo").sampling.window is None
    made = load_config("sd15-ddpo", ["sampling.window.size=3", "sampling.window.strategy=random"]).sampling.window
    assert made == WindowConfig(size=3, strategy="random")
    assert load_config("sd15-ddpo", ["sampling.window={}"]).sampling.window == WindowConfig()
    assert load_config("sd15-ddpo", ["sampling.window.size=3", "sampling.window=null"]).sampling.window is None


def test_the_first_difference_is_named_down_to_the_windows_fields() -> None:
    plain, windowed = load_config("sd15-ddpo"), load_config("sd15-ddpo", ["sampling.window.size=3"])
    wider = load_config("sd15-ddpo", ["sampling.window.size=5"])
    assert difference(plain, plain) is None
    assert difference(plain, load_config("sd15-ddpo", ["sampling.eta=2"])) == ("sampling.eta", 1.0, 2.0)
    assert difference(windowed, wider) == ("sampling.window.size", 3, 5)
    key, old, new = difference(plain, windowed) or ("", None, None)
    assert (key, old, new["size"]) == ("sampling.window", None, 3)


def test_a_stride_that_passes_over_steps_is_refused() -> None:
    assert "would pass over steps" in failure("sd15-ddpo", "sampling.window.stride=5")


def test_the_flash_recipe_differs_from_mixgrpo_by_the_compression_alone() -> None:
    assert difference(load_config("emoji-mixgrpo"), load_config("emoji-mixgrpo-flash")) == (
        "sampling.window.compression",
        None,
        0.4,
    )
    assert (
        load_config("emoji-mixgrpo", ["sampling.window.compression=0.4"]).model_dump()
        == load_config("emoji-mixgrpo-flash").model_dump()
    )


def test_one_tracker_needs_no_list() -> None:
    assert load_config("sd15-ddpo", ["trackers=tensorboard"]).trackers == ["tensorboard"]


def test_a_reward_by_import_path_can_be_set() -> None:
    assert load_config("sd15-ddpo", ["rewards.my.module:score=0.5"]).rewards["my.module:score"] == 0.5


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sampling.eat=1", ["unknown key 'sampling.eat'", "did you mean 'sampling.eta'?"]),
        ("eta=1", ["unknown key 'eta'", "did you mean 'sampling.eta'?"]),
        ("smapling.eta=1", ["unknown key 'smapling'", "did you mean 'sampling'?"]),
        ("lora.rnk=1", ["unknown key 'lora.rnk'", "did you mean 'lora.rank'?"]),
        ("sampling.eta=-1", ["sampling.eta = -1", "greater than or equal to 0"]),
        ("sampling.eta=nan", ["sampling.eta = 'nan'", "finite"]),
        ("sampling.eta=.inf", ["sampling.eta = inf", "finite"]),
        ("sampling.eta=much", ["sampling.eta = 'much'", "valid number"]),
        ("sampling.num_steps=0", ["sampling.num_steps = 0", "greater than or equal to 1"]),
        ("sampling.num_steps=1.5", ["sampling.num_steps = 1.5", "integer"]),
        (
            "sampling.kernel=euler",
            ["sampling.kernel = 'euler'", "the choices are churn, cps, dance_precise, dance_sde, ddim"],
        ),
        ("sampling.first_step=euler", ["sampling.first_step = 'euler'", "'ode', 'sde' or 'capped'"]),
        ("sampling.window.size=0", ["sampling.window.size = 0", "greater than or equal to 1"]),
        ("sampling.window.size=51", ["a window of size 51 does not fit in steps 0 to 49", "lower window.size"]),
        ("sampling.window.start=47", ["a window of size 4 does not fit in steps 47 to 49"]),
        ("sampling.window.end=51", ["window.end = 51 is beyond num_steps = 50"]),
        ("sampling.window.strategy=slow", ["sampling.window.strategy = 'slow'", "the choices are decay, fixed"]),
        ("sampling.window.compression=0", ["sampling.window.compression = 0", "greater than 0"]),
        ("sampling.window.compression=1.5", ["sampling.window.compression = 1.5", "less than or equal to 1"]),
        ("sampling.window.siez=1", ["unknown key 'sampling.window.siez'", "did you mean 'sampling.window.size'?"]),
        ("window.size=1", ["unknown key 'window'", "did you mean 'sampling.window'?"]),
        ("rollout.shared_noise=true", ["rollout.shared_noise needs rollout.images_per_prompt of at least 2"]),
        ("evaluation.num_steps=0", ["evaluation.num_steps = 0", "greater than or equal to 1"]),
        ("resolution=0", ["resolution = 0", "greater than or equal to 8"]),
        ("rollout.images_per_prompt=7", ["is not a multiple of rollout.images_per_prompt = 7"]),
        ("rewards={}", ["rewards", "at least 1"]),
        ("rewards.jpeg_compressibility=0", ["every weight in rewards must be finite and not 0"]),
        ("objective.kind=reinforced", ["objective.kind = 'reinforced'", "did you mean 'reinforce'"]),
        ("advantage.kind=groups", ["advantage.kind = 'groups'", "did you mean 'group'"]),
        ("family=FluxPipelin", ["family = 'FluxPipelin'", "did you mean 'FluxPipeline'"]),
        ("trackers=[mlflow]", ["trackers.0 = 'mlflow'", "'tensorboard'"]),
        ("seed", ["--set takes key=value", "'seed'"]),
        ("=3", ["--set takes key=value"]),
        ("seed=[", ["not a YAML value"]),
        ("model.x=1", ["'model' is a value, not a section"]),
    ],
)
def test_a_bad_override_is_one_sentence_with_the_remedy(override: str, parts: list[str]) -> None:
    message = failure("sd15-ddpo", override)
    assert [part for part in parts if part not in message] == []


LOOKS = {
    "010": 10, "008": 8, "-07": -7, "1_000": 1000, "0x1F": 31, "1e-4": 1e-4, "1e5": 1e5, ".5": 0.5, "012.5": 12.5, "1_0.5": 10.5,
    "-.inf": -math.inf, "true": True, "False": False, "null": None, "~": None, "": None, "!!int 010": 10, "!!float 010": 10.0,
    **{text: text for text in ("0o10", "0b11", "1:30", "190:20:30", "1:30.5", "2026-01-02", "2026-01-02 03:04:05", "=", "1__0", "_1")},
    **{text: text for text in ("yes", "no", "on", "off", "Yes", "OFF", "y", "n", "nan", "inf", "1e", "0x", "+", ".")},
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), LOOKS.items())
def test_a_value_without_quotes_is_what_it_looks_like(text: str, value: object) -> None:
    read = parse_yaml(f"key: {text}", "the file")["key"]
    assert (read, isinstance(read, bool), isinstance(read, str)) == (
        value,
        isinstance(value, bool),
        isinstance(value, str),
    )


@pytest.mark.parametrize("text", [*LOOKS, "a # b", "#", "- a", "{a", "<<", "'", "!!int 3", "\u00e9"])
def test_a_text_keeps_its_look_in_a_written_file_whatever_reads_it(text: str) -> None:
    written = dump_yaml({"key": text, text: "key"})
    assert parse_yaml(written, "the file") == {"key": text, text: "key"}
    assert yaml.safe_load(written) == {"key": text, text: "key"}


@pytest.mark.parametrize("text", ["!!int 1:30", "!!bool yes", "!!float 1:30", "!!int yes"])
def test_a_tag_makes_no_number_of_what_looks_like_none(text: str) -> None:
    with pytest.raises(EtudeError, match="is no"):
        parse_yaml(f"key: {text}", "the file")


@pytest.mark.parametrize("text", ["yes", "on", "true", "1:30", "2026-01-02", "0o10", "1 # one", "1 2"])
@pytest.mark.parametrize("key", ["seed", "sampling.eta", "iterations", "rollout.reward_timeout", "lora.rank"])
def test_nothing_but_a_number_is_a_number(key: str, text: str, tmp_path: Path) -> None:
    assert "--set" in failure("sd15-ddpo", f"{key}={text}") or key in failure("sd15-ddpo", f"{key}={text}")
    if "#" not in text:
        section, _, leaf = key.rpartition(".")
        (tmp_path / "mine.yaml").write_text(f"{section}:\n  {leaf}: {text}\n" if section else f"{leaf}: {text}\n")
        assert key in failure(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("override", ["rewards={a: true}", "lora.targets=[yes, true]", "sampling.eta=[1, true]"])
def test_true_is_no_number_and_no_text_inside_a_list_or_a_mapping(override: str) -> None:
    assert "true and false are no numbers" in failure("sd15-ddpo", override)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("seed", "010"),
        ("iterations", "5"),
        ("sampling.eta", "1.2"),
        ("sampling.guidance_scale", "1.2"),
        ("memory.offload", "yes"),
        ("memory.offload", "on"),
        ("memory.offload", "true"),
        ("rollout.batch_size", "8"),
        ("rewards.colorfulness", "1"),
        ("evaluation.deployment", "{steps: '3'}"),
    ],
)
def test_a_text_in_quotes_is_no_number_and_no_truth_value(key: str, text: str) -> None:
    quoted = text if text.startswith("{") else f"'{text}'"
    assert key.rpartition(".")[2] in failure("sd15-ddpo", f"{key}={quoted}")
    if not text.startswith("{"):
        with pytest.raises(EtudeError, match=re.escape(f"the text '{text}' is no number and no truth value")):
            load_config("sd15-ddpo", {key: text})


def test_a_text_in_quotes_is_a_text_where_one_is_taken() -> None:
    config = load_config("sd15-ddpo", ["rollout.batch_size='auto'", "prompts.train='010'", "lora.targets=['1', to_q]"])
    assert (config.rollout.batch_size, config.prompts.train, config.lora.targets[0]) == ("auto", "010", "1")


def test_a_reward_with_two_weights_is_refused() -> None:
    assert parse_rewards(["a", "a=1", "b=2"]) == {"a": 1.0, "b": 2.0}
    with pytest.raises(EtudeError, match="'a' is given the weights 1 and 2"):
        parse_rewards(["a", "a=2"])


def test_padded_seeds_are_different_runs() -> None:
    seeds = [load_config("sd15-ddpo", [f"seed={seed:03d}"]).seed for seed in range(12)]
    assert seeds == list(range(12))


@pytest.mark.parametrize("word", ["yes", "no", "on", "off"])
def test_a_word_that_was_a_truth_value_is_one_where_only_that_can_be_meant(word: str) -> None:
    config = load_config("emoji-mixgrpo", [f"sampling.window.roll_back={word}"])
    assert config.sampling.window is not None
    assert config.sampling.window.roll_back is (word in {"yes", "on"})
    assert load_config("sd15-ddpo", [f"model={word}"]).model == word
    assert "write true or false" in failure("sd15-ddpo", f"objective.options={{flag: {word}}}")
    assert load_config("sd15-ddpo", [f"objective.options={{flag: '{word}'}}"]).objective.options == {"flag": word}


@pytest.mark.parametrize(
    "text", ["1000", "010", "1e5", "no", "2026-01-02", "my #1 list.txt", "[a].txt", "a: b", "@a", "#"]
)
def test_set_takes_a_text_as_it_stands(text: str) -> None:
    for key in ("model", "prompts.train", "pipeline_config"):
        config = load_config("sd15-ddpo", [f"{key}={text}"]).model_dump()
        for part in key.split("."):
            config = config[part]
        assert config == text
    assert load_config("sd15-ddpo", [f"model={json.dumps(text)}"]).model == text
    config = load_config("sd15-ddpo", {"pipeline_config": "x"})
    assert load_config(config, ["pipeline_config=null"]).pipeline_config is None


@pytest.mark.parametrize("override", ["seed=1 # x", "rewards={a: 1} # b", "lora.targets=[to_q] #", "dtype=float32 # x"])
def test_set_cuts_nothing_off_a_value(override: str) -> None:
    assert "which YAML takes for a comment" in failure("sd15-ddpo", override)


def test_several_mistakes_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("sed: 1\nsampling: {eta: -1, nums: 3}\n")
    message = failure(str(file))
    assert f"'{file}' (and 2 more errors there)" in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a: [", "is not valid YAML"),
        (b"- a\n", "must hold a mapping of configuration keys, not list"),
        (b"", "must hold a mapping of configuration keys, not NoneType"),
        (b"model: \xff\n", "cannot be read as UTF-8 text"),
        (b"1: 2\n", "1"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes, part: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    message = failure(str(file))
    assert str(file) in message
    assert part in message


def test_a_recipe_that_does_not_exist_suggests_the_nearest(tmp_path: Path) -> None:
    assert "unknown recipe 'emoji-dpo': did you mean 'emoji-ddpo'?" in failure("emoji-dpo")
    assert "does not exist" in failure(str(tmp_path / "absent.yaml"))
    assert "is a directory" in failure(str(tmp_path))


def test_a_directory_named_like_a_recipe_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "emoji-ddpo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("emoji-ddpo").model == "emoji-sd"


def test_a_configuration_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValidationError):
        load_config("emoji-ddpo").seed = 3  # type: ignore[misc]


def nested(fields: list[tuple[str, Any, str]]) -> dict[str, Any]:
    """The tree of the described defaults; what an absent section would hold is left out."""
    absent = tuple(f"{key}." for key, default, _ in fields if default is None)
    tree: dict[str, Any] = {}
    for key, default, _ in fields:
        *sections, name = key.split(".")
        target = tree
        for section in sections:
            target = target.setdefault(section, {}) if not key.startswith(absent) else {}
        target[name] = default
    return tree


def test_every_field_has_a_help_line_and_the_defaults_are_valid() -> None:
    fields = list(describe_fields())
    assert [key for key, _, text in fields if len(text) < 15] == []
    assert len({key for key, _, _ in fields}) == len(fields)
    assert parse_config(nested(fields)) == TrainConfig()
    assert yaml.safe_load(TrainConfig().to_yaml()) == TrainConfig().model_dump(mode="json")

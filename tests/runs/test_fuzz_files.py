"""Adapters, models, checkpoints and run directories with wrong or malicious content: refused in one sentence, and left as they were."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import struct
import warnings
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

from etude.cli.watch import look, view
from etude.config import LoraConfig, TrainConfig, parse_config
from etude.errors import EtudeError
from etude.policies.adapter_file import METADATA, WEIGHTS, read_adapter
from etude.policies.loading import load_policy
from etude.report import write_report
from etude.rewards.models.weights import read_tensors, weights_of
from etude.runs.checkpoint import STATE, TENSORS, Checkpoints, load_latest, prune, save_checkpoint
from etude.runs.layout import truncate_metrics
from etude.runs.reader import read_run
from support.fuzzing import contents, fuzz, in_time, refused
from support.tiny import save_stable_diffusion

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
edits = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run exports."""
    policy = load_policy(str(model))
    policy.add_lora(LoraConfig(rank=2, alpha=2.0, targets=["to_q", "to_v"]), seed=0)
    directory = tmp_path_factory.mktemp("adapter")
    policy.export(directory)
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spoiled")


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file: Path, header: Any, body: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return file.parent


def spoiled(data: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    copy = bytearray(data)
    for where, value in changes:
        copy[where % min(len(copy), 4000)] = value  # mostly in the header, where it matters
    return bytes(copy[: max(0, len(copy) - cut)])


@fuzz("adapters", 150, changes=edits, cut=st.sampled_from([0, 0, 0, 1, 8, 1000, 10**6]))
def test_a_spoiled_adapter_is_refused_in_a_sentence_or_finite(
    adapter: Path, place: Path, changes: list[tuple[int, int]], cut: int
) -> None:
    (place / WEIGHTS).write_bytes(spoiled((adapter / WEIGHTS).read_bytes(), changes, cut))

    def read() -> None:
        assert all(tensor.isfinite().all() for tensor in read_adapter(place).tensors.values())

    refused(read)
    refused(lambda: read_tensors(weights_of(place)))


HEADERS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b"[" * 20_000,
    b'{"__metadata__": 3}',
    b"\xff" * 40,
    b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    b'{"../../x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"(a+)+$": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "I64", "shape": [0], "data_offsets": [0, 0]}}',
]


@fuzz(
    "adapters",
    100,
    header=st.sampled_from(HEADERS) | anything.map(json.dumps).map(str.encode),
    length=st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]),
    body=st.sampled_from([b"", b"\0" * 4, b"\0" * 8]),
)
def test_any_header_is_refused_in_a_sentence(place: Path, header: bytes, length: int | None, body: bytes) -> None:
    assert refused(read_adapter, write(place / WEIGHTS, header, body, length)) is not None


CONFIGURATION = [
    "unet.r",
    "unet.lora_alpha",
    "unet.target_modules",
    "unet.rank_pattern",
    "unet.init_lora_weights",
    "unet.megatron_config",
    "unet.bias",
    "unet.layer_replication",
    "unet.modules_to_save",
    "unet.use_dora",
    "unet.corda_config",
    "unet.auto_mapping",
    "unet.peft_type",
    "r",
    "x.y.r",
    "unet.new",
]
VALUES = anything | st.sampled_from(
    [
        10**9,
        2,
        -1,
        True,
        float("nan"),
        "(a+)+$",
        ["(a|a)*"],
        {"(a+)+$": 4},
        "pissa",
        {"megatron_core": "os"},
        [[0, 9]] * 9,
        "x" * 9000,
        None,
        "corda",
    ]
)


@fuzz(
    "adapters",
    150,
    changes=st.dictionaries(st.sampled_from(CONFIGURATION) | st.text(max_size=9), VALUES, min_size=1, max_size=3),
)
def test_any_configuration_of_an_adapter_is_refused_in_a_sentence_or_harmless(
    adapter: Path, place: Path, changes: dict[str, Any]
) -> None:
    header, body = parts(adapter / WEIGHTS)
    stored = json.loads(header["__metadata__"][METADATA])
    header["__metadata__"] = {METADATA: json.dumps({**stored, **changes})}
    message = refused(read_adapter, write(place / WEIGHTS, header, body))
    ranks = [value for key, value in changes.items() if key.rpartition(".")[2] == "r"]
    assert message is not None or all(rank == 2 and type(rank) is int for rank in ranks)


@fuzz(
    "adapters",
    15,
    changes=st.dictionaries(st.sampled_from(CONFIGURATION), VALUES, max_size=1),
    drop=st.sets(st.integers(0, 40), max_size=2),
    rename=st.sampled_from(["", "", "unet.x.", "transformer.", "text_encoder.", "lora_unet_"]),
)
def test_an_adapter_is_refused_in_a_sentence_or_taken_whole(
    model: Path, adapter: Path, place: Path, changes: dict[str, Any], drop: set[int], rename: str
) -> None:
    header, _body = parts(adapter / WEIGHTS)
    metadata = json.loads(header.pop("__metadata__")[METADATA])
    tensors = {name: torch.ones(entry["shape"]) for i, (name, entry) in enumerate(header.items()) if i not in drop}
    named = {(rename + name.removeprefix("unet.") if rename else name): tensor for name, tensor in tensors.items()}
    save_file(named, place / WEIGHTS, {METADATA: json.dumps({**metadata, **changes})})
    before = contents(place)
    message = refused(load_policy, str(model), place)
    assert message is not None or (len(named) == len(header) and not rename)
    assert contents(place) == before


def changed(adapter: Path, place: Path, change: Any) -> Path:
    header, _body = parts(adapter / WEIGHTS)
    metadata = json.loads(header.pop("__metadata__")[METADATA])
    tensors = {name: torch.ones(entry["shape"]) for name, entry in header.items()}
    change(tensors, metadata)
    save_file(tensors, place / WEIGHTS, {METADATA: json.dumps(metadata)})
    return place


def first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]


ATTACKS: dict[str, tuple[Any, str]] = {
    "a module to import": (
        lambda t, m: m.update({"unet.megatron_config": {"a": 1}, "unet.megatron_core": "antigravity"}),
        "no run of etude writes",
    ),
    "an endless pattern": (lambda t, m: m.update({"unet.target_modules": "(a+)+$"}), "no run of etude writes"),
    "a pattern of ranks": (lambda t, m: m.update({"unet.rank_pattern": {"(a+)+$": 4}}), "no run of etude writes"),
    "more rank than memory": (lambda t, m: m.update({"unet.r": 10**9}), "no run of etude writes"),
    "another rank than the tensors'": (lambda t, m: m.update({"unet.r": 50_000}), "says rank 50000"),
    "weights that are subtracted": (
        lambda t, m: m.update({"unet.init_lora_weights": "pissa"}),
        "no run of etude writes",
    ),
    "a key of another peft": (lambda t, m: m.update({"unet.novelty": 1}), "this version of peft does not know"),
    "NaN": (lambda t, m: t[first(t)].fill_(float("nan")), "NaN or infinity"),
    "half a product": (lambda t, m: t.pop(first(t)), "without the other factor"),
    "a name that is a pattern": (
        lambda t, m: t.update({"unet.(a+)+$.lora_A.weight": torch.ones(2, 2)}),
        "no layer's name",
    ),
    "a name that leads elsewhere": (lambda t, m: t.update({"../../etc/passwd": torch.ones(2)}), "no layer's name"),
    "whole numbers": (lambda t, m: t.update({"unet.x": torch.ones(2, dtype=torch.int64)}), "are floating"),
    "nothing": (lambda t, m: t.clear(), "holds no tensor"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_adapter_cannot_carry(attack: str, adapter: Path, tmp_path: Path) -> None:
    change, part = ATTACKS[attack]
    with in_time(), pytest.raises(EtudeError, match=part):
        read_adapter(changed(adapter, tmp_path, change))


def test_an_adapter_of_another_network_is_refused_instead_of_left_out(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    def rename(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace("unet.", "transformer.")] = tensors.pop(name)
        metadata.clear()

    with pytest.raises(EtudeError, match="another kind of model"):
        load_policy(str(model), changed(adapter, tmp_path, rename))


def test_only_the_file_that_was_checked_is_loaded(model: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copy(adapter / WEIGHTS, tmp_path / WEIGHTS)
    (tmp_path / "a.safetensors").write_bytes(b"no adapter")
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(3))
    load_policy(str(model), tmp_path)


class _Ran(Exception):  # noqa: N818
    """What a pickle that is read here raises."""


class _Bomb:
    def __reduce__(self) -> Any:
        return (_explode, ())


def _explode() -> None:
    raise _Ran


def test_a_pickle_under_the_name_of_safetensors_is_not_run(model: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(pickle.dumps(_Bomb()))
    assert "not a readable safetensors file" in (refused(load_policy, str(model), tmp_path) or "")
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(_Bomb()))
    assert "holds no pytorch_lora_weights.safetensors" in (refused(load_policy, str(model), tmp_path) or "")


def test_links_that_lead_to_no_file_are_refused(model: Path, tmp_path: Path) -> None:
    for target in ("/dev/zero", str(tmp_path), WEIGHTS, "/absent"):
        (tmp_path / WEIGHTS).symlink_to(target)
        with in_time():
            assert "holds no" in (refused(load_policy, str(model), tmp_path) or "")
        (tmp_path / WEIGHTS).unlink()
    assert refused(load_policy, str(model), "~nobody/lora") is not None
    assert refused(load_policy, str(model), "a" * 300) is not None


def pickled(model: Path, target: Path, folder: str, name: str) -> Path:
    """The model with the weights of one part as a pickle alone."""
    shutil.copytree(model, target)
    for file in (target / folder).glob("*.safetensors"):
        file.unlink()
    (target / folder / name).write_bytes(pickle.dumps(_Bomb()))
    return target


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
def test_a_model_whose_weights_are_a_pickle_is_refused(model: Path, tmp_path: Path, folder: str, name: str) -> None:
    directory = pickled(model, tmp_path / "model", folder, name)
    for outline in (False, True):
        message = refused(load_policy, str(directory), outline=outline)
        assert message is not None
        assert "safetensors" in message


def test_a_model_cannot_name_a_library_to_import(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    stored = json.loads(index.read_text())
    for library in ("antigravity", "os", "vae", 3, ["os"]):
        index.write_text(json.dumps({**stored, "vae": [library, "AutoencoderKL"]}))
        message = refused(load_policy, str(tmp_path / "model"))
        assert message is not None
        assert "code of its own would run" in message


JSON_FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
]


@fuzz(
    "models",
    45,
    name=st.sampled_from(JSON_FILES),
    key=st.integers(0, 60),
    value=VALUES,
    raw=st.none() | st.sampled_from(["", "[]", "{", "3", "null", "[" * 5000, "9" * 5000, "\0"]),
)
def test_a_model_with_a_spoiled_configuration_is_refused_in_a_sentence_or_loaded(
    model: Path, place: Path, name: str, key: int, value: Any, raw: str | None
) -> None:
    copy = place / "model"
    if not copy.exists():
        shutil.copytree(model, copy)
    file = copy / name
    stored = json.loads((model / name).read_text())
    keys = sorted(stored)
    file.write_text(json.dumps({**stored, keys[key % len(keys)]: value}) if raw is None else raw)
    try:
        refused(load_policy, str(copy))
    finally:
        shutil.copy(model / name, file)


def checkpoint(root: Path) -> Path:
    state = {"config": TrainConfig().model_dump(mode="json"), "base_scores": {}}
    return save_checkpoint(root, 3, {"weights/a": torch.ones(4)}, state)


@fuzz(
    "runs",
    150,
    name=st.sampled_from(["tensors.safetensors", "state.json", "manifest.json"]),
    changes=edits,
    cut=st.sampled_from([0, 0, 1, 50]),
)
def test_a_spoiled_checkpoint_is_passed_over_and_said_so(
    place: Path, name: str, changes: list[tuple[int, int]], cut: int
) -> None:
    root = place / "checkpoints"
    if not (root / "iteration-000003").exists():
        checkpoint(root)
    file = root / "iteration-000003" / name
    whole = file.read_bytes()
    file.write_bytes(spoiled(whole, changes, cut))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load_latest(root)
    assert (found is None) == bool(caught)
    if found is not None:
        assert torch.equal(found.tensors["weights/a"], torch.ones(4))
    file.write_bytes(whole)


@fuzz("runs", 100, state=anything | st.fixed_dictionaries({"config": anything}), manifest=st.none() | anything)
def test_a_checkpoint_that_somebody_made_is_refused_in_a_sentence_or_passed_over(
    place: Path, state: Any, manifest: Any
) -> None:
    out = place / "forged"
    root = out / "checkpoints"
    path = root / "iteration-000003"
    path.mkdir(parents=True, exist_ok=True)
    save_file({"weights/a": torch.ones(4)}, path / TENSORS)
    (path / STATE).write_text(json.dumps(state))
    listing = {
        name: {"bytes": (path / name).stat().st_size, "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name in (TENSORS, STATE)
    }
    stored = {"iteration": 3, "files": listing} if manifest is None else manifest
    (path / "manifest.json").write_text(json.dumps(stored))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = refused(Checkpoints(out, TrainConfig()).load)
    assert message is not None or (manifest is None and parse_config(state["config"]) == TrainConfig())


def test_links_among_checkpoints_are_removed_and_what_they_lead_to_is_not(tmp_path: Path) -> None:
    root, precious = tmp_path / "checkpoints", tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    checkpoint(root)
    for name in ("iteration-000001", ".writing-iteration-000007", "iteration-000002-old"):
        (root / name).symlink_to(precious)
    (root / ".writing-file").write_text("")
    checkpoint(root)
    prune(root, 1)
    assert sorted(entry.name for entry in root.iterdir()) == ["iteration-000002-old", "iteration-000003"]
    assert contents(precious) == {"file": b"mine"}


ROWS = [
    b'{"iteration": 1}',
    b'{"iteration": 2, "reward": 3}',
    b'{"iteration": "x"}',
    b'{"iteration": true}',
    b"[]",
    b"",
    b"[" * 3000,
    b"9" * 5000,
    b"\xff",
    b"{",
    b'{"iteration": 1, "evaluation": {"ode": {"a": {"mean": 1}}}}',
    b'{"iteration": 1, "evaluation": 3}',
    b'{"iteration": 1, "reward": {"a": "<script>"}}',
]
rows = st.lists(st.sampled_from(ROWS) | anything.map(json.dumps).map(str.encode) | st.binary(max_size=6), max_size=5)


@fuzz("runs", 100, lines=rows, iteration=st.integers(-1, 3))
def test_metrics_are_cut_back_whole_or_left_alone(place: Path, lines: list[bytes], iteration: int) -> None:
    file = place / "metrics.jsonl"
    data = b"\n".join(lines)
    file.write_bytes(data)
    message = refused(truncate_metrics, file, iteration)
    left = file.read_bytes()
    assert left == data if message is not None else all(part + b"\n" in data for part in left.split(b"\n")[:-1])
    assert not list(place.glob("*.writing"))


FILES = st.sampled_from(
    ["config.yaml", "metrics.jsonl", "summary.json", "samples/prompts.json", "samples/after_ode.png"]
)
TEXTS = st.one_of(
    anything.map(json.dumps).map(str.encode),
    st.binary(max_size=8),
    rows.map(b"\n".join),
    st.sampled_from([b"a: &x [*x]", b"seed: 1", b"[" * 3000]),
)


@fuzz("runs", 60, files=st.dictionaries(FILES, TEXTS, max_size=3))
def test_a_run_directory_is_refused_in_a_sentence_or_read(place: Path, files: dict[str, bytes]) -> None:
    refused(read_run, directory(place / "read", files))


@fuzz("runs", 200, files=st.dictionaries(FILES, TEXTS, max_size=2))
def test_any_run_directory_is_refused_in_a_sentence_or_watched(place: Path, files: dict[str, bytes]) -> None:
    run = directory(place / "watched", {"config.yaml": b"rewards: {a: 1.0}", **files})
    refused(lambda: Console(file=StringIO(), width=120).print(view(look(run))))


def directory(run: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(run, ignore_errors=True)
    (run / "samples").mkdir(parents=True)
    for name, data in {"config.yaml": b"seed: 1", **files}.items():
        (run / name).write_bytes(data)
    return run


@fuzz("runs", 6, files=st.dictionaries(FILES, TEXTS, max_size=1))
def test_a_report_of_any_directory_is_whole_or_refused_in_a_sentence(place: Path, files: dict[str, bytes]) -> None:
    run = directory(place / "run", files)
    before = contents(run)
    message = refused(write_report, run)
    after = contents(run)
    page = after.pop("report.html", None)
    assert after == before
    assert (page is None) == (message is not None)
    assert page is None or (b"</html>" in page and b"<script>alert" not in page)

"""Checkpoints are exact, appear as a whole or not at all, and damage is seen."""

from __future__ import annotations

import json
import os
import resource
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from etude.errors import EtudeError
from etude.files import append_line, atomic_write_bytes, atomic_write_text
from etude.learning.optimizers import load_optimizer_tensors, optimizer_tensors
from etude.runs import checkpoint as module
from etude.runs.checkpoint import load_latest, prune, save_checkpoint
from etude.runs.layout import truncate_metrics


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(4, 6, generator=generator)
    return {
        "plain": base,
        "alias": base,
        "view": base[1:, ::2],
        "transposed": base.t(),
        "half": base.bfloat16(),
        "count": torch.tensor(2**40 + seed),
        "ids": torch.arange(5),
        "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }


def state(seed: int) -> dict[str, Any]:
    return {"iteration": seed, "rate": 0.1 + seed, "buffer": {"a ❤": [1 / 3, 2.5e-320]}, "none": None}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_is(found: module.Checkpoint | None, seed: int) -> None:
    assert found is not None
    assert found.iteration == seed
    assert found.state == state(seed)
    expected = tensors(seed)
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tensor.shape
        assert bits(found.tensors[name]) == bits(tensor)


def listing(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def test_only_what_shares_memory_or_has_gaps_is_copied_to_be_saved() -> None:
    given = tensors(0)
    own = module._apart(given)
    kept = {name for name, tensor in given.items() if own[name].data_ptr() == tensor.data_ptr() and tensor.numel()}
    assert kept == {"plain", "half", "count", "ids", "odd", "mask"}
    places = [tensor.untyped_storage().data_ptr() for tensor in own.values() if tensor.numel()]
    assert len(set(places)) == len(places)
    assert all(tensor.is_contiguous() for tensor in own.values())


def test_a_round_trip_is_bit_identical(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "deep" / "checkpoints", 12, tensors(12), state(12))
    assert path.name == "iteration-000012"
    assert listing(path) == ["manifest.json", "state.json", "tensors.safetensors"]
    found = load_latest(path.parent)
    assert_is(found, 12)
    assert found is not None
    assert found.path == path


def test_the_newest_wins_and_an_empty_root_has_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    assert load_latest(tmp_path) is None
    for iteration in (9, 10, 1_000_000):
        save_checkpoint(tmp_path, iteration, tensors(iteration), state(iteration))
    assert_is(load_latest(tmp_path), 1_000_000)


def test_saving_the_same_iteration_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, tensors(0), state(0))
    save_checkpoint(tmp_path, 3, tensors(3), state(3))
    assert_is(load_latest(tmp_path), 3)
    assert listing(tmp_path) == ["iteration-000003"]


class KilledError(BaseException):
    """Stands for SIGKILL: no handler for Exception sees it."""


@contextmanager
def killed_at(call: int) -> Iterator[None]:
    """Ends the program just before its `call`-th step that a disk can see."""
    names = [(module, "save_file"), (os, "fsync"), (os, "rename"), (os, "replace"), (Path, "mkdir")]
    names += [(Path, "write_bytes"), (shutil, "rmtree")]
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                raise KilledError
            return original(*args, **kwargs)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in names:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield


def test_killed_at_any_step_of_a_save_the_old_or_the_new_checkpoint_is_whole(tmp_path: Path) -> None:
    finished = False
    for call in range(1, 50):
        root = tmp_path / str(call)
        save_checkpoint(root, 1, tensors(1), state(1))
        try:
            with killed_at(call):
                save_checkpoint(root, 2, tensors(2), state(2))
            finished = True
        except KilledError:
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = load_latest(root)
        assert found is not None
        assert_is(found, found.iteration)
        save_checkpoint(root, 3, tensors(3), state(3))
        assert not [name for name in listing(root) if name.startswith(".")]
        assert_is(load_latest(root), 3)
        if finished:
            break
    assert finished
    assert call > 8


def test_killed_at_any_step_of_saving_an_iteration_again_the_old_or_the_new_one_is_whole(tmp_path: Path) -> None:
    finished, found = False, []
    for call in range(1, 50):
        root = tmp_path / str(call)
        save_checkpoint(root, 2, tensors(2), {"seed": "old"})
        try:
            with killed_at(call):
                save_checkpoint(root, 2, tensors(2), {"seed": "new"})
            finished = True
        except KilledError:
            pass
        checkpoint = load_latest(root)
        assert checkpoint is not None
        assert module.newest_whole(root) == 2
        found.append(checkpoint.state["seed"])
        prune(root, 1)
        assert listing(root) == ["iteration-000002"]
        again = load_latest(root)
        assert again is not None
        assert again.state == checkpoint.state
        if finished:
            break
    assert finished
    assert found == sorted(found, reverse=True)  # "old" up to some step, then "new"
    assert set(found) == {"old", "new"}


def test_killed_at_any_step_of_a_prune_nothing_torn_is_left(tmp_path: Path) -> None:
    for call in range(1, 9):
        root = tmp_path / str(call)
        for iteration in (1, 2, 3):
            save_checkpoint(root, iteration, tensors(iteration), state(iteration))
        try:
            with killed_at(call):
                prune(root, 1)
            break
        except KilledError:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert_is(load_latest(root), 3)
            assert all(len(listing(root / name)) == 3 for name in listing(root) if not name.startswith("."))
    assert call == 5  # a rename and a removal each for two old checkpoints


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def swap_manifest(file: Path) -> None:
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"iteration": 1}))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("tensors.safetensors", flip, "tensors.safetensors does not have the SHA-256"),
        ("tensors.safetensors", cut, r"tensors.safetensors has \d+ bytes instead of"),
        ("tensors.safetensors", Path.unlink, "tensors.safetensors is missing"),
        ("state.json", flip, "state.json does not have the SHA-256"),
        ("state.json", Path.unlink, "state.json is missing"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", cut, "manifest.json is not the JSON"),
        ("manifest.json", lambda file: file.write_text("[]"), "manifest.json is not the JSON"),
        (
            "manifest.json",
            lambda file: file.write_text('{"iteration": 2, "files": 3}'),
            "manifest.json is not the JSON",
        ),
        ("manifest.json", lambda file: file.write_bytes(b"\xff"), "manifest.json is not the JSON"),
        ("manifest.json", swap_manifest, "manifest.json is of iteration 1"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], Any], reason: str
) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), state(1))
    newest = save_checkpoint(tmp_path, 2, tensors(2), state(2))
    damage(newest / name)
    with pytest.warns(UserWarning, match=f"iteration-000002' is damaged.*{reason}"):
        assert_is(load_latest(tmp_path), 1)


def test_only_damaged_checkpoints_are_no_checkpoint(tmp_path: Path) -> None:
    flip(save_checkpoint(tmp_path, 1, tensors(1), state(1)) / "state.json")
    with pytest.warns(UserWarning, match="iteration-000001"):
        assert load_latest(tmp_path) is None


def test_prune_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    for iteration in range(1, 7):
        save_checkpoint(tmp_path, iteration, tensors(iteration), state(iteration))
    flip(tmp_path / "iteration-000005" / "state.json")
    (tmp_path / "notes.txt").write_text("mine")
    prune(tmp_path, 2)
    assert listing(tmp_path) == ["iteration-000004", "iteration-000006", "notes.txt"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Every file stops growing at `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100, 20_000])
def test_a_full_disk_is_one_sentence_and_leaves_the_previous_checkpoint(tmp_path: Path, room: int) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), state(1))
    big = {"x": torch.zeros(2_000)}
    text = {"long": "x" * 30_000}
    with largest_file(room), pytest.raises(EtudeError) as caught:
        save_checkpoint(tmp_path, 2, big, text)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "iteration 2 needs 0.038 MB" in message
    assert "previous checkpoint is intact" in message
    assert "\n" not in message
    assert listing(tmp_path) == ["iteration-000001"]
    assert_is(load_latest(tmp_path), 1)


def test_a_state_that_json_cannot_keep_is_refused(tmp_path: Path) -> None:
    for value in (float("nan"), torch.zeros(1), b"x"):
        with pytest.raises(EtudeError, match="cannot be written as JSON"):
            save_checkpoint(tmp_path / "root", 1, {}, {"value": value})
    assert not (tmp_path / "root").exists()


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))


def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for index in range(count):
        net(torch.full((3, 4), 0.1 * index + 1)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_optimiser_restored_from_a_checkpoint_continues_bit_for_bit(tmp_path: Path) -> None:
    net = network(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    steps(net, optimizer, 3)
    names = [name for name, _ in net.named_parameters()]
    kept = optimizer_tensors(optimizer, names)
    assert {"0.weight.exp_avg", "0.weight.exp_avg_sq", "0.weight.step"} <= kept.keys()
    assert float(kept["0.weight.step"]) == 3
    save_checkpoint(tmp_path, 3, dict(net.state_dict()) | {f"optimizer.{k}": v for k, v in kept.items()}, {})

    found = load_latest(tmp_path)
    assert found is not None
    other = network(1)
    other.load_state_dict({name: found.tensors[name] for name in names})
    restored = torch.optim.AdamW(other.parameters(), lr=0.01)
    prefix = "optimizer."
    load_optimizer_tensors(
        restored, names, {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}
    )
    steps(net, optimizer, 4)
    steps(other, restored, 4)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_restored_optimiser_state_shares_no_memory_with_what_it_came_from() -> None:
    net = network(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    steps(net, optimizer, 1)
    names = [name for name, _ in net.named_parameters()]
    kept = optimizer_tensors(optimizer, names)
    before = {key: value.clone() for key, value in kept.items()}
    load_optimizer_tensors(optimizer, names, kept)
    steps(net, optimizer, 1)
    assert all(torch.equal(kept[key], before[key]) for key in kept)


def test_an_optimiser_that_never_stepped_has_no_state() -> None:
    net = network(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    assert optimizer_tensors(optimizer, "abcd") == {}
    steps(net, optimizer, 1)
    load_optimizer_tensors(optimizer, "abcd", {})
    assert not any(optimizer.state.values())


def test_optimiser_state_of_another_model_is_refused() -> None:
    net = network(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for names in (["x"], ["a", "b", "c", "c"], "abcde"):
        with pytest.raises(EtudeError, match="the optimiser has 4 parameters, not"):
            optimizer_tensors(optimizer, names)
    with pytest.raises(EtudeError, match=r"'a' has shape \[7, 4\], its parameter \[5, 4\]"):
        load_optimizer_tensors(optimizer, "abcd", {"a.exp_avg": torch.zeros(7, 4)})
    with pytest.raises(EtudeError, match=r"'e\.step' belongs to no parameter"):
        load_optimizer_tensors(optimizer, "abcd", {"e.step": torch.zeros(())})


def test_a_small_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    atomic_write_text(file, "old: ❤\n")
    assert file.read_bytes() == "old: ❤\n".encode()
    for call in range(1, 6):
        try:
            with killed_at(call):
                atomic_write_text(file, "new")
            break
        except KilledError:
            assert file.read_text() in {"old: ❤\n", "new"}
    assert file.read_text() == "new"
    with largest_file(10), pytest.raises(EtudeError, match="could not be written"):
        atomic_write_bytes(file, b"x" * 100)
    assert file.read_text() == "new"
    assert listing(tmp_path) == ["config.yaml"]


def test_processes_that_write_one_file_at_once_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, replace, mine = tmp_path / "study.yaml", os.replace, os.getpid()

    def after_the_other(source: Path, target: Path) -> None:
        with monkeypatch.context() as other:
            other.setattr(os, "replace", replace)
            other.setattr(os, "getpid", lambda: mine + 1)
            atomic_write_text(file, "theirs")
        assert file.read_text() == "theirs"
        replace(source, target)

    monkeypatch.setattr(os, "replace", after_the_other)
    atomic_write_text(file, "mine")
    assert file.read_text() == "mine"
    assert listing(tmp_path) == ["study.yaml"]


def test_appended_lines_stay_and_a_line_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_line(file, '{"iteration": 0}')
    append_line(file, '{"iteration": 1, "é": 2}')
    assert file.read_text(encoding="utf-8") == '{"iteration": 0}\n{"iteration": 1, "é": 2}\n'
    with pytest.raises(EtudeError, match="line break"):
        append_line(file, "a\nb")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_while_appending_is_one_sentence() -> None:
    with pytest.raises(EtudeError, match="'/dev/full' could not be written \\(No space left on device"):
        append_line(Path("/dev/full"), "x")


def test_metrics_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [f'{{"iteration":  {i}, "x": 0.1}}' for i in range(5)]
    file.write_text("\n".join(rows) + '\n{"iteration": 5, "x"')
    truncate_metrics(file, 3)
    assert file.read_text() == "\n".join(rows[:4]) + "\n"
    before = file.stat().st_mtime_ns
    truncate_metrics(file, 3)
    assert file.stat().st_mtime_ns == before
    assert listing(tmp_path) == ["metrics.jsonl"]
    truncate_metrics(file, -1)
    assert file.read_text() == ""
    truncate_metrics(tmp_path / "absent.jsonl", 3)
    assert listing(tmp_path) == ["metrics.jsonl"]


def test_only_the_last_metrics_line_may_be_torn(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"iteration": 0}\n\x00\x00\n')
    truncate_metrics(file, 3)
    assert file.read_bytes() == b'{"iteration": 0}\n'
    file.write_bytes(b'{"iteration": 0}\nnonsense\n{"iteration": 2}\n')
    with pytest.raises(EtudeError, match=r"metrics\.jsonl', line 2 is not a metrics row"):
        truncate_metrics(file, 3)

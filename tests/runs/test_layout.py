"""A run's directory belongs to one run, and what is left of a killed one is taken up or cleared away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from etude.config import TrainConfig, parse_config
from etude.errors import EtudeError
from etude.runs import checkpoint
from etude.runs.checkpoint import Checkpoints, save_checkpoint
from etude.runs.layout import check_directory, clear_half_written


def state(config: TrainConfig, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A checkpoint's state of a version that did not have some settings yet."""
    tree = config.model_dump(mode="json")
    for key in without:
        *sections, name = key.split(".")
        target = tree
        for section in sections:
            target = target[section]
        del target[name]
    return {"config": json.loads(json.dumps(tree))}


def test_what_a_kill_left_half_written_is_no_run(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.writing").write_text("model: em")
    check_directory(tmp_path, resume=False)
    nested = tmp_path / "samples" / "along" / ".prompts.json.host-7.writing"
    nested.parent.mkdir(parents=True)
    nested.write_text("[")
    clear_half_written(tmp_path)
    assert not nested.exists()
    nested.parent.rmdir()
    nested.parent.parent.rmdir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".hidden").write_text("of somebody else")
    with pytest.raises(EtudeError, match="is not empty"):
        check_directory(tmp_path, resume=False)


def test_a_checkpoint_from_before_a_setting_existed_has_its_default(tmp_path: Path) -> None:
    config = TrainConfig()
    newer = ("sampling.window", "sampling.first_step", "rollout.shared_noise", "resolution", "evaluation.num_steps")
    save_checkpoint(tmp_path / "checkpoints", 3, {"w": torch.zeros(1)}, state(config, newer))
    found = Checkpoints(tmp_path, config).load()
    assert found is not None
    assert found.iteration == 3
    other = parse_config({"sampling": {"window": {}}})
    with pytest.raises(EtudeError, match=r"has sampling.window = None, but \{'strategy'"):
        Checkpoints(tmp_path, other).load()


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_over_its_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n')
    assert Checkpoints(tmp_path, TrainConfig()).load() is None  # killed before its first checkpoint
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 1}\n{"iteration": 2}\n{"itera')
    with pytest.raises(EtudeError, match=r"has done 2 iterations, but its checkpoints are gone"):
        Checkpoints(tmp_path, TrainConfig()).load()


def test_what_remains_is_the_newest_that_was_written_or_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, TrainConfig())
    assert checkpoints.remaining() == "no checkpoint was written yet"
    for iteration in (1, 2, 3):
        checkpoints.save(iteration, {"w": torch.zeros(1)}, {})
    assert "iteration 3" in checkpoints.remaining()
    resumed = Checkpoints(tmp_path, TrainConfig())
    resumed.load()
    assert "iteration 3" in resumed.remaining()


def test_a_process_that_writes_nothing_knows_what_remains_from_the_disk(tmp_path: Path) -> None:
    writing, beside = (Checkpoints(tmp_path, TrainConfig()) for _ in range(2))
    assert "starts over" in beside.advice()
    for iteration in (1, 2):
        writing.save(iteration, {"w": torch.zeros(1)}, {})
    assert "iteration 2" in beside.remaining()
    (tmp_path / "checkpoints" / "iteration-000002" / "state.json").write_text("{}")
    assert "iteration 1" in beside.remaining()
    assert "iteration 1" in beside.advice()


def test_a_checkpoint_known_to_be_whole_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[str] = []
    digest = checkpoint._digest
    monkeypatch.setattr(checkpoint, "_digest", lambda path: digested.append(path.parent.name) or digest(path))
    checkpoints = Checkpoints(tmp_path, TrainConfig())
    for iteration in range(1, 6):
        checkpoints.save(iteration, {"w": torch.zeros(1)}, {})
    assert len(digested) == 2 * 5  # each of the two files as it was written, and never after
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "iteration-000004",
        "iteration-000005",
    ]


def test_all_checkpoints_damaged_is_not_the_same_as_none(tmp_path: Path) -> None:
    config = TrainConfig()
    assert Checkpoints(tmp_path, config).load() is None
    path = save_checkpoint(tmp_path / "checkpoints", 1, {"w": torch.zeros(1)}, state(config))
    (path / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(EtudeError, match=r"no checkpoint in .* is sound"):
        Checkpoints(tmp_path, config).load()

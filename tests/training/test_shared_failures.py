"""A reward that fails in one process of several: all of them end, and the finished iterations are saved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from support.launching import launch
from support.small_runs import metrics
from support.tiny import save_stable_diffusion

REWARD = """
import os
from pathlib import Path

def fails_beside(images, prompts, **metadata):
    if os.environ["RANK"] == "1" and Path("fail").exists():
        raise RuntimeError("the scorer of one process is gone")
    count = Path("calls").read_text() if Path("calls").exists() else ""
    if os.environ["RANK"] == "1":
        Path("calls").write_text(count + "x")
        if len(count) + 1 == 4:  # two in the first evaluation, one in each iteration: from the next evaluation on
            Path("fail").touch()
    return images.float().mean((1, 2, 3))
"""


@pytest.mark.slow
def test_a_failure_in_one_process_ends_all_and_loses_no_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scorer.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("red heart\npizza\ntiger\nsun\n")
    recipe = {
        "model": str(save_stable_diffusion(tmp_path / "sd")),
        "iterations": 3,
        "rewards": {"scorer:fails_beside": 1.0},
        "prompts": {"train": "prompts.txt", "evaluation": "prompts.txt"},
        "sampling": {"num_steps": 2},
        "rollout": {"images_per_iteration": 4},
        "evaluation": {"every": 2, "num_images": 4, "grid_images": 2},
        "checkpoint": {"every": 3},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["-m", "etude", "train", "recipe.yaml", "--out", "run", "--quiet"]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code, output = launch(2, arguments, timeout=120, PYTHONPATH=path)
    assert code != 0
    assert "process 1: reward 'scorer:fails_beside' failed" in output
    assert "the scorer of one process is gone" in output
    assert (tmp_path / "run" / "checkpoints" / "iteration-000002").is_dir()
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [0, 1]

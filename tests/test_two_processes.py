"""Two processes train the same model as one: they share the images, exchange gradients, and agree on the window."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from launching import launch
from tiny import save_flux


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    (root / "prompts.txt").write_text("red heart\npizza\ntiger\n")
    tree = {
        "model": str(save_flux(root / "flux")),
        "iterations": 2,
        "rewards": {"colorfulness": 1.0},
        "prompts": {"train": str(root / "prompts.txt"), "evaluation": str(root / "prompts.txt")},
        "sampling": {"eta": 1.2, "num_steps": 6, "window": {"strategy": "random", "size": 2}},
        "rollout": {"images_per_iteration": 12, "images_per_prompt": 4, "shared_noise": True, "batch_size": 12},
        # One optimiser step over all pairs, so that the order of the samples is of no consequence; AdamW's first steps are nearly
        # of the gradient's sign alone, hence the large epsilon.
        "objective": {"clip_range": None, "clip_nats": 1.6, "updates_per_epoch": 1, "batch_size": 24},
        "optimizer": {"learning_rate": 0.1, "epsilon": 1.0},
        "advantage": {"kind": "group"},
        "evaluation": {"every": 1, "num_images": 5, "grid_images": 4},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return root / "recipe.yaml"


def train(recipe: Path, out: Path, count: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    arguments = ["-m", "etude", "train", str(recipe), "--out", str(out), "--quiet"]
    if count == 1:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240)
        code, output = done.returncode, done.stderr
    else:
        code, output = launch(count, arguments)
    assert code == 0, output[-3000:]
    assert json.loads((out / "summary.json").read_text())["machine"]["processes"] == count
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(out / "lora" / "pytorch_lora_weights.safetensors"), rows


@pytest.mark.slow
def test_two_processes_train_what_one_does(recipe: Path, tmp_path: Path) -> None:
    alone, rows = train(recipe, tmp_path / "one", 1)
    together, shared_rows = train(recipe, tmp_path / "two", 2)
    assert [row.get("window") for row in rows] == [row.get("window") for row in shared_rows]
    assert [row["iteration"] for row in shared_rows] == [0, 1, 2]
    for one, two in zip(rows, shared_rows, strict=True):
        for quantity in ("ode", "sde", "gap"):
            expected = one["evaluation"][quantity]["colorfulness"]["mean"]
            assert two["evaluation"][quantity]["colorfulness"]["mean"] == pytest.approx(expected, abs=0.2)
        if "reward" in one:
            assert two["reward"]["colorfulness"]["mean"] == pytest.approx(
                one["reward"]["colorfulness"]["mean"], abs=0.1
            )
    moved = torch.cat([tensor.flatten() for name, tensor in alone.items() if "lora_B" in name])
    other = torch.cat([together[name].flatten() for name in alone if "lora_B" in name])
    assert moved.norm() > 0
    assert (moved - other).norm() < 0.02 * moved.norm()

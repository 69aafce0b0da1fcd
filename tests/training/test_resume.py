"""SIGKILL at any moment, resume, and end with the same bits."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.small_runs import outcome
from support.tiny import save_stable_diffusion

ITERATIONS = 12


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "etude", "train", *map(str, arguments)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    (root / "prompts.txt").write_text("red heart\npizza\ntiger\nsun\n")
    tree = {
        "model": str(save_stable_diffusion(root / "sd")),
        "iterations": ITERATIONS,
        "rewards": {"colorfulness": 1.0},
        "prompts": {"train": str(root / "prompts.txt"), "evaluation": str(root / "prompts.txt")},
        "sampling": {"eta": 1.2, "num_steps": 4},
        "rollout": {"images_per_iteration": 8, "images_per_prompt": 4},
        "objective": {"clip_range": None, "clip_nats": 1.6},
        "advantage": {"kind": "per_prompt", "min_count": 4},
        "ema": {"decay": 0.9},
        "evaluation": {"every": 3, "num_images": 8, "grid_images": 4},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return root / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(recipe, "--out", out), check=True, capture_output=True, timeout=300)
    return out


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_never_killed(recipe, whole, tmp_path):
    moments, killed = random.Random(0), 0
    for attempt in range(20):
        resume = ["--resume"] if attempt else []
        process = subprocess.Popen(
            command(recipe, "--out", tmp_path / "killed", *resume),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        target = moments.randint(1, 4) if attempt < 4 else ITERATIONS + 2
        lines = 0
        for line in process.stdout:
            lines += "iteration" in line
            if lines == target:
                break
        if target <= ITERATIONS:
            try:
                process.wait(timeout=moments.random() * 0.3)  # somewhere within the next iteration
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
        tail = process.communicate(timeout=300)[0]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, tail
    assert killed >= 3
    assert outcome(tmp_path / "killed") == outcome(whole)


@pytest.mark.slow
def test_a_corrupted_checkpoint_is_reported_and_the_one_before_is_used(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("iteration-*"))
    tensors = newest / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    resumed = subprocess.run(
        command("--out", tmp_path / "run", "--resume"), capture_output=True, text=True, timeout=300, check=True
    )
    assert "tensors.safetensors" in resumed.stderr
    assert outcome(tmp_path / "run") == outcome(whole)

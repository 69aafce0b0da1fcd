"""Runs on tiny flow transformers: each family trains, resumes to the same bits, and is reckoned without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from etude.config import TrainConfig, parse_config
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.training.dry_run import resolved
from etude.training.trainer import Trainer
from support.small_runs import outcome, train_until
from support.tiny_flow import FIRST_CLASS, ernie_image
from support.tiny_others import ALSO

WINDOW = {"strategy": "progressive", "size": 1, "iters_per_shift": 1}
PPO = {"clip_range": None, "clip_nats": 1.6, "kl_coef": 0.1, "batch_size": 4}
RUNS: dict[str, dict[str, Any]] = {
    "flux2-klein": {"sampling": {"window": WINDOW}},
    "z-image": {"objective": {"kind": "nft", "options": {"levels": 2}, "batch_size": 4}},
    "qwen-image": {"objective": {"kind": "dpo", "options": {"levels": 2}, "batch_size": 4}},
    "sana": {"sampling": {"window": WINDOW}, "resolution": 32},
    "wan": {
        "objective": {"kind": "awm", "options": {"levels": 2}, "batch_size": 4},
        "memory": {"gradient_checkpointing": True, "offload": True},
    },
}
"""Settings of each family's run: every objective, and what saves memory."""


def mebibytes(line: str) -> float:
    assert line.endswith("MiB")
    return float(line.split()[-2])


@pytest.fixture(scope="module", params=RUNS)
def settings(request: Any, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    root = tmp_path_factory.mktemp("family")
    (root / "prompts.txt").write_text("red heart\na pizza beside a tiger\n")
    (FIRST_CLASS | ALSO)[request.param]().save_pretrained(root / request.param)
    own = RUNS[request.param]
    return parse_config(
        {
            "model": str(root / request.param),
            "resolution": 16,
            "iterations": 2,
            "rewards": {"colorfulness": 1.0},
            "prompts": {"train": str(root / "prompts.txt"), "evaluation": str(root / "prompts.txt")},
            "rollout": {"images_per_iteration": 4, "images_per_prompt": 2, "batch_size": 4},
            "objective": PPO,
            "advantage": {"kind": "group"},
            "evaluation": {"every": 2, "num_images": 2, "grid_images": 2},
            **own,
            "sampling": {"eta": 1.0, "num_steps": 3, "guidance_scale": 2.0, **own.get("sampling", {})},
        }
    )


def test_a_run_that_is_broken_off_and_resumed_ends_with_the_bits_of_a_whole_one(
    settings: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etude.training.finish.write_report", lambda directory: directory)  # most of the time
    Trainer(settings, tmp_path / "whole").train()
    train_until(Trainer(settings, tmp_path / "halves"), 2)
    Trainer(settings, tmp_path / "halves", resume=True).train()
    assert outcome(tmp_path / "halves") == outcome(tmp_path / "whole")
    first = outcome(tmp_path / "whole")[1][1]
    if settings.objective.kind == "ppo":
        assert first["rollout_ratio_deviation"] <= 1e-4
    card = (tmp_path / "whole" / "lora" / "README.md").read_text()
    if "wan" in settings.model:
        assert "pipe.scheduler = UniPCMultistepScheduler.from_config(" in card
        assert "num_frames=1, height=16, width=16).frames[0][0]" in card
    if "sana" in settings.model:
        assert "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)" in card
        assert "use_resolution_binning=False" in card
    if "qwen" in settings.model:
        assert "true_cfg_scale=2, negative_prompt=' '" in card


def test_a_dry_run_of_the_outline_says_what_one_of_the_model_says(settings: TrainConfig, tmp_path: Path) -> None:
    outline, model = load_source(ModelSource.of(settings), outline=True), load_source(ModelSource.of(settings), "cpu")
    said = [resolved(settings, tmp_path / "run", policy=policy).splitlines() for policy in (outline, model)]
    for ours, theirs in zip(*said, strict=True):
        if "roughly" not in ours:
            assert ours == theirs
        else:  # rotary embeddings are tensors beside parameters and buffers, which an outline leaves out
            assert abs(mebibytes(ours) - mebibytes(theirs)) < 1


def test_a_dry_run_says_that_the_memory_of_a_pipeline_that_reads_numbers_is_not_reckoned(tmp_path: Path) -> None:
    ernie_image().save_pretrained(tmp_path / "model")
    tree = {"model": str(tmp_path / "model"), "resolution": 16, "rewards": {"colorfulness": 1.0}}
    tree |= {"sampling": {"num_steps": 4, "guidance_scale": 2.0}}
    settings = parse_config(tree)
    assert "not reckoned, since the ErnieImagePipeline computes with numbers" in resolved(settings, tmp_path / "run")

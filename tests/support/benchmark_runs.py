"""A run as the benchmarks time it, small enough for a test."""

from __future__ import annotations

from pathlib import Path

from benchmarks.against_trl import Comparison, Work, _recipe
from benchmarks.workload import save_pipeline
from etude.config import load_config
from etude.training.trainer import Trainer


def tiny_trainer(folder: Path, overrides: list[str]) -> Trainer:
    """The trainer of 4 images in 3 steps on a network of two narrow blocks, which is written into `folder`."""
    pipeline = save_pipeline(folder / "pipeline", (4, 8), 4)
    recipe = _recipe(folder, pipeline, Comparison(Work((4, 8), 4, images=4, num_steps=3), (2, 1), (2, 4)), 0)
    (folder / "run").mkdir()
    return Trainer(load_config(recipe, ["iterations=1000", "evaluation.every=1000", *overrides]), folder / "run")

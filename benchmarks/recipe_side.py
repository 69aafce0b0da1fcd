"""A full-size recipe at its real sizes with random weights: two short iterations, its export, and the export in the plain pipeline."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.full_size import random_pipeline
from benchmarks.gpu_side import estimated_bytes, peak_on
from benchmarks.protocol import serve
from etude.config import load_config, parse_config
from etude.policies.loading import DTYPES
from etude.policies.pipeline import PipelinePolicy
from etude.registry import POLICIES
from etude.training.trainer import Trainer

SHORT = {
    "iterations": 2,
    "rewards": {"jpeg_compressibility": 1.0},
    "evaluation.held_out_rewards": [],
    "evaluation.every": 2,
    "evaluation.num_images": 2,
    "evaluation.num_steps": 2,
    "evaluation.grid_images": 2,
    "checkpoint.every": 2,
    "checkpoint.best": None,
    "rollout.batch_size": 2,
    "objective.batch_size": 1,
    "memory.decode_batch_size": 1,
    "objective.updates_per_epoch": 1,
    "objective.num_inner_epochs": 1,
}
"""Changes to every recipe: a short run, the smallest sizes of a call, a reward without a network."""
STEPS, GROUP = 6, 2
TINY_SIDE = 64


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[..., dict[str, Any]]]]:
    """Imports the libraries; `measure` runs the recipe.

    Args:
        settings: `recipe`, `model` (of `full_size.MODELS`), `tiny`.
    """
    return {"torch": torch.__version__}, {"measure": lambda: _measure(**settings)}


def short_tree(recipe: str, tiny: bool) -> dict[str, Any]:
    """The recipe as a tree, with a short run's settings."""
    plain = load_config(recipe)
    few = dict(SHORT) | {"sampling.num_steps": min(STEPS, plain.sampling.num_steps)}
    group = min(GROUP, plain.rollout.images_per_prompt)
    few |= {"rollout.images_per_prompt": group, "rollout.images_per_iteration": GROUP}
    if tiny:
        few |= {"resolution": TINY_SIDE, "dtype": "float32"}
    return dict(yaml.safe_load(load_config(recipe, few).to_yaml()))


def _measure(recipe: str, model: str, tiny: bool) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tree = {**short_tree(recipe, tiny), "model": model}
    config = parse_config(tree)
    dtype = DTYPES[config.dtype]

    def policy() -> PipelinePolicy:
        pipeline = random_pipeline(model, device, dtype, tiny)
        made = POLICIES.get(type(pipeline).__name__)(pipeline, dtype, device, config.resolution)
        assert isinstance(made, PipelinePolicy)
        return made

    with tempfile.TemporaryDirectory(prefix="recipe-") as folder:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer = Trainer(config, Path(folder) / "run", policy=policy())
        built = time.perf_counter() - started
        trainer.train()
        peak = peak_on(device)
        rows = [json.loads(line) for line in (trainer.out / "metrics.jsonl").read_text().splitlines()]
        estimated = estimated_bytes(tree, trainer, Path(folder), tiny)
        trained = {name: values.detach().cpu() for name, values in (trainer.ema or trainer.parameters).items()}
        out, export = trainer.out, trainer.policy.export_name
        del trainer
        gc.collect()
        return {
            "build_seconds": built,
            "seconds": rows[-1]["seconds"],
            "peak_bytes": peak,
            "estimated_bytes": estimated,
            "moved": max(float(p.abs().max()) for name, p in trained.items() if "lora_B" in name),
            "reloaded": _reloads(policy(), out / export, trained),
        }


def _reloads(policy: PipelinePolicy, export: Path, trained: dict[str, torch.Tensor]) -> bool:
    """Whether the plain pipeline's own loader finds in the export what was trained, in the weights' precision."""
    policy.pipeline.load_lora_weights(str(export))
    network = getattr(policy.pipeline, policy.denoiser)
    loaded = {name: p.detach().cpu() for name, p in network.named_parameters() if "lora_" in name}
    (name,) = network.peft_config
    own = {key.replace(f".{name}.", ".default."): value for key, value in loaded.items()}
    return own.keys() == trained.keys() and all(torch.equal(own[key], trained[key].to(own[key].dtype)) for key in own)


if __name__ == "__main__":
    serve(start)

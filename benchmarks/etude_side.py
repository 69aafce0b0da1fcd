"""etude's side of every measurement: a trainer that runs one iteration on request."""

from __future__ import annotations

import atexit
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import etude.training.trainer
from benchmarks.bare import by_kind, record, run_bare
from benchmarks.parity import compare
from benchmarks.profiled import profile
from benchmarks.protocol import forget_peak, peak_bytes, serve
from etude.config import load_config
from etude.learning.objectives.ppo import PPO
from etude.policies.pipeline import PipelinePolicy
from etude.sampling.rollout import Trajectory, rollout
from etude.training.memory_estimate import trajectory_floats
from etude.training.trainer import Trainer


def _unshared(*args: Any, **kwargs: Any) -> Trajectory:
    """A rollout whose images share no steps."""
    return rollout(*args, **{**kwargs, "prompts": None, "starts": None})


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[..., dict[str, Any]]]]:
    """Builds a trainer; returns its info and the handlers of requests.

    Args:
        settings: `recipe` (a name or a YAML file), `overrides`, `work` (parent of the run
            directory, which is removed at exit), and `share_prefix` (compute the common steps of a
            group once; default true).
    """
    if not settings.get("share_prefix", True):
        etude.training.training_sampler.rollout = _unshared
    out = tempfile.TemporaryDirectory(dir=settings["work"], prefix="run-")
    atexit.register(out.cleanup)
    never = 10**6  # an evaluation is not part of an iteration, so none is ever due
    overrides = [f"iterations={never}", f"evaluation.every={never}", *settings["overrides"]]
    trainer = Trainer(load_config(settings["recipe"], overrides), Path(out.name))
    assert isinstance(trainer.objective, PPO)
    info = {
        "device": str(trainer.policy.device),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "peft")},
        "trained_steps": len(trainer.schedule.table_at(1).trained_steps),
        "dimensions": trainer.policy.dimensions,
        "clip_range": trainer.objective.clip_range(trainer.policy),
        "images": len(trainer.learner.indices),
        "bytes_per_image": _bytes_per_image(trainer),
        "parameters": sum(p.numel() for p in trainer.parameters.values()),
    }
    handlers: dict[str, Callable[..., dict[str, Any]]] = {
        "iterate": lambda: {"seconds": _iterate(trainer), "phases": dict(trainer.supervisor.seconds)},
        "overhead": lambda: _overhead(trainer),
        "memory": lambda: {"peak_bytes": peak_bytes()},
        "metrics": lambda: dict(json.loads((trainer.out / "metrics.jsonl").read_text().splitlines()[-1])),
        "profile": lambda: profile(trainer, lambda: _iterate(trainer), _now),
        "parity": lambda path, prompts: compare(trainer, Path(path), prompts),
    }
    forget_peak()
    return info, handlers


def _iterate(trainer: Trainer) -> float:
    """One iteration as in a run: rollout, decode, rewards, update, metrics and checkpoint on the disk."""
    started = _now()
    trainer._finish_iteration(trainer._iterate())
    return _now() - started


def _overhead(trainer: Trainer) -> dict[str, Any]:
    """One iteration, then its network calls alone, on the same tensors in the same batches.

    Returns:
        Seconds by kind, and of each sequence of calls of one kind and size.
    """
    assert isinstance(trainer.policy, PipelinePolicy)
    with record(trainer.policy) as calls:
        total = _iterate(trainer)
    timed = run_bare(calls, _now)
    trainer.learner.optimizer.zero_grad()
    bare = {"bare": by_kind(timed), "timed": [asdict(one) for one in timed]}
    return {"seconds": total, "phases": dict(trainer.supervisor.seconds), "calls": len(calls), **bare}


def _bytes_per_image(trainer: Trainer) -> int:
    """Bytes that a rollout keeps of an image: trajectory, conditioning and picture."""
    policy = trainer.policy
    assert isinstance(policy, PipelinePolicy)
    conditioning = policy.encode(trainer.train_prompts.texts[:1]).prompt
    height, width = policy.image_size
    floats = trajectory_floats(trainer.schedule.table_at(1), policy.dimensions, trainer.objective.needs_reference)
    return 4 * floats + sum(rows.nbytes for rows in conditioning.values()) + 3 * height * width


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    serve(start)

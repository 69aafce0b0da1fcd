"""The results of a run: exported weights, before / after pictures, summary, model cards, report."""

from __future__ import annotations

import io
import json
import os
import platform
import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from etude.config import TrainConfig
from etude.errors import EtudeError, brief
from etude.files import atomic_write_bytes, atomic_write_text
from etude.learning.objectives import Objective
from etude.policies import TrainablePolicy
from etude.report import write_report
from etude.report.grids import image_grid
from etude.rewards import revisions
from etude.runs.layout import BEST
from etude.training.best import BestWeights
from etude.training.card import deployment_advice, model_card, summary_of_the_best
from etude.training.guards import explain_stop

PACKAGES = ("etude", "torch", "diffusers", "transformers", "accelerate", "peft", "numpy")


def peak_memory_mb() -> float:
    """Peak memory of this process so far in MB: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """A row of metrics as `a/b/c: number`, the form that trackers take; list entries count from 0."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, list):
            value = {str(i): each for i, each in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def write_grids(out: Path, when: str, ode: Tensor, sde: Tensor, prompts: list[str]) -> None:
    """Writes `samples/{when}_ode.png`, `samples/{when}_sde.png`, and the captions in `prompts.json`."""
    (out / "samples").mkdir(exist_ok=True)
    for sampler, images in (("ode", ode), ("sde", sde)):
        buffer = io.BytesIO()
        image_grid(images, columns=8, scale=max(1, 96 // images.shape[-1]), labels=prompts).save(buffer, format="PNG")
        atomic_write_bytes(out / "samples" / f"{when}_{sampler}.png", buffer.getvalue())
    atomic_write_text(out / "samples" / "prompts.json", json.dumps(prompts, ensure_ascii=False))


def export(policy: TrainablePolicy, out: Path, suffix: str = "") -> None:
    """Writes `out/lora`, or `out/model` after full fine-tuning, with `suffix` after the name.

    The directory is complete or absent, never half written.

    Raises:
        EtudeError: the weights cannot be written.
    """
    final = out / f"{policy.export_name}{suffix}"
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{final.name}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        policy.export(temporary)
        for file in temporary.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes files that only their owner reads
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        raise EtudeError(
            f"the trained weights could not be written to '{final}' ({brief(error)}): free some space or check the "
            "permissions, then give --resume; the last checkpoint is intact."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finish(
    out: Path,
    config: TrainConfig,
    policy: TrainablePolicy,
    objective: Objective,
    evaluation: dict[str, Any],
    started: float,
    iterations: int,
    best: BestWeights,
    confirmation: dict[str, Any],
) -> dict[str, Any]:
    """Writes `summary.json`, the model cards beside the weights and `report.html`; returns the summary.

    Args:
        out: directory of the run.
        config: configuration of the run.
        policy: policy with the last weights.
        objective: loss of the run.
        evaluation: last evaluation.
        started: start of this process's work, in seconds since the epoch.
        iterations: number of finished iterations, fewer than planned if a reward fell.
        best: best weights, exported beside the last ones.
        confirmation: estimates of the best weights from fresh noise (`best.confirmation`).
    """
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds: dict[str, float] = {}
    for row in rows:
        for phase, value in row["seconds"].items():
            seconds[phase] = seconds.get(phase, 0.0) + value
    summary = {
        "model": config.model,
        "model_revision": policy.revision,
        "seed": config.seed,
        "eta": config.sampling.eta,
        "eta_schedule": schedule.model_dump() if (schedule := config.sampling.eta_schedule) else None,
        "num_steps": config.sampling.num_steps,
        "guidance_scale": config.sampling.guidance_scale,
        "rewards": list(config.rewards),
        "held_out_rewards": config.evaluation.held_out_rewards,
        "reward_revisions": revisions([*config.rewards, *config.evaluation.held_out_rewards]),
        "iterations": iterations,
        "stopped": explain_stop(evaluation, config.evaluation.stop_on_fall, iterations, config.iterations),
        "final": evaluation,
        "best": _best(best, confirmation, policy) if best.weights else None,
        "deploy": deployment_advice(config, policy, evaluation),
        "seconds": seconds,
        "peak_memory_mb": max(row["memory_mb"] for row in rows),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "processes": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
            "threads": torch.get_num_threads(),
            "gpu": _gpu(),
        },
        "started": _timestamp(started),
        "finished": _timestamp(time.time()),
    }
    atomic_write_text(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    atomic_write_text(out / policy.export_name / "README.md", model_card(summary, config, policy, objective))
    if best.weights:
        card = model_card(summary_of_the_best(summary, config, policy), config, policy, objective, BEST)
        atomic_write_text(out / f"{policy.export_name}{BEST}" / "README.md", card)
    write_report(out)
    return summary


def _best(best: BestWeights, confirmation: dict[str, Any], policy: TrainablePolicy) -> dict[str, Any]:
    """The summary's entry on the best weights, with their directory."""
    return {
        "reward": best.reward,
        "directory": f"{policy.export_name}{BEST}",
        **best.state(),
        "confirmation": confirmation,
    }


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None

"""The results of a run: exported weights, summary, model cards, report."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from etude.errors import EtudeError, brief
from etude.files import atomic_write_text
from etude.policies import TrainablePolicy
from etude.policies.sharding import assembled
from etude.policies.trainable import swapped
from etude.report import write_report
from etude.rewards import revisions
from etude.runs.environment import gpu, processor, versions
from etude.runs.layout import BEST
from etude.training.card import deployment_advice, model_card, summary_of_the_best
from etude.training.durability import RunState
from etude.training.guards import confirmation, explain_stop
from etude.training.speed import choices
from etude.training.supervision import Supervisor

UTC = "%Y-%m-%d %H:%M:%S UTC"


def peak_memory_mb() -> float:
    """Peak memory of this process so far in MB: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def export(policy: TrainablePolicy, out: Path, suffix: str = "") -> None:
    """Writes `out/lora`, or `out/model` after full fine-tuning, with `suffix` after the name.

    The directory is complete or absent, never half written.
    """
    out.mkdir(parents=True, exist_ok=True)
    final = out / f"{policy.export_name}{suffix}"
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


def confirm_best(state: RunState, supervisor: Supervisor) -> dict[str, Any]:
    """Measures best and last weights and base model from fresh noise (`confirmation`); empty without best."""
    best, evaluation, parameters = state.best, state.evaluation, state.parameters
    if not best.weights:
        return {}
    weights: dict[str, Any] = {"best": swapped(parameters, best.weights)}
    if best.iteration != state.ledger.iteration:
        weights["last"] = swapped(parameters, state.ema)
    if evaluation.config.lora.rank or state.objective.needs_reference:  # otherwise there is no copy of the base model
        weights["base"] = evaluation.policy.reference()
    with supervisor.phase("confirmation", len(weights) * evaluation.work // 2):
        scores = evaluation.again(weights, supervisor.advance)
    return confirmation(scores, evaluation.measurement.clusters)


def finish(state: RunState, confirmed: dict[str, Any], started: float) -> dict[str, Any]:
    """Writes the weights, and from the first process `summary.json`, the model cards and `report.html`.

    `confirmed` is the result of `confirm_best`; `started` counts in seconds since the epoch.

    Returns:
        The summary; empty in every process but the first.
    """
    best, objective, last = state.best, state.objective, state.evaluation.last
    config, policy, out = state.evaluation.config, state.evaluation.policy, state.evaluation.out
    first = state.evaluation.accelerator.is_main_process
    exports = {"": state.ema} | ({BEST: best.weights} if best.weights else {})
    for suffix, weights in exports.items():
        with swapped(state.parameters, weights), assembled(policy.network):
            if first:
                export(policy, out, suffix)
    if not first:
        return {}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds: Counter[str] = Counter()
    for row in rows:
        seconds.update(row["seconds"])
    iterations, schedule, place = state.ledger.iteration, config.sampling.eta_schedule, f"{policy.export_name}{BEST}"
    chosen = {"reward": best.reward, "directory": place, **best.state(), "confirmation": confirmed}
    summary: dict[str, Any] = {
        "model": config.model,
        "model_revision": policy.revision,
        "seed": config.seed,
        "eta": config.sampling.eta,
        "eta_schedule": schedule.model_dump() if schedule else None,
        "num_steps": config.sampling.num_steps,
        "guidance_scale": config.sampling.guidance_scale,
        "rewards": list(config.rewards),
        "held_out_rewards": config.evaluation.held_out_rewards,
        "reward_revisions": revisions([*config.rewards, *config.evaluation.held_out_rewards]),
        "iterations": iterations,
        "stopped": explain_stop(last, config.evaluation.stop_on_fall, iterations, config.iterations),
        "final": last,
        "best": chosen if best.weights else None,
        "deploy": deployment_advice(config, policy, last),
        "seconds": dict(seconds),
        "peak_memory_mb": max(row["memory_mb"] for row in rows),
        "versions": versions(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "processes": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
            "threads": torch.get_num_threads(),
            "gpu": gpu(),
        },
        "started": time.strftime(UTC, time.gmtime(started)),
        "finished": time.strftime(UTC, time.gmtime(time.time())),
    }
    if chosen := choices(config, policy, state.sizes):
        summary["speed"] = chosen
    if state.inputs.changes:
        summary["changed_inputs"] = state.inputs.changes
    atomic_write_text(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    last_weights = out / policy.export_name
    atomic_write_text(last_weights / "README.md", model_card(summary, config, policy, objective, last_weights))
    if best.weights:
        best_summary = summary_of_the_best(summary, config, policy)
        card = model_card(best_summary, config, policy, objective, out / place, BEST)
        atomic_write_text(out / place / "README.md", card)
    write_report(out)
    return summary

"""What a run leaves for its user: the adapter and its card, before / after pictures, the summary, the report."""

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
from etude.config.algorithm import algorithm
from etude.errors import EtudeError, brief
from etude.files import atomic_write_bytes, atomic_write_text
from etude.measuring.statistics import Estimate
from etude.policies import TrainablePolicy
from etude.policies.deployment import deployment_snippet, stochastic_scheduler, stochastic_snippet
from etude.policies.loading import split_revision
from etude.report import write_report
from etude.report.grids import image_grid
from etude.rewards import revisions
from etude.runs.layout import BEST
from etude.sampling.etas import eta_text
from etude.training.best import BestWeights, explain_best
from etude.training.guards import explain_stop

PACKAGES = ("etude", "torch", "diffusers", "transformers", "accelerate", "peft", "numpy")


def peak_memory_mb() -> float:
    """Peak memory of this process so far in MB: the device's where there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """A row of metrics as `a/b/c: number`, the form that trackers take; a list counts from 0."""
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
    """`samples/{when}_ode.png`, `samples/{when}_sde.png` and the caption of each cell."""
    (out / "samples").mkdir(exist_ok=True)
    for sampler, images in (("ode", ode), ("sde", sde)):
        buffer = io.BytesIO()
        image_grid(images, columns=8, scale=max(1, 96 // images.shape[-1]), labels=prompts).save(buffer, format="PNG")
        atomic_write_bytes(out / "samples" / f"{when}_{sampler}.png", buffer.getvalue())
    atomic_write_text(out / "samples" / "prompts.json", json.dumps(prompts, ensure_ascii=False))


def export(policy: TrainablePolicy, out: Path, suffix: str = "") -> None:
    """`out/lora`, or `out/model` after full fine-tuning, with `suffix`: complete or absent, never half written."""
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
    evaluation: dict[str, Any],
    started: float,
    iterations: int,
    best: BestWeights,
    confirmation: dict[str, Any],
) -> dict[str, Any]:
    """Writes `summary.json`, the model cards beside the weights and `report.html`; returns the summary.

    Args:
        iterations: how many were done: fewer than planned if a reward fell.
        best: the weights that were exported beside the last.
        confirmation: what fresh noise says of them (`guards.confirmation`).
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
        "held_out_rewards": [name for name in config.evaluation.held_out_rewards if name not in config.rewards],
        "reward_revisions": revisions([*config.rewards, *config.evaluation.held_out_rewards]),
        "iterations": iterations,
        "stopped": explain_stop(evaluation, config.evaluation.stop_on_fall, iterations, config.iterations),
        "final": evaluation,
        "best": _best(best, confirmation, policy) if best.weights else None,
        "deploy": _deployment_advice(config, policy, evaluation),
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
    atomic_write_text(out / policy.export_name / "README.md", model_card(summary, config, policy))
    if best.weights:
        card = model_card(_of_the_best(summary, config, policy), config, policy, BEST)
        atomic_write_text(out / f"{policy.export_name}{BEST}" / "README.md", card)
    write_report(out)
    return summary


def _best(best: BestWeights, confirmation: dict[str, Any], policy: TrainablePolicy) -> dict[str, Any]:
    """What the summary says of the best weights, and where they are."""
    return {
        "reward": best.reward,
        "directory": f"{policy.export_name}{BEST}",
        **best.state(),
        "confirmation": confirmation,
    }


def _of_the_best(summary: dict[str, Any], config: TrainConfig, policy: TrainablePolicy) -> dict[str, Any]:
    """The summary of the weights that were best: of an earlier iteration, or of the last."""
    best = summary["best"]
    advice = (
        f"{_deployment_advice(config, policy, best['evaluation'])} {explain_best(best)} Of a run of {summary['iterations']} iterations. "
        "The table is of the evaluation that these weights were chosen by, and figures that a choice rests on flatter: go by those from "
        "fresh noise, or measure on other prompts with `etude gap --prompts`."
    )
    return {**summary, "iterations": best["iteration"], "final": best["evaluation"], "deploy": advice}


def _deployment_advice(config: TrainConfig, policy: TrainablePolicy, evaluation: dict[str, Any]) -> str:
    """Which sampler the evidence favours, judged on the first reward that was trained."""
    reward, eta, kernel = next(iter(config.rewards)), evaluation["eta"], config.sampling.kernel
    at = f"eta = {eta_text(eta)}"
    gap = evaluation["gap"][reward]
    interval = f"gap {Estimate(**gap)}"
    if gap["low"] > 0:
        return f"Ship the ODE sampler: it scores higher than the SDE at {at} on {reward} ({interval})."
    if gap["high"] < 0:
        stochastic = "draw with `SamplingPlan.from_etas` in Python"
        if isinstance(eta, int | float):
            told = f"eta={eta:g}, kernel={kernel!r}, first_step={config.sampling.first_step!r}"
            stochastic = f"deploy {stochastic_scheduler(policy)} with {told}, as the model card shows,"
        return (
            f"The ODE sampler is what etude ships, but the SDE at {at} scores higher on {reward} ({interval}): "
            f"{stochastic} if that difference matters to you."
        )
    return f"Ship the ODE sampler: on {reward} it cannot be told from the SDE at {at} ({interval}), and it is deterministic."


def model_card(summary: dict[str, Any], config: TrainConfig, policy: TrainablePolicy, suffix: str = "") -> str:
    """The README.md beside the weights: what they are, the two numbers, and how plain diffusers loads them."""
    final = summary["final"]
    rows = [
        f"| {reward}{' (held out)' if reward in summary['held_out_rewards'] else ''} | "
        + " | ".join(str(Estimate(**final[quantity][reward])) for quantity in ("ode", "sde", "improvement", "gap"))
        + " |"
        for reward in final["ode"]
    ]
    num_steps = final.get("num_steps", config.sampling.num_steps)
    snippet = deployment_snippet(
        policy,
        config.model,
        num_steps,
        config.sampling.guidance_scale,
        config.dtype,
        suffix,
        config.pipeline_config,
        config.variant,
    )
    how = "PPO's clipped ratio" if config.objective.kind == "ppo" else "REINFORCE"
    return f"""---
base_model: {json.dumps(split_revision(config.model)[0])}
library_name: diffusers
tags: [text-to-image, reinforcement-learning, etude]
---

# {config.model} tuned on {", ".join(config.rewards)}

Fine-tuned by etude {summary["versions"]["etude"]} with {algorithm(config.model_dump())} ({how}) under the
{config.sampling.kernel} sampler at eta = {config.sampling.eta_text}{_first_step(config)}{_window(config)}: {summary["iterations"]} iterations of
{config.rollout.images_per_iteration} images, {config.sampling.num_steps} steps, guidance {config.sampling.guidance_scale:g}, seed {config.seed}.

| reward | ODE | SDE, eta = {eta_text(final["eta"])} | improvement | gap |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

improvement = ODE of this model minus ODE of the base model; gap = ODE minus SDE, both of this model. Means with 95 % bootstrap
intervals clustered by prompt, {config.evaluation.num_images} pairs of images of {_kind_of_prompts(final)} from the same noise.
{summary["deploy"]}

```python
{snippet}
```
{_stochastic(final["eta"], num_steps, config, policy)}{_reward_models(summary)}"""


def _kind_of_prompts(evaluation: dict[str, Any]) -> str:
    seen = evaluation.get("prompts_trained_on", 0)
    return f"prompts of which {seen} were trained on" if seen else "held-out prompts"


def _reward_models(summary: dict[str, Any]) -> str:
    """The hub repositories that the rewards were read from, each with its commit."""
    read = [
        f"{name.partition(':')[0]} from "
        + ", ".join(f"{repository.partition('@')[0]} at {commit}" for repository, commit in commits.items())
        for name, commits in summary["reward_revisions"].items()
    ]
    return f"\nRewards: {'; '.join(read)}.\n" if read else ""


def _stochastic(eta: Any, num_steps: int, config: TrainConfig, policy: TrainablePolicy) -> str:
    """How plain diffusers draws with the SDE of the table; nothing where eta differs by step, which schedulers do not take."""
    if not isinstance(eta, int | float):
        return ""
    sampling = config.sampling
    lines = stochastic_snippet(
        policy, num_steps, sampling.guidance_scale, sampling.kernel, float(eta), sampling.first_step
    )
    return f"\nThe SDE of the table instead, after these lines:\n\n```python\n{lines}\n```\n"


def _first_step(config: TrainConfig) -> str:
    first_step = config.sampling.first_step
    return "" if first_step == "ode" else f" (first step {first_step})"


def _window(config: TrainConfig) -> str:
    window = config.sampling.window
    return "" if window is None else f" in a {window.strategy} window of {window.size} steps"


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

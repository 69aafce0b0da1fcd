"""The model card beside exported weights: their origin, their two numbers, and lines that load them."""

from __future__ import annotations

import json
from typing import Any

from etude.config import TrainConfig
from etude.config.algorithm import algorithm
from etude.learning.objectives import Objective
from etude.measuring.statistics import Estimate
from etude.policies import TrainablePolicy
from etude.policies.deployment import deployment_snippet, stochastic_scheduler, stochastic_snippet
from etude.policies.loading import split_revision
from etude.policies.source import ModelSource
from etude.sampling.etas import eta_text
from etude.training.best import explain_best


def summary_of_the_best(summary: dict[str, Any], config: TrainConfig, policy: TrainablePolicy) -> dict[str, Any]:
    """The summary for the card of the best weights, with their iteration, evaluation and advice."""
    best = summary["best"]
    advice = (
        f"{deployment_advice(config, policy, best['evaluation'])} {explain_best(best)} The run had {summary['iterations']} iterations. "
        "The table shows the evaluation that chose these weights, and figures that decide a choice are too high: trust those from "
        "fresh noise, or measure on other prompts with `etude gap --prompts`."
    )
    return {**summary, "iterations": best["iteration"], "final": best["evaluation"], "deploy": advice}


def deployment_advice(config: TrainConfig, policy: TrainablePolicy, evaluation: dict[str, Any]) -> str:
    """Advice on the sampler to deploy, from the gap of the first trained reward."""
    reward, eta, kernel = next(iter(config.rewards)), evaluation["eta"], config.sampling.kernel
    at = f"eta = {eta_text(eta)}"
    gap = evaluation["gap"][reward]
    interval = f"gap {Estimate(**gap)}"
    if gap["low"] > 0:
        return f"Ship the ODE sampler: it scores higher than the SDE at {at} on {reward} ({interval})."
    if gap["high"] < 0:
        stochastic = "draw with `SamplingPlan.from_etas` in Python"
        if isinstance(eta, int | float):
            settings = f"eta={eta:g}, kernel={kernel!r}, first_step={config.sampling.first_step!r}"
            stochastic = f"deploy {stochastic_scheduler(policy)} with {settings}, as the model card shows,"
        return (
            f"The ODE sampler is what etude ships, but the SDE at {at} scores higher on {reward} ({interval}): "
            f"{stochastic} if that difference matters to you."
        )
    return f"Ship the ODE sampler: on {reward} it cannot be told from the SDE at {at} ({interval}), and it is deterministic."


def model_card(
    summary: dict[str, Any], config: TrainConfig, policy: TrainablePolicy, objective: Objective, suffix: str = ""
) -> str:
    """The README.md beside the weights: their origin, a table of rewards, and lines that load them."""
    final = summary["final"]
    rows = [
        f"| {reward}{' (held out)' if reward in summary['held_out_rewards'] else ''} | "
        + " | ".join(str(Estimate(**final[quantity][reward])) for quantity in ("ode", "sde", "improvement", "gap"))
        + " |"
        for reward in final["ode"]
    ]
    num_steps = final.get("num_steps", config.sampling.num_steps)
    snippet = deployment_snippet(policy, ModelSource.of(config), num_steps, config.sampling.guidance_scale, suffix)
    return f"""---
base_model: {json.dumps(split_revision(config.model)[0])}
library_name: diffusers
tags: [text-to-image, reinforcement-learning, etude]
---

# {config.model} tuned on {", ".join(config.rewards)}

Fine-tuned by etude {summary["versions"]["etude"]} with {algorithm(config.model_dump())} ({objective.label}) under the
{_rollout(config)}: {summary["iterations"]} iterations of
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
    trained = evaluation.get("prompts_trained_on", 0)
    return f"prompts of which {trained} were trained on" if trained else "held-out prompts"


def _reward_models(summary: dict[str, Any]) -> str:
    """A line with the hub repositories of the rewards, each with its commit; empty without any."""
    sources = [
        f"{name.partition(':')[0]} from "
        + ", ".join(f"{repository.partition('@')[0]} at {commit}" for repository, commit in commits.items())
        for name, commits in summary["reward_revisions"].items()
    ]
    return f"\nRewards: {'; '.join(sources)}.\n" if sources else ""


def _stochastic(eta: Any, num_steps: int, config: TrainConfig, policy: TrainablePolicy) -> str:
    """Lines of plain diffusers that draw with the SDE of the table.

    Empty if eta differs by step, which a scheduler cannot do.
    """
    if not isinstance(eta, int | float):
        return ""
    sampling = config.sampling
    lines = stochastic_snippet(
        policy, num_steps, sampling.guidance_scale, sampling.kernel, float(eta), sampling.first_step
    )
    return f"\nThe SDE of the table instead, after these lines:\n\n```python\n{lines}\n```\n"


def _rollout(config: TrainConfig) -> str:
    sampling = config.sampling
    if sampling.solver is not None:
        return f"deterministic solver {sampling.solver}"
    return f"{sampling.kernel} sampler at eta = {sampling.eta_text}{_first_step(config)}{_window(config)}"


def _first_step(config: TrainConfig) -> str:
    first_step = config.sampling.first_step
    return "" if first_step == "ode" else f" (first step {first_step})"


def _window(config: TrainConfig) -> str:
    window = config.sampling.window
    return "" if window is None else f" in a {window.strategy} window of {window.size} steps"

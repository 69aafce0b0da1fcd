"""The model card beside exported weights: their origin, their two numbers, and lines that load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etude.config import TrainConfig
from etude.config.algorithm import algorithm
from etude.learning.objectives import Objective
from etude.measuring.statistics import Estimate
from etude.policies import TrainablePolicy
from etude.policies.deployment import deployment_snippet, stochastic_scheduler, stochastic_snippet
from etude.policies.kohya import KOHYA_WEIGHTS
from etude.policies.loading import split_revision
from etude.policies.source import ModelSource
from etude.sampling.etas import eta_text
from etude.training.guards import explain_best


def summary_of_the_best(summary: dict[str, Any], config: TrainConfig, policy: TrainablePolicy) -> dict[str, Any]:
    """The summary for the card of the best weights."""
    best = summary["best"]
    advice = (
        f"{deployment_advice(config, policy, best['evaluation'])} {explain_best(best)} The run had {summary['iterations']} iterations. "
        "The table shows the evaluation that chose these weights, and figures that decide a choice are too high: trust those from "
        "fresh noise, or measure on other prompts with `etude gap --prompts`."
    )
    return {**summary, "iterations": best["iteration"], "final": best["evaluation"], "deploy": advice}


def deployment_advice(config: TrainConfig, policy: TrainablePolicy, evaluation: dict[str, Any]) -> str:
    """Advice on the sampler to deploy, from the gap of the first trained reward."""
    reward, eta = next(iter(config.rewards)), evaluation["eta"]
    at, gap = f"eta = {eta_text(eta)}", Estimate.from_dict(evaluation["gap"][reward])
    if gap.low > 0:
        return f"Ship the ODE sampler: it scores higher than the SDE at {at} on {reward} (gap {gap})."
    if gap.high >= 0:
        return f"Ship the ODE sampler: on {reward} it cannot be told from the SDE at {at} (gap {gap}), and it is deterministic."
    stochastic = "draw with `SamplingPlan.from_etas` in Python"
    if isinstance(eta, int | float):
        settings = f"eta={eta:g}, kernel={config.sampling.kernel!r}, first_step={config.sampling.first_step!r}"
        stochastic = f"deploy {stochastic_scheduler(policy)} with {settings}, as the model card shows,"
    return (
        f"The ODE sampler is what etude ships, but the SDE at {at} scores higher on {reward} (gap {gap}): "
        f"{stochastic} if that difference matters to you."
    )


def model_card(
    summary: dict[str, Any],
    config: TrainConfig,
    policy: TrainablePolicy,
    objective: Objective,
    directory: Path,
    suffix: str = "",
) -> str:
    """The README.md beside the weights in `directory`: their origin, a table of rewards, and lines that load them."""
    final, sampling = summary["final"], config.sampling
    rows = [
        f"| {reward}{' (held out)' if reward in summary['held_out_rewards'] else ''} | "
        + " | ".join(str(Estimate(**final[quantity][reward])) for quantity in ("ode", "sde", "improvement", "gap"))
        + " |"
        for reward in final["ode"]
    ]
    num_steps, trained = final.get("num_steps", sampling.num_steps), final.get("prompts_trained_on", 0)
    snippet = deployment_snippet(policy, ModelSource.of(config), num_steps, sampling.guidance_scale, suffix)
    first_step = "" if sampling.first_step == "ode" else f" (first step {sampling.first_step})"
    window = f" in a {sampling.window.strategy} window of {sampling.window.size} steps" if sampling.window else ""
    sampler = f"{sampling.kernel} sampler at eta = {sampling.eta_text}{first_step}{window}"
    if sampling.solver is not None:
        sampler = f"deterministic solver {sampling.solver}"
    prompts = f"prompts of which {trained} were trained on" if trained else "held-out prompts"
    return f"""---
base_model: {json.dumps(split_revision(config.model)[0])}
library_name: diffusers
tags: [text-to-image, reinforcement-learning, etude]
---

# {config.model} tuned on {", ".join(config.rewards)}

Fine-tuned by etude {summary["versions"]["etude"]} with {algorithm(config.model_dump())} ({objective.label}) under the
{sampler}: {summary["iterations"]} iterations of
{config.rollout.images_per_iteration} images, {sampling.num_steps} steps, guidance {sampling.guidance_scale:g}, seed {config.seed}.

| reward | ODE | SDE, eta = {eta_text(final["eta"])} | improvement | gap |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

improvement = ODE of this model minus ODE of the base model; gap = ODE minus SDE, both of this model. Means with 95 % bootstrap
intervals clustered by prompt, {config.evaluation.num_images} pairs of images of {prompts} from the same noise.
{summary["deploy"]}

```python
{snippet}
```
{_other_programs(directory)}{_stochastic(final["eta"], num_steps, config, policy)}{_reward_models(summary)}{_changed_inputs(summary)}"""


def _other_programs(directory: Path) -> str:
    """A line on the file for ComfyUI and kohya's tools; empty without it."""
    if not (directory / KOHYA_WEIGHTS).is_file():
        return ""
    return (
        f"\nComfyUI and kohya's tools read `{KOHYA_WEIGHTS}`: the same adapter in their names, with the strength of each layer in its "
        "`alpha`.\n"
    )


def _reward_models(summary: dict[str, Any]) -> str:
    """A line with the hub repositories of the rewards, each with its commit; empty without any."""
    sources = [
        f"{name.partition(':')[0]} from "
        + ", ".join(f"{repository.partition('@')[0]} at {commit}" for repository, commit in commits.items())
        for name, commits in summary["reward_revisions"].items()
    ]
    return f"\nRewards: {'; '.join(sources)}.\n" if sources else ""


def _changed_inputs(summary: dict[str, Any]) -> str:
    """A line on the inputs that changed while the run was stopped; empty without any."""
    changes = summary.get("changed_inputs", [])
    return (
        f"\nThe run went on with changed inputs, across which improvement compares: {'; '.join(changes)}.\n"
        if changes
        else ""
    )


def _stochastic(eta: Any, num_steps: int, config: TrainConfig, policy: TrainablePolicy) -> str:
    """Lines of plain diffusers that draw with the SDE of the table; empty if eta differs by step,
    which a scheduler cannot do.
    """
    if not isinstance(eta, int | float):
        return ""
    kernel, first_step, guidance = config.sampling.kernel, config.sampling.first_step, config.sampling.guidance_scale
    lines = stochastic_snippet(policy, num_steps, guidance, kernel, float(eta), first_step)
    return f"\nThe SDE of the table instead, after these lines:\n\n```python\n{lines}\n```\n"

"""The published name of a configuration: every algorithm here is the same loop under other settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etude.registry import ADVANTAGES, OBJECTIVES

if TYPE_CHECKING:
    from etude.config.sections import TrainConfig


def algorithm(config: Mapping[str, Any]) -> str:
    """DDPO, GRPO, MixGRPO or MixGRPO-Flash, from the tree of a configuration.

    An objective with a published name of its own gives that name. Otherwise a window of stochastic
    steps is MixGRPO (arXiv 2507.21802), and a window with a compressed tail is MixGRPO-Flash. Where
    every step is stochastic, the advantage gives the name. Rewards compared within a group of
    images of one prompt are GRPO (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818).
    Rewards compared with the past rewards of their prompt are DDPO (arXiv 2305.13301).
    """
    objective, advantage = ((config.get(section) or {}).get("kind") for section in ("objective", "advantage"))
    if objective and (title := OBJECTIVES.title(objective)):
        return title
    if window := (config.get("sampling") or {}).get("window"):
        return "MixGRPO" if window.get("compression") is None else "MixGRPO-Flash"
    return ADVANTAGES.title(advantage or "per_prompt")


def essence(config: TrainConfig) -> str:
    """A run on one line: algorithm, model, kernel, eta and rewards."""
    sampling, rewards = config.sampling, config.rewards
    weighted = ", ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in rewards.items())
    rollout = f"rollouts by {sampling.solver}, gap of " if sampling.solver else ""
    return (
        f"{algorithm(config.model_dump())} on {config.model}, {rollout}{sampling.kernel} at eta {sampling.eta_text}, "
        f"reward{'s' if len(rewards) > 1 else ''}: {weighted}"
    )

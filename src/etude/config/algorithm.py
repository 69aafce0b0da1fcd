"""What the published name of a configuration is: every algorithm here is one and the same loop under other settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etude.registry import ADVANTAGES, OBJECTIVES

if TYPE_CHECKING:
    from etude.config.sections import TrainConfig


def algorithm(config: Mapping[str, Any]) -> str:
    """DDPO, GRPO, MixGRPO or MixGRPO-Flash, from the tree of a configuration (`TrainConfig.model_dump()`, `config.yaml`).

    An objective with a published name of its own gives that name. Otherwise a window of stochastic steps makes it MixGRPO
    (arXiv 2507.21802), a compressed tail after the window its Flash variant. Where every step is stochastic, the advantage
    gives the name: rewards compared within a group of images of one prompt make it GRPO (Flow-GRPO, arXiv 2505.05470;
    DanceGRPO, arXiv 2505.07818), and a memory of each prompt's rewards DDPO (arXiv 2305.13301).
    """
    objective, advantage = ((config.get(section) or {}).get("kind") for section in ("objective", "advantage"))
    if objective and (title := OBJECTIVES.title(objective)):
        return title
    window = (config.get("sampling") or {}).get("window")
    if window:
        return "MixGRPO" if window.get("compression") is None else "MixGRPO-Flash"
    return ADVANTAGES.title(advantage or "per_prompt")


def essence(config: TrainConfig) -> str:
    """What a run trains and how, on one line."""
    sampling, rewards = config.sampling, config.rewards
    weighted = ", ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in rewards.items())
    return (
        f"{algorithm(config.model_dump())} on {config.model}, {sampling.kernel} at eta {sampling.eta_text}, "
        f"reward{'s' if len(rewards) > 1 else ''}: {weighted}"
    )

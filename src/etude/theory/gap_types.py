"""Names shared by everything that computes a gap."""

from __future__ import annotations

from typing import Any, TypeAlias

from etude.errors import EtudeError
from etude.theory.reward_functions import LipschitzReward, QuadraticReward

Reward: TypeAlias = QuadraticReward | LipschitzReward


def as_reward(value: Any) -> Reward:
    """The reward itself, or an error that says how to wrap what was given."""
    if not isinstance(value, (QuadraticReward, LipschitzReward)):
        raise EtudeError(
            f"the reward is a {type(value).__name__}, whose expectation is unknown: pass a QuadraticReward, or wrap a "
            "function as LipschitzReward(function, lipschitz)."
        )
    return value

"""Rewards: functions from `(images, prompts, **metadata)` to one float per image; larger is better.

`get(name)` finds a built-in reward (`names()` lists them), a reward that `register` added, or any
callable by its import path `package.module:attribute`. The code of a reward is imported when its
name is first used.
"""

from __future__ import annotations

from etude.rewards.reward import WEIGHTED_SUM, Reward, get, names, register, register_factory
from etude.rewards.scoring import Scoring, WeightedRewards, revisions, score, score_one

__all__ = [
    "WEIGHTED_SUM",
    "Reward",
    "Scoring",
    "WeightedRewards",
    "get",
    "names",
    "register",
    "register_factory",
    "revisions",
    "score",
    "score_one",
]

"""Rewards: functions from `(images, prompts, **metadata)` to one float per image; larger is better.

`get(name)` finds a reward that is built in or registered (`names()` lists them), or any callable by
its import path `package.module:attribute`. Its code is imported when its name is first used.
"""

from __future__ import annotations

from etude.rewards.reward import WEIGHTED_SUM, Reward, files, get, names, register, register_factory, sources
from etude.rewards.scoring import Scoring, WeightedRewards, check_group_size, revisions, score, score_one

__all__ = [
    "WEIGHTED_SUM", "Reward", "Scoring", "WeightedRewards", "check_group_size", "files", "get", "names", "register",
    "register_factory", "revisions", "score", "score_one", "sources",
]  # fmt: skip

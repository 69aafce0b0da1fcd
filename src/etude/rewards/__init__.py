"""What an image is worth. A reward maps `(images, prompts, **metadata)` to one float per image; more is better.

`get(name)` finds a built-in (`names()` lists them), one that was added by `register`, or any callable by its import
path `package.module:attribute`. Nothing is imported before it is asked for by name.
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

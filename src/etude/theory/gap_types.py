"""Names shared by everything that computes a gap."""

from __future__ import annotations

from typing import TypeAlias

from etude.theory.rewards import LipschitzReward, QuadraticReward

Reward: TypeAlias = QuadraticReward | LipschitzReward

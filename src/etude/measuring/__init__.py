"""The reward gap and the improvement, paired, with their intervals."""

from __future__ import annotations

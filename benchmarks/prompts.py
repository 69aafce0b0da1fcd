"""The prompts that both sides of a comparison draw from. No library needed."""

from __future__ import annotations

PROMPTS = [
    f"a {adjective} {noun}"
    for adjective in ("red", "small", "round", "old")
    for noun in ("cat", "house", "boat", "tree")
]

"""The name of an algorithm follows from the configuration and from nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from etude.config.algorithm import algorithm

WINDOW = {"strategy": "progressive", "size": 4}


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({}, "DDPO"),
        ({"sampling": {"window": None}, "advantage": {"kind": "per_prompt"}}, "DDPO"),
        ({"sampling": {"window": None}, "advantage": {"kind": "group"}}, "GRPO"),
        ({"sampling": {}, "advantage": {"kind": "group_mean_global_std"}}, "GRPO"),
        ({"sampling": {"window": WINDOW}, "advantage": {"kind": "group"}}, "MixGRPO"),
        ({"sampling": {"window": {**WINDOW, "compression": None}}}, "MixGRPO"),
        ({"sampling": {"window": {**WINDOW, "compression": 0.4}}}, "MixGRPO-Flash"),
    ],
)
def test_the_window_its_tail_and_the_advantages_name_the_algorithm(tree: dict[str, Any], name: str) -> None:
    assert algorithm(tree) == name

"""Objectives: losses of an optimiser step, one class a file, named in `etude.registry.OBJECTIVES`."""

from __future__ import annotations

from etude.config import ObjectiveConfig
from etude.errors import EtudeError
from etude.learning.objectives.objective import Keep, Loss, Objective, Samples
from etude.registry import OBJECTIVES

__all__ = ["Keep", "Loss", "Objective", "Samples", "make_objective"]


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a configuration."""
    kind = OBJECTIVES.get(config.kind)
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise EtudeError(f"objective.kind = {config.kind} is {kind!r}: give {OBJECTIVES.wanted}.")
    return kind.from_config(config)

"""Policies: one adapter for each pipeline family, and one function that finds the right adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etude.policies.trainable import TrainablePolicy
from etude.sampling.model import Conditioning, Policy

if TYPE_CHECKING:
    from etude.policies.loading import load_policy

__all__ = ["Conditioning", "Policy", "TrainablePolicy", "load_policy"]


def __getattr__(name: str) -> Any:
    """Imports `load_policy` when it is first asked for: diffusers takes seconds, and a report needs no pipeline."""
    if name != "load_policy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from etude.policies.loading import load_policy

    return load_policy

"""Policies: one adapter for each pipeline family, and one function that finds the right adapter."""

from __future__ import annotations

from etude.policies.loading import load_policy
from etude.policies.trainable import TrainablePolicy
from etude.sampling.model import Conditioning, Policy

__all__ = ["Conditioning", "Policy", "TrainablePolicy", "load_policy"]

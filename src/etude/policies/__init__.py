"""Policies: one adapter per pipeline family, and the one function that finds the right adapter."""

from __future__ import annotations

from etude.policies.base import Conditioning, Policy
from etude.policies.loading import load_policy

__all__ = ["Conditioning", "Policy", "load_policy"]

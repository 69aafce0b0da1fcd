"""The interface through which a run reports its progress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Display:
    """The interface: a context around the whole run, whose methods the trainer calls. It shows nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: Any) -> None:
        """Called when the run ends, with its exception."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Called when a phase begins (rollout, rewards, update, ...); `total` is its work, if known."""

    def advance(self, n: int = 1) -> None:
        """Called when `n` units of the phase are done."""

    def iteration(self, row: Mapping[str, Any]) -> None:
        """Called when an iteration is complete, with its row of metrics.jsonl."""

    def summary_table(self, summary: Mapping[str, Any]) -> None:
        """Called when the run is complete, with the content of summary.json."""


class SilentDisplay(Display):
    """Shows nothing."""

"""The interface through which a run reports its progress, and the display that shows nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Display(Protocol):
    """An object that the trainer informs of its progress."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: Any) -> None: ...

    def phase(self, name: str, total: int | None = None) -> None:
        """Called when a phase begins (rollout, rewards, update, evaluation, ...).

        Args:
            name: name of the phase.
            total: units of work of the phase, if known.
        """

    def advance(self, n: int = 1) -> None:
        """Called when `n` units of the phase are done."""

    def iteration(self, row: Mapping[str, Any]) -> None:
        """Called when an iteration is complete, with its row of metrics.jsonl."""

    def summary_table(self, summary: Mapping[str, Any]) -> None:
        """Called when the run is complete, with the content of summary.json."""


class SilentDisplay:
    """Shows nothing."""

    def __enter__(self) -> SilentDisplay:
        return self

    def __exit__(self, *exception: Any) -> None:
        """Does nothing: there is nothing to tidy."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Shows nothing."""

    def advance(self, n: int = 1) -> None:
        """Shows nothing."""

    def iteration(self, row: Mapping[str, Any]) -> None:
        """Shows nothing."""

    def summary_table(self, summary: Mapping[str, Any]) -> None:
        """Shows nothing."""

"""How a run tells of its progress, and the display that shows nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Display(Protocol):
    """What the trainer tells about its progress."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: Any) -> None: ...

    def phase(self, name: str, total: int | None = None) -> None:
        """A phase of the iteration begins: rollout, rewards, update or evaluation; `total` units of work if known."""

    def advance(self, n: int = 1) -> None:
        """`n` units of the phase are done."""

    def iteration(self, row: Mapping[str, Any]) -> None:
        """An iteration is complete; `row` is its line of metrics.jsonl."""

    def summary_table(self, summary: Mapping[str, Any]) -> None:
        """The run is complete; `summary` is its summary.json."""


class SilentDisplay:
    """Shows nothing."""

    def __enter__(self) -> SilentDisplay:
        return self

    def __exit__(self, *exception: Any) -> None:
        """Leaves nothing to tidy."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Shows nothing."""

    def advance(self, n: int = 1) -> None:
        """Shows nothing."""

    def iteration(self, row: Mapping[str, Any]) -> None:
        """Shows nothing."""

    def summary_table(self, summary: Mapping[str, Any]) -> None:
        """Shows nothing."""

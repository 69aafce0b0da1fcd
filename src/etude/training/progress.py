"""The interface through which a run reports its progress."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from etude.errors import brief


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


class OutlivedDisplay(Display):
    """A display that the run outlives: its first failure is a warning, after which nothing is shown."""

    def __init__(self, display: Display) -> None:
        self._display: Display | None = display

    def __enter__(self) -> OutlivedDisplay:
        self._call("__enter__")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._call("__exit__", *exception)

    def phase(self, name: str, total: int | None = None) -> None:
        self._call("phase", name, total)

    def advance(self, n: int = 1) -> None:
        self._call("advance", n)

    def iteration(self, row: Mapping[str, Any]) -> None:
        self._call("iteration", row)

    def summary_table(self, summary: Mapping[str, Any]) -> None:
        self._call("summary_table", summary)

    def _call(self, name: str, *arguments: Any) -> None:
        if self._display is None:
            return
        try:
            getattr(self._display, name)(*arguments)
        except Exception as error:
            display, self._display = self._display, None
            warn_that_it_failed("the display", error)
            with suppress(Exception):
                display.__exit__(None, None, None)


def warn_that_it_failed(what: str, error: Exception) -> None:
    """Says that something which only shows the run has failed; it says so even where warnings are errors."""
    with suppress(UserWarning):
        warnings.warn(
            f"{what} failed ({type(error).__name__}: {brief(error)}), and the run goes on without it", stacklevel=3
        )

"""Scores of a run's images, computed beside the main thread while the next images are sampled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.prompts import PromptSet
from etude.rewards import WeightedRewards
from etude.rewards.scoring import Scoring

TICK = 0.2
"""Seconds between two checks on whether to stop waiting."""


class Scorer:
    """Calls the rewards of a run and waits for them, but not forever. A failure in the context ends them.

    Args:
        timeout: longest wait for the scores of one batch, in seconds.
        on_wait: called a few times a second while waiting. An exception from it ends the wait.
    """

    def __init__(self, rewards: WeightedRewards, timeout: float, on_wait: Callable[[], None] = lambda: None) -> None:
        self.rewards, self.timeout, self.on_wait = rewards, timeout, on_wait
        self._pending: PendingScores | None = None

    @property
    def whole_groups(self) -> bool:
        """`WeightedRewards.whole_groups`."""
        return self.rewards.whole_groups

    def evaluate(
        self, images: Tensor, prompts: list[str], metadata: Any = None, groups: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Scores as from `WeightedRewards.evaluate`, with the time-out."""
        scoring = self.rewards.start(images, prompts, metadata, groups=groups, held_out=True)
        try:
            return self.rewards.summed(self.result(scoring))
        finally:
            scoring.cancel()

    def pending(
        self, prompts: PromptSet, early: bool = True, first: int = 0, groups: Sequence[int] | None = None
    ) -> PendingScores:
        """A collector of the scores of an iteration's images, which arrive in batches.

        Args:
            early: raise the failure of one batch when the next one arrives.
            first: number of this process's first image among those of all processes, for messages.
            groups: group of each image; groups are consecutive and whole. For a reward that compares
                their images, these wait until their group is complete. Default: equal prompts.
        """
        self._pending = PendingScores(self, prompts, early, first, groups)
        return self._pending

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and self._pending is not None:
            self._pending.cancel()

    def result(self, scoring: Scoring) -> dict[str, Tensor]:
        """Waits for the scores of one batch.

        Raises:
            EtudeError: a reward failed, or has not finished in time; the message names it.
        """
        deadline = time.monotonic() + self.timeout
        while not (scoring.done() or _failed(scoring)):
            if time.monotonic() > deadline:
                late = ", ".join(f"'{name}'" for name, future in scoring.futures.items() if not future.done())
                raise EtudeError(
                    f"the reward {late} has not finished after {self.timeout:g} s: it hangs, or rollout.reward_timeout is too short."
                )
            wait(scoring.futures.values(), min(TICK, self.timeout), FIRST_EXCEPTION)
            self.on_wait()
        return scoring.result(timeout=0)


class PendingScores:
    """A collector of the scores of an iteration's images; see `Scorer.pending`."""

    def __init__(
        self, scorer: Scorer, prompts: PromptSet, early: bool, first: int, groups: Sequence[int] | None
    ) -> None:
        self._scorer, self._prompts, self._early, self._first = scorer, prompts, early, first
        self._groups = groups if scorer.whole_groups else None
        self._batches: dict[int, Scoring] = {}
        self._waiting: dict[int, Tensor] = {}

    def begin(self, rows: slice, images: Tensor) -> None:
        """Begins to score the images of some rows, and returns at once. May raise an earlier batch's failure."""
        if self._early:
            for scoring in filter(_failed, self._batches.values()):
                scoring.result(timeout=0)
        if self._groups is None:
            self._start(rows, images)
            return
        self._waiting |= dict(zip(range(rows.start, rows.stop), images, strict=True))
        for _, members in groupby(range(len(self._groups)), key=self._groups.__getitem__):
            group = list(members)
            if all(row in self._waiting for row in group):
                self._start(slice(group[0], group[-1] + 1), torch.stack([self._waiting.pop(row) for row in group]))

    def _start(self, rows: slice, images: Tensor) -> None:
        some = self._prompts.select(range(rows.start, rows.stop))
        groups = None if self._groups is None else self._groups[rows]
        self._batches[rows.start] = self._scorer.rewards.start(
            images, some.texts, some.metadata, groups=groups, offset=self._first + rows.start
        )

    def result(self) -> dict[str, Tensor]:
        """Waits for all rows as `Scorer.result`: scores float32 `[n]` by reward, in the order of the rows."""
        parts = [self._scorer.result(self._batches[start]) for start in sorted(self._batches)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def cancel(self) -> None:
        """Ends running requests and drops work that has not begun."""
        for scoring in self._batches.values():
            scoring.cancel()


def _failed(scoring: Scoring) -> bool:
    finished = [future for future in scoring.futures.values() if future.done() and not future.cancelled()]
    return any(future.exception() is not None for future in finished)

"""The pairs that a voting page shows: the open ones of each rater, votes, undo, and pairs chosen ahead."""

from __future__ import annotations

import threading
from typing import Any

from etude.errors import EtudeError
from etude.preferences.pairing import Pairing
from etude.preferences.pool import ANSWERS, Pool, check_rater, read_seconds
from etude.preferences.verdict import Watch

AHEAD = 3
"""Pairs that are chosen for a rater: the one that is shown, and those that load meanwhile."""


class RefusedError(Exception):
    """A request that gets nothing: the status and one sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Desk:
    """Answers of a voting page, one at a time.

    A vote is answered with the pairs that were chosen before; its answer waits for one write alone.
    `choose_ahead` chooses further pairs, after that answer and before the next vote.

    Args:
        pool: images and votes.
        pairing: the choice of pairs.
        target: votes of one rater after which the page says that it is reached; 0: none.
    """

    def __init__(self, pool: Pool, pairing: Pairing, target: int) -> None:
        self.pool, self.pairing, self.target = pool, pairing, target
        self.watch = Watch(pool)
        self.title = "Which is better?" if self.watch.sides is None else "Blind comparison"
        self._turn = threading.RLock()
        self._prompts: dict[int, tuple[str, str]] = {}
        self._waiting: dict[str, None] = {}

    def pairs(self, message: dict[str, Any]) -> dict[str, Any]:
        rater = _name(message)
        with self._turn:
            self.choose_ahead()
            return self._state(rater, self._choose(rater))

    def vote(self, message: dict[str, Any]) -> dict[str, Any]:
        rater, pair, answer, seconds = _name(message), *(message.get(k) for k in ("pair", "answer", "seconds"))
        if type(pair) is not int or not 0 < pair < 1 << 62 or answer not in ANSWERS:
            raise RefusedError(400, f"a vote has a number `pair` and an `answer` of {', '.join(ANSWERS)}")
        with self._turn:
            self.choose_ahead()
            self.pool.vote(pair, rater, answer, read_seconds(seconds))
            if not (queue := self.pool.open_pairs(rater)):
                return self._state(rater, self._choose(rater))
            self._waiting[rater] = None
            return self._state(rater, queue)

    def undo(self, message: dict[str, Any]) -> dict[str, Any]:
        """Withdraws the last vote, unless the page shows another number of votes than there are."""
        rater = _name(message)
        with self._turn:
            self.choose_ahead()
            if message.get("votes") in (None, self.pool.count(rater)):
                self.pool.undo(rater)
            return self.pairs(message)

    def choose_ahead(self) -> None:
        """Chooses pairs for the raters who have voted since."""
        with self._turn:
            while self._waiting:
                rater = next(iter(self._waiting))
                self._choose(rater)
                del self._waiting[rater]

    def _choose(self, rater: str) -> list[tuple[int, int, int]]:
        """The open pairs of a rater, filled up to `AHEAD`."""
        queue = self.pool.open_pairs(rater)
        while len(queue) < AHEAD and self.pairing.next(rater) is not None:
            queue = self.pool.open_pairs(rater)
        return queue

    def _state(self, rater: str, queue: list[tuple[int, int, int]]) -> dict[str, Any]:
        return {
            "queue": [self._shown(*pair) for pair in queue[:AHEAD]],
            "votes": self.pool.count(rater),
            "target": self.target,
            "enough": self.watch.enough(),
        }

    def _shown(self, pair: int, left: int, right: int) -> dict[str, Any]:
        for number in (left, right):
            if number not in self._prompts:
                image = self.pool.image(number)
                self._prompts[number] = image.digest, image.prompt
        return {
            "pair": pair,
            "prompt": self._prompts[left][1],
            "left": self._prompts[left][0],
            "right": self._prompts[right][0],
        }


def _name(message: dict[str, Any]) -> str:
    """The rater of a message."""
    name = message.get("rater")
    try:
        return check_rater(name if isinstance(name, str) else "")
    except EtudeError as error:
        raise RefusedError(400, str(error)) from None

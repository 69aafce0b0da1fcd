"""Which pair a rater sees next: fresh ones spread over the pool, and some again with sides swapped.

A fresh pair is two images of one prompt that the rater has not compared. Of 64 random candidates
the one wins whose images this rater, and then everybody, has seen least; with an `Unsure` chooser,
the one whose vote would teach the present reward most, less for images seen often. In a pool that
judges two makers a pair is their images of one sample. Sides are random.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from etude.preferences.pool import Pool

REPEAT_SHARE = 0.1
REPEAT_DISTANCE = 10
"""Pairs that a rater sees between a pair and its repetition, at least."""
_CANDIDATES = 64

Unsure = Callable[[list[tuple[int, int]]], NDArray[np.float64]]
"""From pairs of image numbers to how much a vote on each would teach, above 0."""


class Pairing:
    """Chooses pairs. What it remembers follows the database, which other servers write, too.

    Args:
        pool: images and pairs.
        unsure: choose by information. Default: at random.
        repeat_share: share of pairs that are shown again.
        seed: seed of the choices. Default: from the system.
    """

    def __init__(
        self, pool: Pool, unsure: Unsure | None = None, repeat_share: float = REPEAT_SHARE, seed: int | None = None
    ) -> None:
        self.pool, self.unsure, self.repeat_share = pool, unsure, repeat_share
        self.rng = np.random.default_rng(seed)
        self.sides: list[int] | None = pool.fact("sides")
        self._groups: dict[object, list[int]] = defaultdict(list)
        self._order: list[object] = []
        self._images = self._pairs = 0
        self._shown: Counter[int] = Counter()
        self._by_rater: dict[str, Counter[int]] = defaultdict(Counter)
        self._compared: dict[str, set[tuple[int, int]]] = defaultdict(set)
        self._fresh: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        self._repeated: set[int] = set()

    def next(self, rater: str) -> int | None:
        """Records the next pair for a rater and returns its number; None if there is none left."""
        self._follow()
        chosen: tuple[int, int, int | None] | None = None
        if self.rng.random() < self.repeat_share:
            chosen = self._again(rater)
        if chosen is None:
            chosen = self._new(rater)
        if chosen is None:
            return None
        left, right, repeats = chosen
        return self.pool.add_pair(left, right, rater, repeats)

    @property
    def total(self) -> int:
        """The number of different pairs that one rater can be shown."""
        self._follow()
        return sum(len(group) * (len(group) - 1) // 2 for group in self._groups.values())

    def _follow(self) -> None:
        for image in self.pool.images(self._images):
            self._images = image.id
            if self.sides is None or image.maker in self.sides:
                group = self._groups[image.prompt if self.sides is None else image.sample]
                group.append(image.id)
                if len(group) == 2:
                    self._order.append(image.prompt if self.sides is None else image.sample)
        for number, left, right, rater, repeats in self.pool.pairs(self._pairs):
            self._pairs = number
            for image_id in (left, right):
                self._shown[image_id] += 1
                self._by_rater[rater][image_id] += 1
            self._compared[rater].add((min(left, right), max(left, right)))
            if repeats:
                self._repeated.add(repeats)
            else:
                self._fresh[rater].append((number, left, right))

    def _again(self, rater: str) -> tuple[int, int, int | None] | None:
        """An own earlier pair with sides swapped."""
        old = self._fresh[rater][:-REPEAT_DISTANCE]
        for place in self.rng.permutation(len(old))[:16]:
            number, left, right = old[place]
            if number not in self._repeated and self.pool.has_vote(number):
                return right, left, number
        return None

    def _new(self, rater: str) -> tuple[int, int, int | None] | None:
        candidates = list(dict.fromkeys(pair for pair in self._random() if pair not in self._compared[rater]))
        if not candidates:
            candidates = self._rest(rater)
        if not candidates:
            return None
        seen = self._by_rater[rater]
        if self.unsure is not None:
            often = np.array([1 + max(seen[a], seen[b]) for a, b in candidates])
            best = candidates[int(np.argmax(self.unsure(candidates) / often**2))]
        else:
            best = min(candidates, key=lambda p: (seen[p[0]] + seen[p[1]], self._shown[p[0]] + self._shown[p[1]]))
        left, right = best if self.rng.random() < 0.5 else best[::-1]
        return left, right, None

    def _random(self) -> Iterator[tuple[int, int]]:
        for place in self.rng.integers(len(self._order), size=_CANDIDATES) if self._order else ():
            group = self._groups[self._order[place]]
            first, second = self.rng.choice(len(group), size=2, replace=False)
            yield min(group[first], group[second]), max(group[first], group[second])

    def _rest(self, rater: str) -> list[tuple[int, int]]:
        """The first unseen pairs, when few are left."""
        rest: list[tuple[int, int]] = []
        for place in self.rng.permutation(len(self._order)):
            rest += [
                pair
                for pair in combinations(sorted(self._groups[self._order[place]]), 2)
                if pair not in self._compared[rater]
            ]
            if len(rest) >= _CANDIDATES:
                break
        return rest

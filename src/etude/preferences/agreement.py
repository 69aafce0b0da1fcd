"""Agreement of raters with themselves and with one another, and their leaning to a side.

    self-agreement  share of repeated pairs, shown with sides swapped, that get the same image again
    between raters  the same for pairs that several raters voted on
    side bias       share of the left side among decided votes; sides are random, so 1/2 is fair

The same image or two ties count 1, a tie against a decision 1/2, opposite decisions 0. With a the
self-agreement, no predictor of votes is right more often than (1 + sqrt(2 a - 1)) / 2: if the
rater picks the better image of a pair with probability (1 + q) / 2, then a = (1 + E q^2) / 2, the
best accuracy is (1 + E q) / 2, and E q <= sqrt(E q^2).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from etude.preferences.clustering import Clusters
from etude.preferences.pool import Ballots
from etude.preferences.shares import Share, estimate_share

_MOST_RATERS = 20  # of one pair, in the comparison between raters


@dataclass(frozen=True)
class Agreement:
    """How far votes can be trusted. A share is None where nothing speaks of it.

    Attributes:
        own: raters with themselves.
        between: raters with one another.
        left: share of the left side among decided votes.
        ties: share of ties among all votes.
    """

    own: Share | None
    between: Share | None
    left: Share | None
    ties: Share | None

    @property
    def ceiling(self) -> float | None:
        """The largest accuracy that any predictor of these votes can have; None without repeats."""
        return None if self.own is None else (1 + math.sqrt(max(0.0, 2 * self.own.mean - 1))) / 2


def measure(ballots: Ballots, prompts: Mapping[int, str]) -> Agreement:
    """Measure the agreement in votes; `prompts` has the prompt of each image."""
    prompt = np.array([prompts[each] for each in ballots.left.tolist()], dtype=object).astype(str)
    by_pair = {pair: i for i, pair in enumerate(ballots.pair.tolist())}
    again = [(by_pair[first], i) for i, first in enumerate(ballots.repeats.tolist()) if first in by_pair]
    same = [_same(ballots, i, j) for i, j in again]
    rows = np.array([i for i, _ in again], int)
    by_images: dict[tuple[int, int], dict[str, int]] = defaultdict(dict)
    for i, (a, b) in enumerate(zip(ballots.left.tolist(), ballots.right.tolist(), strict=True)):
        if not ballots.repeats[i]:
            by_images[min(a, b), max(a, b)].setdefault(str(ballots.rater[i]), i)
    couples = [
        couple for votes in by_images.values() for couple in combinations(list(votes.values())[:_MOST_RATERS], 2)
    ]
    across = np.array([i for i, _ in couples], int)
    decided = np.flatnonzero(ballots.outcome)
    clusters = Clusters.of(prompt, ballots.rater) if len(ballots) else None
    if clusters is None:
        return Agreement(None, None, None, None)
    return Agreement(
        estimate_share(same, clusters.take(rows)) if same else None,
        estimate_share([_same(ballots, i, j) for i, j in couples], Clusters.of(prompt[across])) if couples else None,
        estimate_share(ballots.outcome[decided] == 1, clusters.take(decided)) if len(decided) else None,
        estimate_share(ballots.outcome == 0, clusters),
    )


def _same(ballots: Ballots, i: int, j: int) -> float:
    swapped = ballots.left[i] != ballots.left[j]
    first, second = int(ballots.outcome[i]), int(-ballots.outcome[j] if swapped else ballots.outcome[j])
    return 1.0 if first == second else 0.5 if 0 in (first, second) else 0.0

"""Agreement of raters with themselves and with one another, and their leaning to a side.

    self-agreement  share of repeated pairs, shown with sides swapped, that get the same image again
    between raters  the same for pairs that several raters voted on
    side bias       share of the left side among decided votes; sides are random, so 1/2 is fair

The same image or two ties count 1, a tie against a decision 1/2, opposite decisions 0.

    ceiling  (1 + sqrt(E[y y']) / P(decision)) / 2

with y and y' the two votes on a repeated pair: 1 for one image, -1 for the other, 0 for a tie. No
predictor of decided votes is right more often: a rater who leans to no side chooses the better
image of a pair s more often than the worse one, E[y y'] = E[s^2], the best accuracy is
(1 + E[s] / P(decision)) / 2, and E[s] <= sqrt(E[s^2]). Without ties it is (1 + sqrt(2 a - 1)) / 2
of the self-agreement a.
"""

from __future__ import annotations

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
        ceiling: the largest accuracy that any predictor of these raters' decided votes can have.
        between: raters with one another.
        left: share of the left side among decided votes.
        ties: share of ties among all votes.
    """

    own: Share | None = None
    ceiling: Share | None = None
    between: Share | None = None
    left: Share | None = None
    ties: Share | None = None


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
        return Agreement()
    return Agreement(
        estimate_share(same, clusters.take(rows)) if same else None,
        _ceiling(ballots, again, clusters.take(rows)),
        estimate_share([_same(ballots, i, j) for i, j in couples], Clusters.of(prompt[across])) if couples else None,
        estimate_share(ballots.outcome[decided] == 1, clusters.take(decided)) if len(decided) else None,
        estimate_share(ballots.outcome == 0, clusters),
    )


def _ceiling(ballots: Ballots, again: list[tuple[int, int]], clusters: Clusters) -> Share | None:
    """The ceiling from the repeated pairs; None where none of them was decided."""
    both = np.array([_votes(ballots, i, j) for i, j in again], np.float64).reshape(-1, 2)
    decided = float(np.abs(both).mean()) if len(both) else 0.0
    if not decided:
        return None
    product = estimate_share((1 + both.prod(axis=1)) / 2, clusters)
    ends = (2 * np.array([product.mean, product.low, product.high]) - 1).clip(min=0)
    mean, low, high = ((1 + np.sqrt(ends) / decided).clip(max=2) / 2).tolist()
    return Share(mean, low, high, product.n, product.basis)


def _same(ballots: Ballots, i: int, j: int) -> float:
    first, second = _votes(ballots, i, j)
    return 1.0 if first == second else 0.5 if 0 in (first, second) else 0.0


def _votes(ballots: Ballots, i: int, j: int) -> tuple[int, int]:
    """Votes i and j on one pair, 1 for the left image of vote i."""
    swapped = ballots.left[i] != ballots.left[j]
    return int(ballots.outcome[i]), int(-ballots.outcome[j] if swapped else ballots.outcome[j])

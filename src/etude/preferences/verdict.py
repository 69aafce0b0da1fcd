"""The blind verdict on two makers of images, A and B: what people prefer, and whether they were asked enough.

    win rate of A  share of votes for A's image, a tie 1/2; 95 % interval clustered by prompt
    always-valid   `always_valid` on the first vote on each prompt: may be looked at after each vote

A pair is the two makers' images of one prompt from one noise. Sides are random, and nothing on the
page says which is which. Pairs that are shown again speak of self-agreement alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.errors import EtudeError
from etude.preferences.agreement import Agreement, measure
from etude.preferences.always_valid import INDIFFERENT, Running, running
from etude.preferences.clustering import Clusters
from etude.preferences.pool import Ballots, Pool, PoolImage
from etude.preferences.shares import Share, estimate_share

WORDS = {
    "A": "people prefer A",
    "B": "people prefer B",
    "equal": f"no preference beyond {100 * INDIFFERENT:.0f} points either way",
    None: "not decided yet: more votes are needed",
}


@dataclass(frozen=True)
class Verdict:
    """What the votes of a judgement say.

    Attributes:
        a: label of the first maker.
        b: label of the second.
        win_rate: share of A with its interval; None without votes.
        running: the always-valid interval.
        agreement: how far the votes can be trusted.
        ties: number of ties among the votes on fresh pairs.
    """

    a: str
    b: str
    win_rate: Share | None
    running: Running
    agreement: Agreement
    ties: int

    @property
    def words(self) -> str:
        """The verdict in words, by the always-valid interval."""
        return WORDS[self.running.decision()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        own = self.agreement.own
        return {
            "a": self.a,
            "b": self.b,
            "win_rate_a": None if self.win_rate is None else self.win_rate.to_dict(),
            "ties": self.ties,
            "always_valid": self.running.to_dict(),
            "verdict": self.running.decision(),
            "words": self.words,
            "self_agreement": None if own is None else own.to_dict(),
            "left": None if self.agreement.left is None else self.agreement.left.to_dict(),
        }

    def lines(self) -> list[str]:
        """The verdict for a terminal, one fact a line."""
        lines = [f"A: {self.a}", f"B: {self.b}"]
        if self.win_rate is None:
            return [*lines, "no vote yet"]
        run = self.running
        lines += [
            f"A wins {self.win_rate}, {self.win_rate.n} votes, {self.ties} ties split ({self.win_rate.basis})",
            f"always-valid 95 % interval [{100 * run.low:.1f}, {100 * run.high:.1f}] %, from the first vote on each of {run.n} prompts",
            f"verdict: {self.words}",
        ]
        return [*lines, *describe(self.agreement)]


def describe(agreement: Agreement) -> list[str]:
    """Agreement and side bias in words, one fact a line; a leaning that is sure is called one."""
    lines = []
    if agreement.own is not None:
        lines.append(f"self-agreement {agreement.own} on {agreement.own.n} repeated pairs")
    if agreement.ceiling is not None:
        lines.append(f"the best predictor of such votes is right on {agreement.ceiling} of decided ones, at most")
    if agreement.between is not None:
        lines.append(f"agreement between raters {agreement.between} on {agreement.between.n} shared pairs")
    if (left := agreement.left) is not None:
        sure = (
            "no leaning found"
            if left.low <= 0.5 <= left.high
            else f"a leaning to the {'left' if left.mean > 0.5 else 'right'}"
        )
        lines.append(f"left side chosen {left} of decided votes: {sure}")
    return lines


def judge(pool: Pool) -> Verdict:
    """The verdict of a pool that judges two makers.

    Raises:
        EtudeError: the pool judges none.
    """
    sides = pool.fact("sides")
    if sides is None:
        raise EtudeError(
            f"the pool '{pool.root}' compares no two sides: make one with `etude preferences judge A B --out DIR`."
        )
    ballots, images = pool.ballots(), {image.id: image for image in pool.images()}
    rows, values, prompts = _fresh(ballots, images, sides)
    first = np.unique(prompts, return_index=True)[1] if len(values) else np.zeros(0, int)
    makers = pool.makers()
    return Verdict(
        makers[sides[0]].label,
        makers[sides[1]].label,
        estimate_share(values, Clusters.of(prompts, ballots.rater[rows])) if len(values) else None,
        _running(values[first]),
        measure(ballots, {number: image.prompt for number, image in images.items()}),
        int((values == 0.5).sum()),
    )


class Watch:
    """Says when a judgement is decided. It follows the votes in the pool, which other servers write, too.

    Args:
        pool: a pool that judges two makers; one that judges none is never decided.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool, self.sides = pool, pool.fact("sides")
        self._images: dict[int, PoolImage] = {}
        self._first: dict[str, float] = {}
        self._count = self._last = 0

    def enough(self) -> str | None:
        """A sentence once the judgement is decided; it does not say which side won."""
        if self.sides is None:
            return None
        count, last, new = self.pool.progress(self._last)
        if count != self._count + new:  # a vote was withdrawn
            self._first, self._count, self._last = {}, 0, 0
        if count != self._count:
            self._images |= {image.id: image for image in self.pool.images(max(self._images, default=0))}
            _, values, prompts = _fresh(self.pool.ballots(self._last), self._images, self.sides)
            for value, prompt in zip(values.tolist(), prompts.tolist(), strict=True):
                self._first.setdefault(prompt, value)
            self._count, self._last = count, last
        decided = _running(np.array(list(self._first.values()))).decision()
        return None if decided is None else "Enough votes are in, thank you. You may stop or go on."


def _running(values: NDArray[np.float64]) -> Running:
    """The always-valid interval from the first vote on each prompt."""
    return running(*(int((values == value).sum()) for value in (1.0, 0.5, 0.0)))


def _fresh(
    ballots: Ballots, images: Mapping[int, PoolImage], sides: list[int]
) -> tuple[list[int], NDArray[np.float64], NDArray[np.str_]]:
    """The votes on fresh pairs in the order of voting: the row of each, its value for A (1, 1/2 or 0), its prompt."""
    rows, values, prompts = [], [], []
    for i in range(len(ballots)):
        left, right = images[int(ballots.left[i])], images[int(ballots.right[i])]
        if ballots.repeats[i] or {left.maker, right.maker} != set(sides):
            continue
        rows.append(i)
        sign = 1 if left.maker == sides[0] else -1
        values.append((sign * int(ballots.outcome[i]) + 1) / 2)
        prompts.append(left.prompt)
    return rows, np.array(values), np.array(prompts, np.str_)

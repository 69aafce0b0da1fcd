"""An interval for a win rate that may be looked at after every vote, and the rule that ends voting.

For votes x_i (1 a win, 1/2 a tie, 0 a loss) and a hypothetical win rate m, a gambler who starts
with 1 and stakes lambda on each vote holds

    K_t(m) = mean over lambda of  prod_{i <= t} (1 + lambda (x_i - m))

which has mean 1 if m is the win rate. Ville's inequality gives P(some t: K_t(m) >= 1 / alpha) <=
alpha. The interval at time t is the hull of all m with K_t(m) < 1 / alpha; it covers the win rate
at all times together with probability 1 - alpha, however often it is looked at and whenever voting
stops (betting after Waudby-Smith and Ramdas, arXiv 2010.09686). The stakes are spread evenly over
what bankrupts nobody: lambda = u / m and -u / (1 - m), u in (0, 1). K_t depends on the numbers of
wins, ties and losses alone, not on their order.

It needs votes whose mean, given all votes before, is the win rate. Only the first vote on each
prompt may therefore enter it: later votes on a prompt share its luck.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from etude.preferences.clustering import Floats

ALPHA = 0.05
INDIFFERENT = 0.1
"""Distance from 1/2 within which a win rate counts as no preference."""
_STAKES = (np.arange(32) + 0.5) / 32
_GRID = np.arange(1, 400) / 400  # holds 1/2 exactly


@dataclass(frozen=True)
class Running:
    """The always-valid 95 % interval after the votes so far.

    Attributes:
        n: votes that entered it, one for each prompt.
        mean: their mean; 1/2 without votes.
        low: lower end.
        high: upper end.
        evidence: the gambler's fortune against "no preference", 1/2; 20 rejects it.
    """

    n: int
    mean: float
    low: float
    high: float
    evidence: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def decision(self, indifferent: float = INDIFFERENT) -> str | None:
        """`A`, `B`, `equal`, or None while votes are missing.

        Args:
            indifferent: `equal` is said once the interval lies within 1/2 +- this.
        """
        if self.low > 0.5:
            return "A"
        if self.high < 0.5:
            return "B"
        return "equal" if max(self.high - 0.5, 0.5 - self.low) <= indifferent else None


def log_fortune(wins: ArrayLike, ties: ArrayLike, losses: ArrayLike, rate: ArrayLike = 0.5) -> Floats:
    """log K(m) after that many wins, ties and losses; the arguments broadcast, m in (0, 1)."""
    w, t, l, m = np.broadcast_arrays(wins, ties, losses, np.asarray(rate, np.float64))
    w, t, l, m = (np.asarray(each, np.float64)[..., None] for each in (w, t, l, m))
    stakes = np.concatenate([_STAKES / m, -_STAKES / (1 - m)], axis=-1)
    logs = w * np.log1p(stakes * (1 - m)) + t * np.log1p(stakes * (0.5 - m)) + l * np.log1p(-stakes * m)
    top = logs.max(axis=-1)
    return np.asarray(top + np.log(np.exp(logs - top[..., None]).mean(axis=-1)))


def running(wins: int, ties: int, losses: int) -> Running:
    """The interval after that many wins, ties and losses."""
    n = wins + ties + losses
    mean = (wins + ties / 2) / n if n else 0.5
    kept = np.flatnonzero(log_fortune(wins, ties, losses, _GRID) < np.log(1 / ALPHA))
    if not len(kept):  # every point of the grid is rejected: the rate lies between two, near the mean
        above = int(np.searchsorted(_GRID, mean))
        kept = np.array([above, above - 1])
    low = float(_GRID[kept[0] - 1]) if kept[0] > 0 else 0.0
    high = float(_GRID[kept[-1] + 1]) if kept[-1] + 1 < len(_GRID) else 1.0
    return Running(n, mean, low, high, math.exp(min(700.0, float(log_fortune(wins, ties, losses)))))

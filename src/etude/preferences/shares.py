"""Shares of votes, such as win rates, with 95 % intervals that hold near 0 and 1.

    share     p  = mean of y_i, y in [0, 1]; a tie counts 1/2
    variance  se^2, robust to clusters (`clustering`)
    interval  Wilson's, with n replaced by the effective number p (1 - p) / se^2
              and the normal quantile by Student's t with the clusters' degrees of freedom

Where every vote is the same, se is 0 and says nothing: each cluster then counts as one vote.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from etude.errors import EtudeError
from etude.preferences.clustering import Clusters

_MOST = 4.0  # effective votes of one vote, at most: ties have less variance than decided votes


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] with its 95 % interval.

    Attributes:
        mean: the share.
        low: lower end of the interval.
        high: upper end.
        n: number of votes.
        basis: the clusters in words.
    """

    mean: float
    low: float
    high: float
    n: int
    basis: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """`63.1 % [58.0, 68.0]`."""
        return f"{100 * self.mean:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def estimate_share(values: ArrayLike, clusters: Clusters) -> Share:
    """Estimate a share from one value in [0, 1] for each vote.

    Raises:
        EtudeError: there is no value, or one lies outside [0, 1].
    """
    from scipy.stats import t

    y = np.asarray(values, np.float64)
    if y.ndim != 1 or not len(y) or len(y) != len(clusters.prompt):
        raise EtudeError(f"a share needs one value per vote, at least one, not shape {y.shape}.")
    if not ((y >= 0) & (y <= 1)).all():
        raise EtudeError("a share needs values in [0, 1]: 1 for a win, 1/2 for a tie, 0 for a loss.")
    n, p = len(y), float(y.mean())
    variance = float(clusters.covariance((y - p) / n)[0, 0])
    if p * (1 - p) < 1e-12:
        effective = float(clusters.prompts if clusters.prompts > 1 else n)
    else:
        effective = min(p * (1 - p) / max(variance, 1e-300), _MOST * n)
    q2 = float(t.ppf(0.975, clusters.degrees)) ** 2
    middle = (p + q2 / (2 * effective)) / (1 + q2 / effective)
    half = math.sqrt(q2) * math.sqrt(p * (1 - p) / effective + q2 / (4 * effective**2)) / (1 + q2 / effective)
    return Share(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)), n, clusters.words)

"""The divergence of a trained reward from a gold reward, which nobody trains on: hacking made visible.

    divergence = E [ (r - r_base) / sd(r_base) - (g - g_base) / sd(g_base) ]

r is the trained reward, g the gold reward, and r_base and g_base those of the base model from the
same noise; sd is over the base model's images. Above 0 the trained reward gains more than the gold
one, in units in which both began. The difference is taken image by image, and its interval is
clustered by prompt.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from etude.measuring.pairs import Scores
from etude.measuring.statistics import Estimate, estimate_mean


def divergences(
    scores: Scores, base: Scores, trained: str, gold: Iterable[str], clusters: list[int]
) -> dict[str, Estimate]:
    """The divergence of the trained reward from each gold reward, by its name.

    A reward that is the same for every image of the base model has no unit: it has no divergence.
    """
    spread = {name: float(np.std(base[name])) for name in (trained, *gold)}
    gains = {name: (scores[name] - base[name]) / unit for name, unit in spread.items() if unit > 0}
    if trained not in gains:
        return {}
    return {name: estimate_mean(gains[trained] - gains[name], clusters) for name in gold if name in gains}

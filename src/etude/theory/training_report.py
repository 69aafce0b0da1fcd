"""The numbers of `etude theory training`: the gap along training, one curve for each eta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from etude.theory.along_training import gap_along_training, gap_at_limit, gap_slope
from etude.theory.arrays import Array
from etude.theory.training_problem import TrainingProblem


def training_report(
    problem: TrainingProblem, etas: list[float], on_update: Callable[[int], None] | None = None, **ascent: Any
) -> dict[str, Any]:
    """Compute the curves as plain numbers and lists (JSON); `ascent` goes to `gap_along_training`."""
    curve, slope = gap_along_training(problem, on_update=on_update, **ascent), gap_slope(problem)
    limit = None
    if problem.has_limit and ascent.get("measured_eta") is None:
        limit = gap_at_limit(problem)
    rows = [
        {
            "eta": eta,
            "slope": float(slope.gap[e]),
            "gap": curve.gap[:, e].tolist(),
            "relative": _finite(curve.relative[:, e]),
            "ode": curve.ode[:, e].tolist(),
            "sde": curve.sde[:, e].tolist(),
            "kl": _finite(curve.kl[:, e]),
            "widest": int(np.argmax(np.abs(curve.gap[:, e]))),
            "limit": None if limit is None else float(limit.gap[0, e]),
        }
        for e, eta in enumerate(etas)
    ]
    return {"method": problem.method, "beta": problem.beta, "updates": len(curve.gap) - 1, "etas": rows}


def _finite(values: Array) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]

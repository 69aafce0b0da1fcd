"""Stop a run when a watched reward falls.

The guard looks at the held-out images of the ODE sampler, which is the sampler that ships. It
depends on the evaluations alone, so a run that is killed and resumed stops at the same iteration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etude.measuring.statistics import Estimate


def fallen(evaluation: Mapping[str, Any], limits: Mapping[str, float]) -> str | None:
    """The first reward that has surely fallen below its limit, or None.

    A reward has fallen below its limit if the whole 95 % interval of its improvement, E r(ODE,
    tuned) - E r(ODE, base), lies below -limit. The noise of an evaluation alone stops a run in at
    most one of 40 evaluations.

    Args:
        evaluation: result of `Evaluation.measure`; empty before the first.
        limits: allowed fall by reward, in the reward's own unit, at least 0.
    """
    if not evaluation:
        return None
    return next((reward for reward, limit in limits.items() if _change(evaluation, reward).high < -limit), None)


def explain_stop(
    evaluation: Mapping[str, Any], limits: Mapping[str, float], iteration: int, iterations: int
) -> str | None:
    """One sentence on the fall that stopped a run; None if no reward fell."""
    reward = fallen(evaluation, limits)
    if reward is None:
        return None
    return (
        f"Stopped after iteration {iteration} of {iterations}: {reward} under the ODE has changed by "
        f"{_change(evaluation, reward)} since the base model, a fall beyond the {limits[reward]:g} that "
        "evaluation.stop_on_fall allows."
    )


def _change(evaluation: Mapping[str, Any], reward: str) -> Estimate:
    return Estimate.from_dict(evaluation["improvement"][reward])

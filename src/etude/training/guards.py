"""What keeps a run from paying for one reward with the others: the fall that stops it, and the weights kept from its best moment.

Both look at the held-out images of the ODE sampler, since that is what is shipped. Both are functions of what the evaluations gave, so
that a run that is killed and resumed stops where, and keeps what, it would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etude.measuring.statistics import Estimate

if TYPE_CHECKING:
    pass


def fallen(evaluation: Mapping[str, Any], limits: Mapping[str, float]) -> str | None:
    """The first reward that has surely fallen further than it may, or None.

    A reward has fallen further than its limit if the whole 95 % interval of its improvement, E r(ODE, tuned) - E r(ODE, base), lies
    below -limit: the noise of an evaluation alone stops a run in at most one of 40 evaluations.

    Args:
        evaluation: a result of `Evaluation.measure`, or empty before the first.
        limits: reward to the fall that is allowed, in the reward's own unit, at least 0.
    """
    if not evaluation:
        return None
    return next((reward for reward, limit in limits.items() if _change(evaluation, reward).high < -limit), None)


def explain_stop(
    evaluation: Mapping[str, Any], limits: Mapping[str, float], iteration: int, iterations: int
) -> str | None:
    """Why a run ended where it did, in a sentence; None if no reward fell."""
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

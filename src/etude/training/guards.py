"""Stop a run when a watched reward falls, and keep the weights of its best evaluation.

Both look at the held-out images of the ODE sampler, which ships, and depend on the evaluations
alone: a resumed run stops at the same iteration and keeps the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from etude.measuring.pairs import Scores
from etude.measuring.statistics import Estimate, estimate_mean
from etude.policies.sharding import whole


def fallen(evaluation: Mapping[str, Any], limits: Mapping[str, float]) -> str | None:
    """The first reward that has surely fallen below its limit, or None.

    A reward has fallen below its limit if the whole 95 % interval of its improvement, E r(ODE,
    tuned) - E r(ODE, base), lies below -limit, with the limit in the reward's own unit. Noise alone
    stops a run in at most one of 40 evaluations.
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


class BestWeights:
    """The trained weights of the evaluation with a reward's highest ODE mean, the earliest of equals.

    The base model does not compete. The mean of the best weights is a maximum over noisy evaluations
    and therefore too high: at its end a run measures them again (`confirmation`).
    """

    def __init__(self, reward: str | None) -> None:
        self.reward = reward  # None: no weights are kept
        self.weights: dict[str, Tensor] = {}  # on the CPU; empty before the first evaluation of trained weights
        self.iteration = 0  # iteration after which the weights were copied
        self.evaluation: dict[str, Any] = {}  # evaluation of the weights

    def offer(self, iteration: int, evaluation: dict[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Keeps a copy of the parameters if the evaluation is better than all before it."""
        if self.reward is None or iteration == 0:
            return
        if self.weights and self._mean(evaluation) <= self._mean(self.evaluation):
            return
        self.weights = {name: whole(value.detach()).to("cpu", copy=True) for name, value in parameters.items()}
        self.iteration, self.evaluation = iteration, evaluation

    def state(self) -> dict[str, Any]:
        """The state beside the weights, as JSON."""
        return {"iteration": self.iteration, "evaluation": self.evaluation}

    def load_state(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restores the weights and the result of `state`."""
        self.weights, self.iteration, self.evaluation = weights, state["iteration"], state["evaluation"]

    def _mean(self, evaluation: Mapping[str, Any]) -> float:
        return float(evaluation["ode"][self.reward]["mean"])


def confirmation(scores: Mapping[str, Scores], clusters: list[int]) -> dict[str, Any]:
    """Estimates of the best weights from fresh noise, free of the luck that chose them.

    The evaluations of a run share prompts and noise, and weights can be lucky on both. Other noise
    removes the luck with the noise. Only other prompts would remove the luck with the prompts.

    Args:
        scores: scores under the ODE by reward, from equal noise, for the weights "best" and, if they
            were measured, "last" and "base".

    Returns:
        By reward, `ode` of the best weights, and the paired differences `over_last` (best minus
        last) and `improvement` (best minus base).
    """
    best = scores["best"]
    values = {"ode": best}
    for other, quantity in (("last", "over_last"), ("base", "improvement")):
        if other in scores:
            values[quantity] = {reward: best[reward] - scores[other][reward] for reward in best}
    return {
        quantity: {reward: estimate_mean(each, clusters).to_dict() for reward, each in by_reward.items()}
        for quantity, by_reward in values.items()
    }


def explain_best(best: Mapping[str, Any]) -> str:
    """One sentence on the `best` of a summary: iteration, reward, and the estimates from fresh noise."""
    reward, fresh = best["reward"], best.get("confirmation") or {}
    chosen = Estimate.from_dict(best["evaluation"]["ode"][reward]).format(signed=False)
    text = f"Best weights: iteration {best['iteration']}, with the highest held-out {reward} under the ODE, {chosen}"
    if fresh:
        text += f"; measured again from fresh noise {Estimate.from_dict(fresh['ode'][reward]).format(signed=False)}"
    for quantity, words in (("improvement", "improvement over the base model"), ("over_last", "over the last weights")):
        if quantity in fresh:
            text += f", {words} {Estimate.from_dict(fresh[quantity][reward])}"
    return text + "."

"""Keep the weights of a run's best evaluation, and measure them again from fresh noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etude.measuring.statistics import Estimate, estimate_mean
from etude.policies.sharding import whole

if TYPE_CHECKING:
    from torch import Tensor

    from etude.measuring.gap import Scores


def confirmation(scores: Mapping[str, Scores], clusters: list[int]) -> dict[str, Any]:
    """Estimates of the best weights from fresh noise, free of the luck that chose them.

    The highest of several noisy means overestimates its expectation. The evaluations of a run share
    prompts and noise, and weights can be lucky on both. A measurement on the same prompts from
    other noise removes the luck with the noise. Only other prompts would remove the luck with the
    prompts.

    Args:
        scores: scores under the ODE by reward, image by image from equal noise, for the weights
            "best" and, if they were measured, "last" and "base".
        clusters: prompt of each image.

    Returns:
        Estimates by reward: `ode` of the best weights; `over_last` and `improvement`, the paired
        differences best minus last and best minus base.
    """
    best = scores["best"]
    result = {"ode": {reward: estimate_mean(values, clusters).to_dict() for reward, values in best.items()}}
    for other, quantity in (("last", "over_last"), ("base", "improvement")):
        if other in scores:
            result[quantity] = {
                reward: estimate_mean(values - scores[other][reward], clusters).to_dict()
                for reward, values in best.items()
            }
    return result


def explain_best(best: Mapping[str, Any]) -> str:
    """One sentence on the `best` of a summary: iteration, reward, and the estimates from fresh noise."""
    reward, fresh = best["reward"], best.get("confirmation") or {}
    chosen = Estimate.from_dict(best["evaluation"]["ode"][reward]).format(signed=False)
    text = f"Best weights: iteration {best['iteration']}, with the highest held-out {reward} under the ODE, {chosen}"
    if not fresh:
        return text + "."
    text += f"; measured again from fresh noise {Estimate.from_dict(fresh['ode'][reward]).format(signed=False)}"
    for quantity, words in (("improvement", "improvement over the base model"), ("over_last", "over the last weights")):
        if quantity in fresh:
            text += f", {words} {Estimate.from_dict(fresh[quantity][reward])}"
    return text + "."


class BestWeights:
    """The trained weights of the evaluation with a reward's highest ODE mean, the earliest of equals.

    The base model, which iteration 0 evaluates, does not compete; the improvement compares the best
    weights with it. The mean of the best weights is a maximum over noisy evaluations and therefore
    too high: at its end a run measures them again (`confirmation`).

    Args:
        reward: reward that decides. None: no weights are kept.

    Attributes:
        weights: weights on the CPU, by parameter; empty before the first evaluation of trained
            weights.
        iteration: iteration after which the weights were copied.
        evaluation: evaluation of the weights.
    """

    def __init__(self, reward: str | None) -> None:
        self.reward = reward
        self.weights: dict[str, Tensor] = {}
        self.iteration = 0
        self.evaluation: dict[str, Any] = {}

    def offer(self, iteration: int, evaluation: dict[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Keeps a copy of the parameters if the evaluation is better than all before it."""
        if self.reward is None or iteration == 0:
            return
        if self.weights and self._mean(evaluation) <= self._mean(self.evaluation):
            return
        self.weights = {name: whole(value.detach()).to("cpu", copy=True) for name, value in parameters.items()}
        self.iteration, self.evaluation = iteration, evaluation

    def state(self) -> dict[str, Any]:
        """State for a checkpoint beside the weights, as JSON."""
        return {"iteration": self.iteration, "evaluation": self.evaluation}

    def load_state(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restores `weights` and the result of `state`."""
        self.weights = weights
        self.iteration, self.evaluation = state["iteration"], state["evaluation"]

    def _mean(self, evaluation: Mapping[str, Any]) -> float:
        return float(evaluation["ode"][self.reward]["mean"])

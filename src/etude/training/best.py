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
    """What fresh noise says of weights that were chosen for their figures.

    The highest of several noisy means is higher than what it is the mean of: the evaluations of a run share prompts and noise, and
    weights can be lucky on them. Measured again on the same prompts from other noise, the luck with the noise is gone; that with the
    prompts, which is left, only other prompts take away.

    Args:
        scores: under the ODE, by reward, of "best", and of "last" and "base" if they were measured too, image by image from equal noise.
        clusters: the prompt of each image.

    Returns:
        Estimates by reward: `ode` of the best, `over_last` and `improvement`, its paired differences from the last and the base.
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
    """Which weights were kept, why, and what fresh noise says of them, in a sentence; of a summary's `best`."""
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
    """The trained weights of the evaluation in which a reward's mean under the ODE was highest, the earliest of equals.

    The base model, which iteration 0 evaluates, does not compete: whether the best is better than it, the improvement says. The mean
    of the best is that of a maximum over noisy evaluations, and flatters: at its end a run measures them again (`confirmation`).

    Args:
        reward: that decides; None keeps nothing.

    Attributes:
        weights: on the CPU, by parameter; empty until an evaluation was offered.
        iteration: after which they were taken.
        evaluation: what was measured with them.
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
        """What a checkpoint holds beside the weights, as JSON."""
        return {"iteration": self.iteration, "evaluation": self.evaluation}

    def load_state(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restores what `weights` and `state` were."""
        self.weights = weights
        self.iteration, self.evaluation = state["iteration"], state["evaluation"]

    def _mean(self, evaluation: Mapping[str, Any]) -> float:
        return float(evaluation["ode"][self.reward]["mean"])

"""The rules of advice: how a budget is spent, which eta and which sampler is suggested, and what is said of it. No run, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.errors import EtudeError
from etude.measuring.statistics import Estimate, estimate_mean
from etude.sampling.solvers import SOLVERS

MIN_ITERATIONS = 4
"""A pilot that is shorter learns so little that another eta is dropped sooner."""
LOSS = 0.25
"""Share of the improvement that a cheaper sampler may cost."""
PILOTS_SHARE = 0.8
"""Of the time that is left after timing; the rest is for the deployment samplers."""
SCORE_ERROR = 0.05
"""Of the model's score that the theory is told of: bias and gain, of unknown sign."""


@dataclass(frozen=True)
class Sizes:
    """How the budget is spent: `iterations` of a pilot, and the etas that are tried."""

    iterations: int
    etas: tuple[float, ...]


def size_pilots(etas: Sequence[float], seconds: float, iteration: float, fixed: float, longest: int) -> Sizes:
    """As many etas as leave each pilot MIN_ITERATIONS, and then as many iterations as fit.

    n etas take n + max(2, ceil(n / 2)) pilots of `fixed` + K `iteration` seconds. Etas far from 1 are dropped first.

    Args:
        seconds: for all pilots.
        longest: iterations that are never exceeded.

    Raises:
        EtudeError: not even two etas with one iteration fit.
    """
    nearest = sorted(etas, key=lambda eta: abs(math.log(eta)))
    for count in range(len(nearest), 1, -1):
        fitting = int((seconds / pilots(count) - fixed) // iteration)
        if fitting >= MIN_ITERATIONS or (count == 2 and fitting >= 1):
            return Sizes(min(fitting, longest), tuple(sorted(nearest[:count])))
    needed = pilots(2) * (fixed + iteration)
    raise EtudeError(
        f"the budget leaves {seconds:.0f} s for pilots, but two etas take {needed:.0f} s with one iteration each: give a --budget of "
        f"{(needed - seconds) / PILOTS_SHARE / 60:.1f} minutes more, or smaller runs (--set rollout.images_per_iteration, evaluation.num_images)."
    )


def finalists(count: int) -> int:
    """How many of so many etas go on to the second round: the better half, and never one alone."""
    return max(2, math.ceil(count / 2))


def pilots(count: int) -> int:
    """Runs of both rounds, for so many etas."""
    return count + finalists(count)


def choose_smallest(scores: dict[float, np.ndarray], clusters: list[int]) -> tuple[float, dict[float, Estimate]]:
    """The smallest key whose scores are not significantly below the best's, and how far each is behind the best.

    Significantly: the 95 % interval of the paired difference, best minus it, lies above 0.
    """
    best = max(scores, key=lambda key: float(scores[key].mean()))
    behind = {key: estimate_mean(scores[best] - values, clusters) for key, values in scores.items()}
    return min(key for key, difference in behind.items() if difference.low <= 0), behind


def improved(scores: np.ndarray, base: np.ndarray, clusters: list[int]) -> bool:
    """Whether scores are surely above the base model's of the same noise: the 95 % interval of the paired difference lies above 0."""
    return estimate_mean(scores - base, clusters).low > 0


def choose_eta(
    scores: dict[float, np.ndarray], base: np.ndarray, clusters: list[int]
) -> tuple[float, dict[float, Estimate]]:
    """`choose_smallest` if a pilot surely improved on the base model; else nothing tells etas apart, and it is the one nearest to 1."""
    smallest, behind = choose_smallest(scores, clusters)
    if any(improved(values, base, clusters) for values in scores.values()):
        return smallest, behind
    return min(scores, key=lambda eta: abs(math.log(eta))), behind


def deployment_cells(steps: int) -> list[tuple[str, int]]:
    """Solvers and step counts in the order in which they are worth their time; DDIM at the steps of training is first."""
    half = max(2, steps // 2)
    cells = [("ddim", steps), ("dpmsolver++", half), ("unipc", half), ("dpmsolver++", steps), ("ddim", 2 * steps)]
    return list(dict.fromkeys([*cells, ("heun", half), ("ddim", half), ("unipc", steps), ("dpmsolver++", 2 * steps)]))


def rank_samplers(
    scores: dict[tuple[str, int], np.ndarray], clusters: list[int], reference: tuple[str, int], improvement: float
) -> list[dict[str, Any]]:
    """A row for each sampler, cheapest first; one of them is suggested.

    It is the cheapest that surely gives up no more than LOSS of the improvement: the upper end of the 95 % interval of the paired difference,
    reference minus it, is at most that. That a sampler is not significantly worse is not enough, since few images show little of anything.

    Args:
        scores: image by image from the same noise, by solver and steps.
        reference: the sampler that the pilots were compared under, which may always be suggested.
        improvement: that was measured under it; below 0 counts as 0.
    """
    cost = {cell: SOLVERS[cell[0]].evaluations(cell[1]) for cell in scores}
    order = sorted(scores, key=lambda cell: (cost[cell], cell != reference))
    behind = {cell: estimate_mean(scores[reference] - scores[cell], clusters) for cell in order}
    suggested = next(cell for cell in order if cell == reference or behind[cell].high <= LOSS * max(improvement, 0.0))
    return [
        {
            "solver": cell[0],
            "steps": cell[1],
            "evaluations": cost[cell],
            "ode": estimate_mean(scores[cell], clusters).to_dict(),
            "behind_reference": behind[cell].to_dict(),
            "suggested": cell == suggested,
        }
        for cell in order
    ]


def reasons(
    row: dict[str, Any],
    behind: dict[float, Estimate],
    learnt: bool,
    theory: dict[str, Any] | None,
    cell: dict[str, Any],
    reward: str,
) -> list[str]:
    """Why the suggestion is what it is, and what speaks against trusting it, in sentences.

    Args:
        learnt: some pilot surely improved on the base model.
    """
    eta, said = row["eta"], []
    best = min(behind, key=lambda key: abs(behind[key].mean))
    improvement = Estimate.from_dict(row["improvement"])
    if not learnt:
        said.append(
            f"No pilot surely improved on the base model (at eta = {eta:g}: {improvement}): they were too short to tell etas apart by. Of those "
            "tried twice the one nearest to 1 is suggested; give a larger --budget."
        )
    elif eta == best:
        said.append(
            f"eta = {eta:g} had the highest mean {reward} under the ODE, and no smaller finalist was as good within its interval."
        )
    else:
        said.append(
            f"There is no significant difference between eta = {eta:g} and eta = {best:g}, the highest (it is {behind[eta]} ahead): the smaller "
            "eta is suggested."
        )
    if learnt and improvement.low <= 0:
        said.append(
            f"The pilots at eta = {eta:g} did not surely improve on the base model ({improvement}), others did: give a larger --budget."
        )
    if theory is not None:
        said.append(
            f"For a Gaussian with the moments of this model's latents the theory recommends eta = {theory['exact']:.2f} if the model were exact, "
            f"{theory['with_error']:.2f} with errors of {SCORE_ERROR:.0%} in its score: by the distance of the sampler to that Gaussian, which knows "
            "nothing of the reward."
        )
    said.append(
        f"{cell['solver']} with {cell['steps']} steps ({cell['evaluations']} evaluations of the network) is the cheapest of the samplers that "
        f"surely give up no more than {LOSS:.0%} of the improvement. A reward does not see everything: look at the pictures."
    )
    said.append(
        "Intervals are of 95 %, for prompts and noise, each by itself. Two seeds say little about training's own luck, and long runs may "
        "order etas otherwise than pilots do."
    )
    return said

"""The rules of advice, from numbers alone: sizes, choices of eta and sampler, and reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from etude.errors import EtudeError
from etude.measuring.statistics import Estimate, estimate_mean
from etude.sampling.solvers import Solver

Row = dict[str, Any]
MIN_ITERATIONS = 4
"""Iterations of a useful pilot: rather than run shorter pilots, another eta is dropped."""
LOSS = 0.25
"""Share of the improvement that a cheaper sampler may lose."""
PILOTS_SHARE = 0.8
"""Pilots' share of the time after timing; the rest is for the deployment samplers."""
SCORE_ERROR = 0.05
"""Relative errors that the theory assumes in the model's score: bias and gain, of unknown sign."""


class Sizes(NamedTuple):
    """The sizes of the pilots: iterations of each, and the etas to try."""

    iterations: int
    etas: tuple[float, ...]


def size_pilots(etas: Sequence[float], seconds: float, iteration: float, fixed: float, longest: int) -> Sizes:
    """Sizes of pilots that fit a time: as many etas as possible, then as many iterations.

    n etas take n + max(2, ceil(n / 2)) pilots of `fixed` + K `iteration` seconds, with K iterations
    each. K is at least MIN_ITERATIONS, or at least 1 for two etas, and at most `longest`. Etas far
    from 1 are dropped first.

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
    """Number of etas that go on to the second round: the better half of `count`, at least two."""
    return max(2, math.ceil(count / 2))


def pilots(count: int) -> int:
    """Number of pilots in both rounds, for `count` etas."""
    return count + finalists(count)


def choose_smallest(scores: dict[float, np.ndarray], clusters: list[int]) -> tuple[float, dict[float, Estimate]]:
    """The smallest key not significantly below the best, and each key's distance to the best.

    A key is significantly below if the 95 % interval of the paired difference, best minus key, lies
    above 0. The scores are of images from the same noise; `clusters` are their prompts.
    """
    best = max(scores, key=lambda key: float(scores[key].mean()))
    behind = {key: estimate_mean(scores[best] - values, clusters) for key, values in scores.items()}
    return min(key for key, difference in behind.items() if difference.low <= 0), behind


def improved(scores: np.ndarray, base: np.ndarray, clusters: list[int]) -> bool:
    """Whether the 95 % interval of the paired difference to the base model lies above 0."""
    return estimate_mean(scores - base, clusters).low > 0


def choose_eta(
    scores: dict[float, np.ndarray], base: np.ndarray, clusters: list[int]
) -> tuple[float, dict[float, Estimate]]:
    """The eta to suggest, and each eta's distance to the best.

    It is the result of `choose_smallest` if some pilot surely improved on the base model: less
    noise means a smaller gap to the ODE, and nothing speaks for more. Otherwise no pilot tells etas
    apart, and it is the eta nearest to 1.
    """
    smallest, behind = choose_smallest(scores, clusters)
    if any(improved(values, base, clusters) for values in scores.values()):
        return smallest, behind
    return min(scores, key=lambda eta: abs(math.log(eta))), behind


def deployment_cells(steps: int) -> list[tuple[str, int]]:
    """(solver, steps) pairs in the order to measure them; DDIM at the training steps is first."""
    half = max(2, steps // 2)
    cells = [("ddim", steps), ("dpmsolver++", half), ("unipc", half), ("dpmsolver++", steps), ("ddim", 2 * steps)]
    return list(dict.fromkeys([*cells, ("heun", half), ("ddim", half), ("unipc", steps), ("dpmsolver++", 2 * steps)]))


def rank_samplers(
    scores: dict[tuple[str, int], np.ndarray], clusters: list[int], reference: tuple[str, int], improvement: float
) -> list[Row]:
    """A row for each sampler, cheapest first; one of them is suggested.

    The suggestion is the cheapest sampler that surely loses no more than LOSS of the improvement:
    the upper end of the 95 % interval of the paired difference, reference minus sampler, is at most
    that. It is not enough that a sampler is not significantly worse, since few images show few
    differences.

    Args:
        scores: scores by (solver, steps), of images from the same noise.
        reference: sampler under which the pilots were compared; it may always be suggested.
        improvement: measured under the reference; below 0 counts as 0.
    """
    cost = {cell: Solver(*cell).evaluations for cell in scores}
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
    row: Row, behind: dict[float, Estimate], learnt: bool, theory: Row | None, cell: Row, reward: str
) -> list[str]:
    """Sentences on the reasons for the suggestion, and on its limits.

    `row` and `cell` are of the suggested eta and sampler, `behind` is the distance of each finalist
    to the best, and `learnt` says whether some pilot surely improved on the base model.
    """
    eta, improvement = row["eta"], Estimate.from_dict(row["improvement"])
    best = min(behind, key=lambda key: abs(behind[key].mean))
    if not learnt:
        why = (
            f"No pilot surely improved on the base model (at eta = {eta:g}: {improvement}): the pilots were too short to tell etas apart. Of the "
            "etas tried twice, the one nearest to 1 is suggested; give a larger --budget."
        )
    elif eta == best:
        why = f"eta = {eta:g} had the highest mean {reward} under the ODE, and no smaller finalist was as good within its interval."
    else:
        why = (
            f"There is no significant difference between eta = {eta:g} and eta = {best:g}, which had the highest mean {reward} (lead: "
            f"{behind[eta]}): the smaller eta is suggested."
        )
    sentences = [why]
    if learnt and improvement.low <= 0:
        unsure = f"The pilots at eta = {eta:g} did not surely improve on the base model ({improvement})"
        sentences.append(f"{unsure}, but others did: give a larger --budget.")
    if theory is not None:
        sentences.append(
            f"For a Gaussian with the moments of this model's latents the theory recommends eta = {theory['exact']:.2f} if the model were exact, "
            f"and {theory['with_error']:.2f} with errors of {SCORE_ERROR:.0%} in its score. It goes by the distance of the sampler to that Gaussian "
            "and knows nothing of the reward."
        )
    return [
        *sentences,
        f"{cell['solver']} with {cell['steps']} steps ({cell['evaluations']} evaluations of the network) is the cheapest of the samplers that "
        f"surely give up no more than {LOSS:.0%} of the improvement. A reward does not see everything: look at the pictures.",
        "Each interval covers 95 % of the chance in prompts and noise, taken by itself. Two seeds say little about the chance in training, and "
        "long runs may order etas in another way than pilots.",
    ]

"""A wrong argument of a public function is one EtudeError sentence, never an error of Python or NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from etude.errors import EtudeError
from etude.theory import (
    VE,
    Gaussian,
    GaussianMixture,
    LipschitzReward,
    QuadraticReward,
    ScoreError,
    critical_beta,
    finite_step_law,
    gap_bounds,
    gap_split,
    mixture_gap,
    reward_gap,
    terminal_law_with_error,
    tilt,
)

G, R, PATH = Gaussian(1.0, 0.5), QuadraticReward(1.0), VE(T=5.0)
TWO = GaussianMixture([0.5, 0.5], [-1.0, 1.0], 0.3)
MEANS, SHARED = [[0.0, 0.0], [1.0, 1.0]], [[1.0, 0.5], [0.5, 1.0]]


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: reward_gap(G, PATH, lambda x: x, 1.0), "the reward is a function"),
        (lambda: gap_bounds(G, PATH, lambda x: x, 1.0), "the reward is a function"),
        (lambda: gap_split(G, "sd", 3.0, 1.0, 10), "the reward is a float"),
        (lambda: mixture_gap(TWO, PATH, 3.0, 1.0), "the reward is a float"),
        (lambda: reward_gap(5.0, PATH, R, 1.0), "float, which is not a law"),
        (lambda: terminal_law_with_error(TWO, PATH, 1.0, ScoreError()), "got a mixture"),
        (lambda: tilt(5, R, 1.0), "the law to tilt is a int"),
        (lambda: critical_beta(5, R), "the law to tilt is a int"),
        (lambda: tilt(G, R, np.array([1.0, 2.0])), "beta has shape"),
        (lambda: gap_bounds(G, PATH, R, np.array([1.0, 2.0])), "eta has shape"),
        (lambda: finite_step_law(G, "sd", 1.0, 10, score_error=0.05), "score_error must be a ScoreError"),
        (lambda: gap_split(G, "sd", R, 1.0, 10, score_error=0.05), "score_error must be a ScoreError"),
        (lambda: terminal_law_with_error(G, PATH, 1.0, 0.05), "score_error must be a ScoreError"),
        (lambda: finite_step_law(G, "sd", 1.0, 10, score_error=ScoreError(bias=[0.1, 0.2])), "bias has 2 entries"),
        (lambda: terminal_law_with_error(G, PATH, 1.0, ScoreError(bias=[0.1, 0.2])), "bias has 2 entries"),
        (lambda: ScoreError(bias=[[0.1]]), "bias has shape"),
        (lambda: ScoreError(gain=np.array([0.1, 0.2])), "gain has shape"),
        (lambda: ScoreError(white=[0.1]), "white part has shape"),
        (lambda: reward_gap(G, PATH, LipschitzReward(lambda x: float(x), 1.0), 1.0), "all points at once"),
        (lambda: LipschitzReward(np.abs, [1.0, 2.0]), "Lipschitz constant has shape"),
        (lambda: GaussianMixture([0.5, 0.5], MEANS, SHARED), "one shared matrix or"),
    ],
)
def test_a_wrong_argument_is_one_sentence(call, names):
    with pytest.raises(EtudeError) as caught:
        call()
    message = str(caught.value)
    assert names in message
    assert message.endswith(".")
    assert "\n" not in message


def test_rows_of_variances_that_no_matrix_could_be_are_not_ambiguous():
    law = GaussianMixture([0.5, 0.5], MEANS, [[0.1, 0.2], [0.3, 0.4]])
    assert law.components[1].spectrum.tolist() == [0.3, 0.4]

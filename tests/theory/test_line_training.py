"""Training of a mixture on the line: the chain's laws, gradients and gap against the closed forms and quadrature."""

from __future__ import annotations

import numpy as np
import pytest

from etude.errors import EtudeError
from etude.theory import (
    Gaussian,
    GaussianMixture,
    LineTrainingProblem,
    QuadraticReward,
    TrainingProblem,
    gap_along_training,
    mixture_gap,
)
from etude.theory.affine_policy import Weights

MODES, ONE = GaussianMixture([0.6, 0.4], [-1.0, 1.5], 0.3), GaussianMixture([1.0], [1.0], [0.8])
REWARD = QuadraticReward(1.0, center=2.0)
SAMPLER = {"schedule": "sd", "eta": np.array([0.5, 1.5]), "steps": 5, "prediction": "sample"}


def random_weights(problem, size=0.1, seed=0):
    rng, shape = np.random.default_rng(seed), (problem.steps, problem.etas, 1)
    return Weights(size * rng.standard_normal((*shape, 1)), size * rng.standard_normal(shape))


def test_before_training_the_gap_is_that_of_quadrature():
    problem = LineTrainingProblem(MODES, reward=REWARD, **SAMPLER)
    ode, sde, kl = problem.measure(problem.start)
    exact = [float(mixture_gap(MODES, "sd", REWARD, eta, 5)) for eta in SAMPLER["eta"]]
    assert ode - sde == pytest.approx(exact, abs=2e-3)
    assert kl == pytest.approx([0.0, 0.0])


def test_a_mixture_of_one_trains_as_its_gaussian():
    line, space = (
        kind(target, reward=REWARD, **SAMPLER, beta=0.1)
        for kind, target in ((LineTrainingProblem, ONE), (TrainingProblem, Gaussian(1.0, 0.8)))
    )
    weights = random_weights(line)
    for found, expected in zip(line.measure(weights), space.measure(weights), strict=True):
        assert found == pytest.approx(expected, abs=5e-3)
    found, expected = line.ascent(weights), space.ascent(weights)
    assert found.f == pytest.approx(expected.f, abs=0.01)
    assert pytest.approx(expected.F, abs=0.01) == found.F


def test_the_ascent_is_the_derivative_of_the_chains_reward():
    problem = LineTrainingProblem(MODES, reward=REWARD, **SAMPLER, points=201)
    weights, direction, h = random_weights(problem), random_weights(problem, 1.0, 1), 1e-5
    direction = direction.scaled(problem.sde.variance > 0)
    up, down = (problem.measure(weights + direction.scaled(sign * h))[1] for sign in (1, -1))
    assert problem.ascent(weights).dot(direction) == pytest.approx((up - down) / (2 * h), rel=1e-5)


def test_the_gap_of_two_modes_widens_before_it_narrows():
    problem = LineTrainingProblem(MODES, "sd", REWARD, [1.0], 6, "leading", prediction="sample", beta=0.05, points=151)
    gap = gap_along_training(problem, 30, 0.05, "gradient", measured_eta=1.0).gap[:, 0]
    assert gap[0] < 0
    assert 0 < np.argmin(gap) < 30
    assert gap[-1] > gap.min()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": Gaussian(0.0, 1.0)}, "is no mixture on the line"),
        ({"eta": 0.0}, "raise eta"),
        ({"beta": -1.0}, "beta"),
        ({"points": 5}, "points is 5"),
    ],
)
def test_a_wrong_problem_is_named(changes, words):
    with pytest.raises(EtudeError, match=words):
        LineTrainingProblem(**{"target": MODES, "reward": REWARD, **SAMPLER, **changes})

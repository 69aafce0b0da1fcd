"""The KL-regularised optimum against quadrature and against its variational definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from etude.errors import EtudeError
from etude.theory import Gaussian, GaussianMixture, LipschitzReward, QuadraticReward, critical_beta, kl, tilt


def test_expected_quadratic_reward_is_the_mean_over_samples():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((3, 3))
    law = Gaussian([1.0, 0.0, -1.0], root @ root.T)
    reward = QuadraticReward(rng.standard_normal((3, 3)), center=[0.5, 0.0, 1.0], linear=[1.0, -2.0, 0.3])
    values = reward(law.sample(200_000, seed=1))
    assert abs(values.mean() - reward.expected(law)) < 4 * values.std() / np.sqrt(values.size)
    assert values.var() == pytest.approx(reward.variance(law), rel=0.05)
    gradients = np.sum(reward.gradient(law.sample(200_000, seed=2)) ** 2, axis=1)
    assert abs(gradients.mean() - reward.squared_gradient(law)) < 4 * gradients.std() / np.sqrt(gradients.size)


def test_expected_reward_of_a_mixture_is_the_quadrature_of_its_density():
    law = GaussianMixture([0.3, 0.7], [-2.0, 1.0], [0.2, 0.5])
    reward = QuadraticReward(0.7, center=0.4, linear=0.2)
    mean, _ = quad(lambda x: float(reward(x)) * np.exp(law.log_density(x)), -12, 12, limit=200)
    square, _ = quad(lambda x: float(reward(x)) ** 2 * np.exp(law.log_density(x)), -12, 12, limit=200)
    assert reward.expected(law) == pytest.approx(mean, rel=1e-9)
    assert reward.variance(law) == pytest.approx(square - mean**2, rel=1e-8)


@pytest.mark.parametrize("Q", [1.0, -0.2, 0.0])
def test_tilted_mixture_is_the_normalised_product_of_density_and_weight(Q):
    target, reward, beta = GaussianMixture([0.4, 0.6], [-1.0, 2.0], [0.5, 0.3]), QuadraticReward(Q, 1.0, 0.5), 0.8
    optimum = tilt(target, reward, beta)

    def product(x):
        return np.exp(target.log_density(x) + reward(x) / beta)

    Z, _ = quad(product, -15, 15, limit=400)
    assert optimum.log_normalizer == pytest.approx(np.log(Z), abs=1e-9)
    x = np.linspace(-4, 5, 41)
    np.testing.assert_allclose(np.exp(optimum.log_density(x)), product(x) / Z, rtol=1e-8)


def test_the_optimum_beats_every_neighbour_and_its_value_is_beta_log_z():
    rng = np.random.default_rng(3)
    root = rng.standard_normal((2, 2))
    target = Gaussian([1.0, -0.5], root @ root.T)
    reward, beta = QuadraticReward([[1.0, 0.4], [0.4, -0.1]], center=[2.0, 0.0], linear=[0.1, 0.3]), 2.0
    optimum = tilt(target, reward, beta)

    def value(law):
        return reward.expected(law) - beta * kl(law, target)

    assert value(optimum) == pytest.approx(beta * optimum.log_normalizer, rel=1e-10)
    for seed in range(20):
        step = 0.05 * np.random.default_rng(seed).standard_normal((2, 3))
        nudge = np.eye(2) + step[:, 1:]
        other = Gaussian(optimum.mean + step[:, 0], nudge @ optimum.matrix @ nudge.T)
        assert value(other) < value(optimum)


def test_reward_gained_by_the_optimum_is_beta_times_the_symmetric_kl():
    target, reward, beta = Gaussian([0.0, 1.0], [1.0, 0.4]), QuadraticReward([0.5, 1.0], center=[2.0, 0.0]), 0.7
    optimum = tilt(target, reward, beta)
    gained = reward.expected(optimum) - reward.expected(target)
    assert gained == pytest.approx(beta * (kl(optimum, target) + kl(target, optimum)), rel=1e-10)


def test_a_scalar_target_keeps_its_form():
    optimum = tilt(Gaussian(1.0, 1.0), QuadraticReward(1.0, center=2.0), 2.0)
    assert (float(optimum.mean), float(optimum.cov)) == pytest.approx((1.5, 0.5))


def test_a_missing_optimum_names_the_eigenvalue_and_the_beta_that_would_do():
    target, reward = Gaussian([0.0, 0.0], [2.0, 1.0]), QuadraticReward([-0.5, 1.0])
    assert critical_beta(target, reward) == pytest.approx(2.0)
    with pytest.raises(EtudeError, match=r"eigenvalue -1, so use a beta above 2"):
        tilt(target, reward, 1.9)
    tilt(target, reward, 2.1)
    with pytest.raises(EtudeError, match="beta"):
        tilt(target, reward, 0.0)


def test_lipschitz_rewards_state_their_error():
    reward = LipschitzReward(lambda x: np.abs(x - 0.3), 1.0)
    law = Gaussian(0.5, 2.0)
    exact, _ = quad(lambda x: abs(x - 0.3) * np.exp(law.log_density(x)), -20, 20, points=[0.3], limit=200)
    assert abs(reward.expected(law) - exact) <= max(3 * reward.expected(law).error, 1e-9)
    sphere = LipschitzReward(lambda x: np.linalg.norm(x, axis=-1), 1.0)
    estimate = sphere.expected(Gaussian(np.zeros(3), 1.0))
    assert abs(estimate - np.sqrt(8 / np.pi)) < 3 * estimate.error + 1e-4

"""The bounds are never below the gap on randomised families, and their ingredients are never below the exact values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from etude.errors import EtudeError
from etude.theory import (
    VE,
    VP,
    Gaussian,
    GaussianMixture,
    LipschitzReward,
    QuadraticReward,
    RectifiedFlow,
    finite_step_bound,
    gap_bounds,
    mixture_gap,
    reward_gap,
    w2,
)
from etude.theory.bounds import (
    bounded_reward_bound,
    chi2_exact,
    chi2_jensen,
    chi2_sharp,
    constants_of,
    contraction_bound,
    forgetting,
    start_distance,
)

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)
seeds = st.integers(0, 10**9)


def random_path(rng):
    return [
        VE(T=float(rng.uniform(1.0, 60.0))),
        VE(T=float(rng.uniform(1.0, 200.0)), sigma="sqrt"),
        VP(beta=1.0, T=float(rng.uniform(1.0, 9.0))),
        VP.stable_diffusion(),
        RectifiedFlow(delta=float(rng.uniform(0.003, 0.25))),
    ][rng.integers(5)]


def random_gaussian(rng, d):
    root = rng.standard_normal((d, d)) * rng.uniform(0.2, 1.2)
    return Gaussian(rng.standard_normal(d) * rng.choice([0.0, 1.5]), root @ root.T + 0.02 * np.eye(d))


def random_reward(rng, d):
    Q = rng.standard_normal((d, d))
    return QuadraticReward(Q + Q.T, center=rng.standard_normal(d), linear=rng.standard_normal(d) * rng.choice([0, 1]))


@SETTINGS
@given(seeds)
def test_no_bound_is_below_the_gap_of_a_gaussian(seed):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(1, 7))
    found = gap_bounds(random_gaussian(rng, d), random_path(rng), random_reward(rng, d), float(rng.uniform(0.05, 2.5)))
    for name, bound in found.bounds.items():
        assert bound >= abs(found.gap) * (1 - 1e-9), name


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seeds)
def test_no_bound_is_below_the_gap_of_a_mixture(seed):
    rng = np.random.default_rng(seed)
    K = int(rng.integers(2, 5))
    covs = rng.uniform(0.05, 0.8) if rng.random() < 0.6 else rng.uniform(0.05, 0.8, K)
    target = GaussianMixture(rng.dirichlet(np.ones(K) * 2), rng.uniform(-2.0, 2.0, K), covs)
    smooth = LipschitzReward(lambda x: -np.sqrt(1.0 + (x - 0.5) ** 2), 1.0)
    reward = (
        smooth if rng.random() < 0.3 else QuadraticReward(1.0, center=float(rng.normal()), linear=float(rng.normal()))
    )
    found = gap_bounds(target, random_path(rng), reward, float(rng.uniform(0.2, 2.0)))
    for name, bound in found.bounds.items():
        assert bound >= abs(found.gap) - 2 * found.gap_error, name
    assert np.isfinite(found.best)


@SETTINGS
@given(seeds)
def test_upper_bounds_of_chi_squared_hold(seed):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(1, 5))
    target, start = random_gaussian(rng, d), random_path(rng).start()
    k = constants_of(target, random_reward(rng, d))
    exact = chi2_exact(target, start)
    assert chi2_jensen(k, start) >= exact * (1 - 1e-9)
    assert chi2_sharp(target, k, start) >= exact * (1 - 1e-9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seeds)
def test_upper_bounds_of_chi_squared_hold_for_mixtures(seed):
    rng = np.random.default_rng(seed)
    target = GaussianMixture(rng.dirichlet([2.0, 2.0]), rng.uniform(-2, 2, 2), rng.uniform(0.05, 0.8, 2))
    start, k = random_path(rng).start(), constants_of(target, QuadraticReward(1.0))
    exact = chi2_exact(target, start)
    assert chi2_jensen(k, start) >= exact * (1 - 1e-6)
    assert chi2_sharp(target, k, start) >= exact * (1 - 1e-6)


def test_chi_squared_of_a_gaussian_is_its_integral():
    target, start = Gaussian(0.7, 0.4), VP(beta=1.0, T=3.0).start()
    V, tau = float(start.V), float(start.V) + 1.0

    def ratio(y):
        prior = np.exp(-0.5 * y * y / tau) / np.sqrt(2 * np.pi * tau)
        p = np.exp(-0.5 * (y - 0.7) ** 2 / (V + 0.4)) / np.sqrt(2 * np.pi * (V + 0.4))
        return prior**2 / p

    assert 1 + chi2_exact(target, start) == pytest.approx(quad(ratio, -100, 100, limit=200)[0], rel=1e-8)
    one = GaussianMixture([1.0], [0.7], 0.4)
    assert chi2_exact(one, start) == pytest.approx(chi2_exact(target, start), rel=1e-7)


@SETTINGS
@given(seeds)
def test_the_distance_to_the_start_is_bounded(seed):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(1, 5))
    target, start = random_gaussian(rng, d), random_path(rng).start()
    bound = start_distance(target, constants_of(target, QuadraticReward(1.0)), start)
    noisy = Gaussian(target.mu, target.matrix + float(start.V) * np.eye(d))
    prior = Gaussian(np.zeros(d), float(start.V + start.excess))
    assert bound >= w2(noisy, Gaussian(np.zeros(d), np.diag(np.diagonal(prior.matrix)))) * (1 - 1e-7) - 1e-7


def test_contraction_and_forgetting_are_exact_for_an_isotropic_gaussian():
    k = constants_of(Gaussian([1.0, 2.0], 0.5), QuadraticReward(1.0))
    assert contraction_bound(k, 20.0, 0.7) == pytest.approx((0.5 / 20.5) ** (1.49 / 2))
    assert forgetting(k, 20.0, 0.7) == pytest.approx((0.5 / 20.5) ** (0.49 / 2))


def test_the_bound_is_asymptotically_sharp_for_a_linear_reward():
    for path, tight in ((VE(T=80.0), 1.03), (VP.ddpm(), 1.02), (VE(T=10.0), 1.2)):
        found = gap_bounds(Gaussian(1.5, 0.5), path, QuadraticReward(0.0, linear=1.0), 1.0)
        assert 1.0 <= found.ratio < tight


def test_the_bound_vanishes_with_eta_and_has_the_rate_of_the_gap_in_T():
    target, reward = Gaussian(1.5, 0.5), QuadraticReward(1.0, center=2.0)
    assert gap_bounds(target, VE(T=10.0), reward, 1e-6).best < 1e-5
    far, near = (gap_bounds(target, VE(T=T), reward, 1.0).best for T in (1000.0, 100.0))
    assert near / far == pytest.approx(10.0, rel=0.05)
    centred = [gap_bounds(Gaussian(0.0, 0.5), VE(T=T), QuadraticReward(1.0), 1.0).best for T in (1000.0, 100.0)]
    assert centred[1] / centred[0] == pytest.approx(100.0, rel=0.05)


def test_a_mixture_outside_the_class_still_has_the_density_ratio_bound():
    found = gap_bounds(GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.2, 0.7]), VE(T=10.0), QuadraticReward(1.0), 1.0)
    assert found.bounds["coupling"] == float("inf")
    assert abs(found.gap) <= found.best < 10.0


def test_a_mixture_in_several_dimensions_is_bounded():
    target = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [[0.3, 0.2]] * 2)
    found = gap_bounds(target, VE(T=8.0), QuadraticReward(1.0, center=[1.0, 0.0]), 1.0)
    assert found.best >= abs(found.gap) - 2 * found.gap_error
    with pytest.raises(EtudeError, match="2 dimensions"):
        chi2_exact(target, VE(T=8.0).start())


def test_bounded_rewards_have_a_bound_for_any_target():
    target = GaussianMixture([0.3, 0.7], [-2.0, 2.0], [0.1, 0.3])
    reward = LipschitzReward(np.tanh, 1.0)
    for path in (VE(T=5.0), VP.stable_diffusion()):
        gap = mixture_gap(target, path, reward, 1.0)
        assert bounded_reward_bound(constants_of(target, reward), path.start(), 2.0) >= abs(gap)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seeds)
def test_the_finite_step_bound_is_never_below_the_gap(seed):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(1, 4))
    target, reward = random_gaussian(rng, d), random_reward(rng, d)
    schedule = ["sd", "ddpm", VE(T=20.0), RectifiedFlow(delta=0.02)][rng.integers(4)]
    steps, eta = int(rng.integers(1, 60)), float(rng.uniform(0.0, 2.0))
    bound = finite_step_bound(target, schedule, reward, eta, steps)
    assert bound >= abs(reward_gap(target, schedule, reward, eta, steps))


def test_the_finite_step_bound_holds_for_a_mixture():
    target, reward = GaussianMixture([0.3, 0.7], [-0.6, 0.6], 0.4), QuadraticReward(1.0, center=1.0)
    for steps in (5, 20):
        bound = finite_step_bound(target, "sd", reward, 1.0, steps)
        assert abs(mixture_gap(target, "sd", reward, 1.0, steps)) <= bound < 50.0


def test_a_wrong_argument_is_named():
    target, reward = Gaussian(1.0, 0.5), QuadraticReward(1.0)
    with pytest.raises(EtudeError, match="one horizon"):
        gap_bounds(target, VE(T=[1.0, 2.0]), reward, 1.0)
    with pytest.raises(EtudeError, match="pure noise"):
        gap_bounds(target, "flow", reward, 1.0)
    with pytest.raises(EtudeError, match="delta above 0"):
        finite_step_bound(target, "flow", reward, 1.0, 10)


def test_chi2_of_modes_out_of_float_range_is_infinite():
    assert chi2_exact(GaussianMixture([0.5, 0.5], [-200.0, 200.0], 0.1), VE(T=1.0).start()) == float("inf")


@pytest.mark.parametrize(
    ("mean", "variance", "path"),
    [(6.0, 0.3, VE(T=1.0)), (1.0, 100.0, VE(T=1.0)), (0.5, 0.3, VE(T=1e4)), (-2.0, 0.3, VP(T=0.75))],
)
def test_chi2_by_quadrature_is_the_closed_form_for_equal_components_and_not_below_it(mean, variance, path):
    exact = chi2_exact(Gaussian(mean, variance), path.start())
    found = chi2_exact(GaussianMixture([0.4, 0.6], [mean, mean], variance), path.start())
    assert exact * (1.0 - 1e-14) <= found <= exact * (1.0 + 1e-8)

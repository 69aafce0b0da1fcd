"""Mixtures: quadrature against closed forms and simulation, simulation against quadrature."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from etude.errors import EtudeError
from etude.theory import (
    VE,
    VP,
    Approximation,
    Gaussian,
    GaussianMixture,
    LipschitzReward,
    QuadraticReward,
    RectifiedFlow,
    improvement,
    levels,
    mixture_gap,
    reward_gap,
    simulate_gap,
    terminal_law,
    tilt,
)
from etude.theory.line import adaptive_integral, line_values

REWARD = QuadraticReward(1.0, center=2.0)
TWO = GaussianMixture([0.3, 0.7], [-2.0, 2.0], 0.1)
THREE = GaussianMixture([0.3, 0.5, 0.2], [-1.0, 1.0, 3.0], [0.2, 0.4, 0.1])


def reverse_sde_reward(target, path, reward):
    """E r at eta = 1: the terminal kernel is the posterior, so one integral of posterior expectations over the prior."""
    start = path.start()
    V, tau = float(start.V), float(start.V + start.excess)
    m, c = target.means[:, 0], np.array([p.spectrum[0] for p in target.components])

    def integrand(y):
        logs = np.log(target.weights) - 0.5 * np.log(c + V) - 0.5 * (y - m) ** 2 / (c + V)
        weight = np.exp(logs - logs.max())
        posterior = [Gaussian(mk + ck / (ck + V) * (y - mk), ck * V / (ck + V)) for mk, ck in zip(m, c, strict=True)]
        value = weight @ [reward.expected(law) for law in posterior] / weight.sum()
        return float(value) * np.exp(-0.5 * y * y / tau) / np.sqrt(2 * np.pi * tau)

    return quad(integrand, -9 * tau**0.5, 9 * tau**0.5, epsabs=1e-9, limit=200, points=[0.0])[0]


def test_one_component_is_the_gaussian_closed_form():
    etas = np.array([0.0, 0.3, 1.0, 1.5])
    for path in (VE(T=5.0), VP.stable_diffusion(), RectifiedFlow(delta=0.05)):
        ode_value, *gaps = line_values(GaussianMixture([1.0], [1.5], [0.5]), path.start(), REWARD, etas)
        exact = reward_gap(Gaussian(1.5, 0.5), path, REWARD, etas)
        errors = np.array([gap.error for gap in gaps])
        assert np.all(np.abs(np.array(gaps, dtype=float) - exact) <= errors)
        assert np.all(errors < 1e-6)
        ode = REWARD.expected(terminal_law(Gaussian(1.5, 0.5), path, 0.0))
        assert abs(ode_value - ode) <= ode_value.error


@pytest.mark.parametrize("target", [TWO, THREE])
@pytest.mark.parametrize("path", [VE(T=5.0), VP.stable_diffusion()])
def test_at_eta_one_the_terminal_kernel_is_the_posterior(target, path):
    ode, gap = line_values(target, path.start(), REWARD, np.array([1.0]))
    exact = ode - reverse_sde_reward(target, path, REWARD)
    assert abs(gap - exact) <= gap.error + ode.error
    assert gap.error < 1e-4


def test_the_ode_value_is_the_change_of_variables_by_the_monotone_map():
    """E r = int r(x) prior(T(x)) p_0(x) / p_V(T(x)) dx with T = F_V^-1 F_0, by inverting the distribution functions."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    V = 25.0

    def map_up(x):
        share = THREE.weights @ norm.cdf(x, THREE.means[:, 0], np.sqrt([p.spectrum[0] for p in THREE.components]))
        roots = np.sqrt([p.spectrum[0] + V for p in THREE.components])
        return brentq(lambda y: THREE.weights @ norm.cdf(y, THREE.means[:, 0], roots) - share, -80, 80, xtol=1e-12)

    def integrand(x):
        y = map_up(x)
        roots = np.sqrt([p.spectrum[0] + V for p in THREE.components])
        p_V = THREE.weights @ norm.pdf(y, THREE.means[:, 0], roots)
        return float(REWARD(x)) * norm.pdf(y, 0, 5.0) * float(np.exp(THREE.log_density(x))) / p_V

    x = np.linspace(-3.9, 5.3, 461)
    exact = np.sum([integrand(each) for each in x]) * (x[1] - x[0])
    (ode,) = line_values(THREE, VE(T=5.0).start(), REWARD, [])
    assert ode == pytest.approx(exact, abs=1e-6)


def test_the_gap_vanishes_at_eta_zero_and_grows_quadratically():
    _, *gaps = line_values(THREE, VE(T=5.0).start(), REWARD, [0.0, 0.02, 0.04])
    assert gaps[0] == 0.0
    assert gaps[2] / gaps[1] == pytest.approx(4.0, rel=0.01)


def test_lipschitz_rewards_work_on_the_line():
    reward = LipschitzReward(lambda x: -np.sqrt(1.0 + (x - 1.0) ** 2), 1.0)
    gap = mixture_gap(THREE, VE(T=5.0), reward, 1.0)
    exact = line_values(THREE, VE(T=5.0).start(), reward, [])[0] - reverse_sde_reward(THREE, VE(T=5.0), reward)
    assert gap == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "steps", "kernel"), [("sd", 10, "gddim"), ("flow", 6, "gddim"), ("sd", 5, "ddim")]
)
def test_finite_step_gap_of_one_component_is_the_exact_law(schedule, steps, kernel):
    gap = mixture_gap(GaussianMixture([1.0], [1.5], 0.5), schedule, REWARD, 0.9, steps, kernel=kernel)
    exact = reward_gap(Gaussian(1.5, 0.5), schedule, REWARD, 0.9, steps, kernel=kernel)
    assert gap == pytest.approx(exact, abs=1e-9)


def test_finite_step_gap_is_that_of_simulated_samples():
    exact = mixture_gap(THREE, "sd", REWARD, 1.2, 10)
    run = simulate_gap(THREE, "sd", REWARD, 1.2, 10, samples=60_000, seed=3)
    assert isinstance(exact, Approximation)
    assert exact.error < 1e-6
    assert abs(run.gap - exact) < 1.6 * run.gap.error
    assert run.gap.error < 0.05


def test_simulation_in_several_dimensions_agrees_with_the_gaussian_closed_form():
    cov = np.array([[1.0, 0.3, 0.0], [0.3, 0.5, 0.1], [0.0, 0.1, 0.8]])
    mean, reward = np.array([1.0, -0.5, 0.3]), QuadraticReward(0.5, center=[2.0, 0.0, 0.0])
    one = GaussianMixture([1.0], [mean], [cov])
    for steps in (None, 8):
        run = simulate_gap(one, "sd", reward, 1.0, steps, samples=6000, seed=1)
        exact = reward_gap(Gaussian(mean, cov), "sd", reward, 1.0, steps)
        assert abs(run.gap - exact) < 1.6 * run.gap.error
    assert mixture_gap(one, "sd", reward, 1.0, 8, samples=500).kind == "95 % interval"


def test_simulation_in_continuous_time_agrees_with_the_line():
    run = simulate_gap(THREE, VE(T=5.0), REWARD, 1.0, samples=6000, seed=2)
    exact = mixture_gap(THREE, VE(T=5.0), REWARD, 1.0)
    assert abs(run.gap - exact) < 1.6 * run.gap.error


def test_the_simulated_ode_of_one_component_is_the_gaussians():
    mean, cov, reward = [1.0, 0.5], [[1.0, 0.3], [0.3, 0.5]], QuadraticReward(1.0, center=[2.0, 0.0])
    path, gaussian = VE(T=5.0), Gaussian(mean, cov)
    run = simulate_gap(GaussianMixture([1.0], [mean], [cov]), path, reward, 0.0, samples=6000, seed=2)
    assert run.gap == 0.0
    assert abs(run.ode - reward.expected(terminal_law(gaussian, path, 0.0))) < 1.6 * run.ode.error


def test_the_interval_covers_the_truth_as_often_as_it_says():
    exact = float(mixture_gap(THREE, "sd", REWARD, 1.0, 4))
    grid = levels("sd", 4)
    hits = [abs(simulate_gap(THREE, grid, REWARD, 1.0, samples=400, seed=s).gap - exact) for s in range(200)]
    widths = [simulate_gap(THREE, grid, REWARD, 1.0, samples=400, seed=s).gap.error for s in range(200)]
    assert 0.90 <= np.mean(np.array(hits) <= np.array(widths)) <= 0.99


def test_flow_from_pure_noise_has_no_continuous_gap():
    assert mixture_gap(TWO, "flow", REWARD, 1.0) == 0.0


def test_improvement_of_a_mixture_is_that_of_its_optimum():
    base = GaussianMixture([1.0], [1.0], 1.0)
    assert improvement(base, "sd", REWARD, 2.0) == pytest.approx(
        improvement(Gaussian(1.0, 1.0), "sd", REWARD, 2.0), abs=1e-7
    )
    tuned = tilt(THREE, REWARD, 1.0)
    gained = improvement(THREE, VE(T=2000.0), REWARD, 1.0)
    assert gained == pytest.approx(REWARD.expected(tuned) - REWARD.expected(THREE), abs=0.01)
    assert improvement(base, "sd", REWARD, 2.0, steps=10) == pytest.approx(
        improvement(Gaussian(1.0, 1.0), "sd", REWARD, 2.0, steps=10), abs=1e-8
    )


def test_adaptive_integral_finds_a_step():
    found = adaptive_integral(lambda z: (z > 0.12345).astype(float), -1.0, 1.0)
    assert found == pytest.approx(0.87655, abs=1e-8)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: mixture_gap(TWO, VE(T=[1.0, 2.0]), REWARD, 1.0), "one horizon"),
        (lambda: mixture_gap(Gaussian(0.0, 1.0), "sd", REWARD, 1.0), "reward_gap"),
        (lambda: mixture_gap(TWO, "sd", REWARD, 1.0, samples=1), "samples"),
        (lambda: GaussianMixture([0.5, 0.5], [0.0, 1.0], [1.0, 0.0]), "variance of 0"),
        (lambda: GaussianMixture([0.5, 0.5], [0.0, 1.0], [1.0]), "fit"),
    ],
)
def test_a_wrong_argument_is_named(make, names):
    with pytest.raises(EtudeError, match=names):
        make()

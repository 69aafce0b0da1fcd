"""Finite-step laws against simulation of the samplers themselves, continuous time, and each other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from etude.errors import EtudeError
from etude.theory import (
    VE,
    VP,
    Gaussian,
    GaussianMixture,
    LipschitzReward,
    QuadraticReward,
    RectifiedFlow,
    ScoreError,
    finite_step_law,
    gap_split,
    improvement,
    levels,
    reward_gap,
    terminal_law,
    tilt,
)

TUNED, REWARD = Gaussian(1.5, 0.5), QuadraticReward(1.0, center=2.0)


def rollout(mean, cov, grid, eta, kernel, n, error=None, seed=0):
    """Runs the sampler on samples, with the denoiser E[x0 | x_t] of N(mean, cov), straight from the update formulas."""
    rng = np.random.default_rng(seed)
    error = error or ScoreError()
    a, s = grid.a, grid.s
    x = rng.standard_normal((n, mean.size)) * np.sqrt(grid.prior_variance)
    for i in range(grid.steps):
        K = a[i] ** 2 * cov + s[i] ** 2 * np.eye(mean.size)
        eps = s[i] * np.linalg.solve(K, (x - a[i] * mean).T).T
        eps = (1 + error.gain) * eps + error.bias + error.white * rng.standard_normal(x.shape)
        x0 = (x - s[i] * eps) / a[i] if a[i] > 0 else mean + np.zeros_like(x)
        z = rng.standard_normal(x.shape)
        theta = s[i + 1] * a[i] / (s[i] * a[i + 1])
        if kernel == "gddim":
            rho = theta ** (eta**2)
            x = a[i + 1] * x0 + s[i + 1] * (rho * eps + np.sqrt(1 - rho**2) * z)
        elif kernel == "ddim":
            std = eta * s[i + 1] * np.sqrt(1 - theta**2)
            x = a[i + 1] * x0 + np.sqrt(s[i + 1] ** 2 - std**2) * eps + std * z
        else:
            v, u = s[i] / a[i], s[i + 1] / a[i + 1]
            x = a[i + 1] * (x / a[i] - (1 + eta**2) * (v - u) * eps + eta * np.sqrt(v**2 - u**2) * z)
    return x


@pytest.mark.parametrize("kernel", ["gddim", "ddim", "euler-maruyama"])
@pytest.mark.parametrize(
    ("schedule", "steps", "eta"),
    [("sd", 7, 0.8), (VE(T=4.0), 5, 0.5), (RectifiedFlow(delta=0.05), 6, 0.9), ("sd", 1, 0.3)],
)
def test_law_is_that_of_simulated_samples(kernel, schedule, steps, eta):
    n, mean, cov = 100_000, np.array([1.0, -0.5]), np.array([[1.0, 0.4], [0.4, 0.6]])
    law = finite_step_law(Gaussian(mean, cov), schedule, eta, steps, kernel=kernel)
    x = rollout(mean, cov, levels(schedule, steps), eta, kernel, n)
    deviation = np.sqrt(np.maximum(np.diagonal(law.cov), 1e-12))
    assert np.all(np.abs(x.mean(0) - law.mean) < 5 * deviation / np.sqrt(n))
    np.testing.assert_allclose(np.cov(x.T), law.cov, atol=5 * np.sqrt(2 / n) * law.cov.max())


def test_law_with_score_errors_is_that_of_simulated_samples():
    n, mean, cov = 100_000, np.array([1.0, -0.5]), np.array([[1.0, 0.4], [0.4, 0.6]])
    error = ScoreError(bias=np.array([0.1, -0.05]), gain=0.07, white=0.2)
    law = finite_step_law(Gaussian(mean, cov), "sd", 1.2, 8, score_error=error)
    x = rollout(mean, cov, levels("sd", 8), 1.2, "gddim", n, error)
    assert np.all(np.abs(x.mean(0) - law.mean) < 5 * np.sqrt(np.diagonal(law.cov) / n))
    np.testing.assert_allclose(np.cov(x.T), law.cov, atol=5 * np.sqrt(2 / n) * law.cov.max())


def test_flow_from_pure_noise_is_that_of_simulated_samples():
    n, mean, cov = 100_000, np.array([1.5]), np.array([[0.5]])
    for eta in (0.0, 1.0):
        law = finite_step_law(TUNED, "flow", eta, 6)
        x = rollout(mean, cov, levels("flow", 6), eta, "gddim", n)
        assert abs(x.mean() - float(law.mean)) < 5 * np.sqrt(0.5 / n)
        assert abs(x.var() - float(law.cov)) < 5 * np.sqrt(2 / n) * 0.5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_many_steps_tend_to_the_continuous_law_at_first_order(eta):
    path = VP(beta=1.0, T=4.0)
    limit = terminal_law(TUNED, path, eta)
    laws = [finite_step_law(TUNED, path, eta, n, "log-snr") for n in (1000, 2000)]
    for name in ("mean", "cov"):
        coarse, fine = (float(getattr(law, name)) for law in laws)
        assert 2 * fine - coarse == pytest.approx(float(getattr(limit, name)), abs=5e-5)
        assert fine == pytest.approx(float(getattr(limit, name)), abs=2e-2)


def test_gddim_and_ddim_agree_at_eta_zero_and_one_only():
    for eta, same in ((0.0, True), (1.0, True), (0.5, False)):
        a, b = (finite_step_law(TUNED, "sd", eta, 10, kernel=k) for k in ("gddim", "ddim"))
        assert np.isclose(float(a.cov), float(b.cov), rtol=1e-12) == same


def test_euler_maruyama_is_the_ode_step_at_eta_zero_and_over_dispersed_with_the_true_noise():
    a, b = (finite_step_law(TUNED, "sd", 0.0, 10, kernel=k) for k in ("gddim", "euler-maruyama"))
    assert float(a.cov) == pytest.approx(float(b.cov), rel=1e-12)
    # A target of variance 0 has the true eps: x_u - a_u m then has variance v_u^2 + eta^2 (1 + eta^2)(v_t - v_u)^2.
    law = finite_step_law(Gaussian(0.0, 0.0), ([1.0, 1.0], [1.3, 1.2]), 0.7, kernel="euler-maruyama")
    assert float(law.cov) == pytest.approx(1.2**2 + 0.49 * 1.49 * 0.01, rel=1e-12)


def test_started_exactly_the_mean_is_exact_and_the_variance_too_small_by_the_posterior_variance():
    grid = levels("sd", 12)
    law = finite_step_law(TUNED, grid, 0.8, start="exact")
    assert float(law.mean) == pytest.approx(1.5, abs=1e-12)
    # deficit recursion D <- A^2 D - (1 - w)^2 Var(x0 | x_t) in y = x/a
    v, D = grid.v, 0.0
    for v_t, v_u in pairwise(v):
        w, posterior = (v_u / v_t) ** 1.64, 0.5 * v_t**2 / (0.5 + v_t**2)
        D = (w + (1 - w) * posterior / v_t**2) ** 2 * D - (1 - w) ** 2 * posterior
    assert float(law.cov) - 0.5 == pytest.approx(D, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
def test_no_eta_makes_a_nan(steps):
    law = finite_step_law(Gaussian([0.0, 1.0], [0.0, 2.0]), "sd", np.array([0.0, 1e-4, 1.0, 5.0, 50.0]), steps)
    assert np.all(np.isfinite(law.mean))
    assert np.all(law.cov >= 0)


def test_arrays_of_eta_and_horizon_give_the_single_laws():
    target = Gaussian([1.0, -1.0], [[1.0, 0.3], [0.3, 0.5]])
    horizons, etas = np.array([[2.0], [6.0]]), np.array([0.0, 0.4, 1.5])
    batch = finite_step_law(target, VE(T=horizons), etas, 9, "log-snr")
    one = finite_step_law(target, VE(T=6.0), 1.5, 9, "log-snr")
    np.testing.assert_allclose(batch[1, 2].mean, one.mean, rtol=1e-13)
    np.testing.assert_allclose(batch[1, 2].cov, one.cov, rtol=1e-13)


def test_gap_is_the_difference_of_expected_rewards():
    rng = np.random.default_rng(0)
    root, Q = rng.standard_normal((2, 3, 3))
    target, reward = Gaussian([1.0, 2.0, -1.0], root @ root.T), QuadraticReward(Q, center=[0.3, 1.0, 0.0], linear=1.0)
    for path in (VP(beta=1.0, T=2.0), VE(T=5.0), RectifiedFlow(delta=0.1)):
        expected = reward.expected(terminal_law(target, path, 0.0)) - reward.expected(terminal_law(target, path, 0.7))
        assert reward_gap(target, path, reward, 0.7) == pytest.approx(expected, abs=1e-11)
        expected = reward.expected(finite_step_law(target, path, 0.0, 9)) - reward.expected(
            finite_step_law(target, path, 0.7, 9)
        )
        assert reward_gap(target, path, reward, 0.7, steps=9) == pytest.approx(expected, abs=1e-11)


def test_a_long_path_keeps_the_digits_of_its_small_gap():
    gap = reward_gap(Gaussian(0.0, 0.5), VE(T=1e9), QuadraticReward(1.0), 1.0)
    assert gap == pytest.approx(0.25e-18, rel=1e-9)


def test_a_shifted_reward_can_make_the_sde_better():
    assert reward_gap(TUNED, VE(T=10.0), QuadraticReward(1.0), 1.0) > 0
    assert reward_gap(TUNED, VE(T=10.0), REWARD, 1.0) < 0


def test_gap_of_a_lipschitz_reward_is_that_of_its_samples():
    reward = LipschitzReward(lambda x: -np.abs(x - 2.0), 1.0)
    gap = reward_gap(TUNED, "sd", reward, 1.0, steps=10)
    ode, sde = (finite_step_law(TUNED, "sd", eta, 10) for eta in (0.0, 1.0))
    values = [reward(law.sample(400_000, seed=1)) for law in (ode, sde)]
    assert abs(values[0].mean() - values[1].mean() - gap) < 5 * 0.6 / np.sqrt(400_000)


# gap, prior part, discretisation part of N(1.5, 0.5), r = -(x - 2)^2, four digits: a second implementation's table.
TABLE = [
    ("sd", 10, 1.0, "trailing", -0.1105, -0.0754, -0.0494),
    ("sd", 50, 1.0, "trailing", -0.1005, -0.0754, -0.0287),
    ("sd", 20, 0.5, "trailing", -0.0498, -0.0435, -0.0113),
    ("sd", 20, 1.0, "leading", -0.1458, -0.1011, -0.0542),
    ("ddpm", 10, 1.0, "trailing", -0.0693, -0.0068, -0.0640),
    ("ddpm", 50, 1.0, "trailing", -0.0488, -0.0068, -0.0424),
    (VE(T=80.0), 50, 1.0, "karras", -0.061, -0.0133, -0.048),
]


@pytest.mark.parametrize(("schedule", "steps", "eta", "spacing", "total", "prior", "disc"), TABLE)
def test_split_of_the_gap(schedule, steps, eta, spacing, total, prior, disc):
    split = gap_split(TUNED, schedule, REWARD, eta, steps, spacing)
    np.testing.assert_allclose([split.total, split.prior, split.discretisation], [total, prior, disc], atol=6e-4)
    assert split.total == pytest.approx(split.prior + split.discretisation + split.score_error + split.interaction)
    assert split.total == reward_gap(TUNED, schedule, REWARD, eta, steps, spacing)
    assert split.dominant == ("prior" if schedule == "sd" else "discretisation")


def test_a_score_error_shows_in_its_own_part():
    split = gap_split(TUNED, "sd", REWARD, 1.0, 50, score_error=ScoreError(bias=0.3))
    assert split.dominant == "score_error"
    assert split.total - split.score_error == pytest.approx(reward_gap(TUNED, "sd", REWARD, 1.0, 50), rel=1e-12)


def test_discretisation_part_has_its_leading_order():
    path = VE(T=1e4)
    grid = levels(path, 4000, "log-snr")
    h = np.log(grid.v[0] / grid.v[1])
    split = gap_split(Gaussian(0.0, 0.5), grid, QuadraticReward(1.0), np.array([0.5, 1.0]))
    np.testing.assert_allclose(split.discretisation, -np.array([0.25, 1.0]) * h / 2 * 0.5, rtol=0.02)


def test_improvement_is_measured_between_the_two_ode_samplers():
    base, beta = Gaussian(1.0, 1.0), 2.0
    tuned = tilt(base, REWARD, beta)
    for steps in (None, 20):
        laws = [
            terminal_law(x, "sd", 0.0) if steps is None else finite_step_law(x, "sd", 0.0, steps) for x in (tuned, base)
        ]
        expected = REWARD.expected(laws[0]) - REWARD.expected(laws[1])
        assert improvement(base, "sd", REWARD, beta, steps=steps) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: finite_step_law(TUNED, "sd", 1.0), "steps"),
        (lambda: finite_step_law(TUNED, "sd", 1.0, 0), "steps"),
        (lambda: finite_step_law(TUNED, "sd", 1.0, 10, "trialing"), "did you mean 'trailing'"),
        (lambda: finite_step_law(TUNED, VE(T=2.0), 1.0, 10, "leading"), "tables"),
        (lambda: finite_step_law(TUNED, "flow", 1.0, 10, "log-snr"), "delta"),
        (
            lambda: finite_step_law(TUNED, "sd", 1.2, 50, "leading", "ddim"),
            r"largest legal eta for this grid is 1\.045584",
        ),
        (lambda: finite_step_law(TUNED, "flow", 1.2, 10, score_error=ScoreError(bias=0.1)), "a = 0"),
        (lambda: finite_step_law(TUNED, "sd", 1.0, 10, start="cold"), "start"),
        (lambda: finite_step_law(TUNED, ([0.5, 0.9], [0.5, 0.9]), 1.0), "step 0"),
        (lambda: finite_step_law(TUNED, ([0.5, 0.9], [0.5, 0.1]), 1.0, 7), "leave steps out"),
        (lambda: finite_step_law(TUNED, 3.0, 1.0), "not a schedule"),
        (lambda: reward_gap(GaussianMixture([1.0], [0.0], 1.0), "sd", REWARD, -1.0), "eta"),
    ],
)
def test_a_wrong_argument_is_named(make, names):
    with pytest.raises(EtudeError, match=names):
        make()


def test_the_largest_legal_ddim_eta_is_named_and_legal():
    with pytest.raises(EtudeError, match="largest legal eta") as caught:
        finite_step_law(TUNED, "sd", 1.5, 50, kernel="ddim")
    largest = float(str(caught.value).split(" is ")[1].split(";")[0])
    finite_step_law(TUNED, "sd", largest - 1e-4, 50, kernel="ddim")
    with pytest.raises(EtudeError):
        finite_step_law(TUNED, "sd", largest + 1e-3, 50, kernel="ddim")


def test_levels_end_at_the_data_and_follow_diffusers_timesteps():
    assert levels(VP.stable_diffusion(), 3).a[-1] == 1.0
    table = VP.stable_diffusion().alphas_cumprod
    np.testing.assert_array_equal(levels("sd", 4, "trailing").a[:-1] ** 2, np.sqrt(table[[999, 749, 499, 249]]) ** 2)
    np.testing.assert_array_equal(levels("sd", 4, "leading").a[:-1] ** 2, np.sqrt(table[[751, 501, 251, 1]]) ** 2)
    np.testing.assert_array_equal(levels("sd", 4, "linspace").a[:-1] ** 2, np.sqrt(table[[999, 666, 333, 0]]) ** 2)

"""Score errors against moment equations and the exact finite-step law, and the recommended eta against known optima."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.special import beta as beta_function
from scipy.special import betainc

from etude.errors import EtudeError
from etude.theory import (
    VE,
    VP,
    Gaussian,
    ScoreError,
    finite_step_law,
    levels,
    recommended_eta,
    score_bias_shift,
    terminal_law,
    terminal_law_with_error,
    white_variance,
)
from etude.theory.sampler_steps import largest_eta
from oracles.forward_equation import drift, squared_diffusion

TARGET = Gaussian(1.3, 0.7)


def moments(path, eta, score, slope):
    """Mean and variance at t = 0 of the sampler with score(t, x), an affine function of x of the given slope(t)."""
    kappa = 1.0 + eta**2

    def rates(t, state):
        f, g2 = drift(path, t), squared_diffusion(path, t)
        mean = f * state[0] - 0.5 * kappa * g2 * score(t, state[0])
        return [mean, 2.0 * (f - 0.5 * kappa * g2 * slope(t)) * state[1] - eta**2 * g2]

    start = [0.0, float(path.prior_variance)]
    out = solve_ivp(rates, (float(path.T), 1e-13), start, rtol=1e-9, atol=1e-11, method="LSODA")
    return out.y[:, -1]


@pytest.mark.parametrize("path", [VE(T=4.0), VP(beta=1.0, T=3.0)])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 1.6])
def test_bias_and_gain_of_the_noise_prediction_solve_the_moment_equations(path, eta):
    error = ScoreError(bias=0.1, gain=0.08)

    def spread(t):
        return float(path.a(t) ** 2 * 0.7 + path.s(t) ** 2)

    def score(t, x):
        return -1.08 * (x - float(path.a(t)) * 1.3) / spread(t) - 0.1 / float(path.s(t))

    mean, variance = moments(path, eta, score, lambda t: -1.08 / spread(t))
    law = terminal_law_with_error(TARGET, path, eta, error)
    assert float(law.mean) == pytest.approx(mean, abs=3e-6)
    assert float(law.cov) == pytest.approx(variance, abs=3e-6)


@pytest.mark.parametrize("path", [VE(T=4.0), VP(beta=1.0, T=3.0)])
@pytest.mark.parametrize("eta", [0.0, 1.0, 1.6])
def test_a_constant_score_error_shifts_the_mean(path, eta):
    def spread(t):
        return float(path.a(t) ** 2 * 0.7 + path.s(t) ** 2)

    mean, _ = moments(
        path, eta, lambda t, x: -(x - float(path.a(t)) * 1.3) / spread(t) + 0.2, lambda t: -1.0 / spread(t)
    )
    clean = float(terminal_law(TARGET, path, eta).mean)
    assert float(score_bias_shift(TARGET, path, eta, 0.2)) == pytest.approx(mean - clean, abs=1e-6)


def test_bias_shift_is_the_incomplete_beta_function():
    V, b = 25.0, 0.1
    for eta in (0.4, 1.0, 1.7):
        shift = float(terminal_law_with_error(TARGET, VE(T=5.0), eta, ScoreError(bias=b)).mean) - float(
            terminal_law(TARGET, VE(T=5.0), eta).mean
        )
        p = V / (0.7 + V)
        beta = betainc(0.5, eta**2 / 2, p) * beta_function(0.5, eta**2 / 2)
        assert shift == pytest.approx(-(1 + eta**2) / 2 * 0.7**0.5 * beta * b, rel=1e-10)


def test_vp_score_shift_has_its_closed_form_at_unit_variance():
    V, eta = np.expm1(3.0), 0.8
    closed = (1 + eta**2) / eta**2 * (1 - (1 + V) ** (-(eta**2) / 2)) * 0.3
    assert float(score_bias_shift(Gaussian(0.0, 1.0), VP(beta=1.0, T=3.0), eta, 0.3)) == pytest.approx(
        closed, rel=1e-10
    )


def test_stochasticity_corrects_a_gain_error():
    path = VE(T=1e8)
    law = terminal_law_with_error(TARGET, path, np.array([0.0, 1.0]), ScoreError(gain=0.2))
    assert float(law.cov[0]) < 0.05 * 0.7
    assert float(law.cov[1]) == pytest.approx(0.7 / (1 + 2 * 0.2), rel=1e-6)


def test_finite_steps_with_an_error_tend_to_the_continuous_law():
    error, path = ScoreError(bias=0.1, gain=-0.05), VE(T=5.0)
    for eta in (0.0, 1.2):
        coarse, fine = (finite_step_law(TARGET, path, eta, n, "log-snr", score_error=error) for n in (1000, 2000))
        limit = terminal_law_with_error(TARGET, path, eta, error)
        assert 2 * float(fine.mean) - float(coarse.mean) == pytest.approx(float(limit.mean), abs=3e-4)
        assert 2 * float(fine.cov) - float(coarse.cov) == pytest.approx(float(limit.cov), abs=3e-4)


def test_white_error_adds_its_leading_order_variance():
    path = VE(T=50.0)
    grid = levels(path, 3000, "log-snr")
    h = np.log(grid.v[0] / grid.v[1])
    for eta in (0.0, 0.6, 1.0, 1.8):
        clean, noisy = (finite_step_law(TARGET, grid, eta, score_error=ScoreError(white=w)) for w in (0.0, 1.0))
        added = float(noisy.cov) - float(clean.cov)
        assert added == pytest.approx(float(white_variance(TARGET, path.start(), eta, h, 1.0)[0]), rel=0.02)
    etas = np.linspace(0.3, 3.0, 271)
    added = white_variance(TARGET, VE(T=1e6).start(), etas, h, 1.0)[:, 0]
    assert etas[np.argmin(added)] == pytest.approx(1.0, abs=0.01)


def test_a_consistent_error_is_another_target_and_makes_no_extra_gap():
    """The exact score of another law is not an error of the sampler: its laws are those of that target."""
    other = Gaussian(1.1, 0.9)
    assert float(terminal_law(other, VE(T=1e6), 0.0).mean) == pytest.approx(1.1, abs=1e-5)
    assert float(terminal_law(other, VE(T=1e6), 1.0).cov) == pytest.approx(0.9, abs=1e-5)


def test_recommended_eta_is_the_minimum_of_the_exact_errors():
    found = recommended_eta(Gaussian(1.5, 0.5), "sd", 20)
    assert found.eta == pytest.approx(0.51, abs=0.01)
    assert recommended_eta(Gaussian(1.5, 0.5), "sd", 50).eta == pytest.approx(0.68, abs=0.01)
    assert found.error <= found.errors.min() + 1e-12
    assert found.errors.shape == found.etas.shape == found.to_ode.shape
    assert not found.at_limit


def test_with_the_prior_alone_more_eta_is_always_better_and_with_the_steps_alone_less():
    assert recommended_eta(Gaussian(1.5, 0.5), VE(T=5.0)).at_limit
    assert recommended_eta(Gaussian(0.0, 0.5), VE(T=1e4), 30, "log-snr").eta == 0.0


def test_with_a_bias_alone_the_best_eta_is_the_known_root():
    found = recommended_eta(Gaussian(0.0, 1.0), VE(T=1e9), score_error=ScoreError(bias=0.1))
    assert found.eta == pytest.approx(1.3048, abs=0.01)


def test_the_balance_of_start_and_steps_is_lambert_w():
    from scipy.special import lambertw

    m, c, path = 1.5, 0.5, VE(T=50.0)
    grid = levels(path, 400, "log-snr")
    h, Lam = np.log(grid.v[0] / grid.v[1]), -np.log((c / (c + 2500.0)) ** 0.5)
    expected = float(lambertw(32 * m**2 * Lam**2 / (c * h**2)).real) / (2 * Lam)
    assert recommended_eta(Gaussian(m, c), grid).eta == pytest.approx(max(expected - 1, 0) ** 0.5, abs=0.02)


def test_an_unknown_sign_is_the_worst_of_both():
    target, error = Gaussian(1.5, 0.5), ScoreError(bias=0.05)
    both = recommended_eta(target, "sd", 20, score_error=error, known_sign=False)
    plus, minus = (recommended_eta(target, "sd", 20, score_error=ScoreError(bias=b)) for b in (0.05, -0.05))
    np.testing.assert_allclose(both.errors, np.maximum(plus.errors, minus.errors), rtol=1e-12)
    assert both.eta == pytest.approx(0.96, abs=0.01)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: ScoreError(white=-1.0), "white"),
        (lambda: terminal_law_with_error(TARGET, VE(T=2.0), 1.0, ScoreError(white=0.1)), "steps"),
        (lambda: terminal_law_with_error(TARGET, "flow", 1.0, ScoreError(bias=0.1)), "above 0"),
        (lambda: recommended_eta(TARGET, "sd", 20, score_error=0.1), "ScoreError"),
        (lambda: recommended_eta(TARGET, "sd", 20, eta_max=0.0), "eta_max"),
        (lambda: recommended_eta(TARGET, "sd", 0), "steps"),
    ],
)
def test_a_wrong_argument_is_named(make, names):
    with pytest.raises(EtudeError, match=names):
        make()


def test_recommended_ddim_eta_stays_where_ddim_exists():
    found = recommended_eta(TARGET, "sd", 20, kernel="ddim")
    assert found.etas[-1] == pytest.approx(largest_eta(levels("sd", 20), "ddim"))
    assert recommended_eta(TARGET, "sd", 20, kernel="ddim", eta_max=0.5).etas[-1] == 0.5

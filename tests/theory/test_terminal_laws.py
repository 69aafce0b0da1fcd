"""Terminal laws against moment equations integrated in the original variables (t, x), which share no formula with them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

from etude.errors import EtudeError
from etude.theory import VE, VP, Gaussian, GaussianMixture, RectifiedFlow, kl, terminal_law, w2
from oracles.forward_equation import drift, squared_diffusion

PATHS = {
    "ve-t": (VE(T=3.0, sigma="t"), 0.0),
    "ve-sqrt": (VE(T=5.0, sigma="sqrt"), 0.0),
    "ve-geometric": (VE(T=2.0, sigma="geometric", sigma_min=0.05), 0.3),
    "vp-constant": (VP(beta=1.0, T=2.0), 0.0),
    "vp-linear": (VP(beta_min=0.1, beta_max=6.0, T=1.0), 0.1),
    "vp-function": (VP(beta=lambda t: 1.0 + np.sin(3.0 * t), T=1.5), 0.0),
    "flow": (RectifiedFlow(delta=0.1), 0.0),
    "flow-shift": (RectifiedFlow(delta=0.1, shift=3.0), 0.05),
}


def moments(path, mean, var, eta, t_stop):
    """Integrates the mean and variance of dx = [-f x + (1 + eta^2)/2 g^2 score] ds + eta g dW from T down to t_stop."""
    kappa = 1.0 + eta**2

    def rates(t, state):
        a, s, f, g2 = float(path.a(t)), float(path.s(t)), drift(path, t), squared_diffusion(path, t)
        K = a**2 * var + s**2
        pull = f + 0.5 * kappa * g2 / K
        return [pull * state[0] - 0.5 * kappa * g2 * a * mean / K, 2.0 * pull * state[1] - eta**2 * g2]

    start = [0.0, float(path.prior_variance)]
    out = solve_ivp(rates, (float(path.T), t_stop), start, rtol=1e-10, atol=1e-12, method="DOP853")
    return out.y[:, -1]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 1.7])
def test_terminal_law_solves_the_moment_equations(name, eta):
    path, t_stop = PATHS[name]
    law = terminal_law(Gaussian(1.3, 0.7), path, eta, t_stop)
    mean, var = moments(path, 1.3, 0.7, eta, t_stop)
    assert float(law.mean) == pytest.approx(mean, abs=2e-8)
    assert float(law.cov) == pytest.approx(var, abs=2e-8)


def test_full_covariance_acts_on_each_eigendirection():
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    spectrum, mean = np.array([0.3, 1.0, 2.5]), np.array([1.0, -2.0, 0.5])
    law = terminal_law(Gaussian(mean, basis @ np.diag(spectrum) @ basis.T), VP(beta=1.0, T=2.0), 0.8)
    path, along = VP(beta=1.0, T=2.0), basis.T @ mean
    each = [moments(path, m, c, 0.8, 0.0) for m, c in zip(along, spectrum, strict=True)]
    np.testing.assert_allclose(law.mean, basis @ [m for m, _ in each], atol=1e-8)
    np.testing.assert_allclose(law.cov, basis @ np.diag([v for _, v in each]) @ basis.T, atol=1e-8)


def test_euler_maruyama_simulation_agrees_within_its_confidence():
    path, eta, n, steps = VE(T=3.0), 0.7, 40_000, 600
    rng = np.random.default_rng(5)
    x, h = 3.0 * rng.standard_normal(n), 3.0 / steps
    for i in range(steps):
        t = 3.0 - (i + 0.5) * h
        x = (
            x
            - 0.5 * (1 + eta**2) * 2 * t * (x - 1.3) / (0.7 + t**2) * h
            + eta * np.sqrt(2 * t * h) * rng.standard_normal(n)
        )
    law = terminal_law(Gaussian(1.3, 0.7), path, eta)
    assert abs(x.mean() - float(law.mean)) < 4 * np.sqrt(0.7 / n) + 2e-3
    assert abs(x.var() - float(law.cov)) < 4 * np.sqrt(2 / n) * 0.7 + 4e-3


def test_rectified_flow_from_pure_noise_is_exact_for_every_eta():
    law = terminal_law(Gaussian(2.0, 0.5), RectifiedFlow(delta=0.0), np.array([0.0, 0.5, 2.0]))
    np.testing.assert_array_equal(law.mean, 2.0)
    np.testing.assert_array_equal(law.cov, 0.5)


def test_a_direction_without_variance_is_reproduced_exactly():
    law = terminal_law(Gaussian([1.0, 2.0], [0.0, 1.0]), VE(T=5.0), 0.5)
    assert law.mean[0] == 1.0
    assert law.cov[0] == 0.0


def test_arrays_of_eta_and_T_give_the_single_laws():
    etas, horizons = np.array([0.0, 0.4, 1.5]), np.array([[1.0], [4.0]])
    target = Gaussian([1.0, -1.0], [[1.0, 0.3], [0.3, 0.5]])
    batch = terminal_law(target, VP(beta=0.7, T=horizons), etas)
    assert batch.mean.shape == (2, 3, 2)
    one = terminal_law(target, VP(beta=0.7, T=4.0), 0.4)
    np.testing.assert_allclose(batch[1, 1].mean, one.mean, rtol=1e-14)
    np.testing.assert_allclose(batch[1, 1].cov, one.cov, rtol=1e-14)


def test_path_scales_satisfy_the_forward_equation():
    for path, _ in PATHS.values():
        t, h = 0.4 * float(path.T), 1e-5
        slope = (np.log(path.a(t + h)) - np.log(path.a(t - h))) / (2 * h)
        growth = ((path.s(t + h) / path.a(t + h)) ** 2 - (path.s(t - h) / path.a(t - h)) ** 2) / (2 * h)
        assert drift(path, t) == pytest.approx(float(slope), abs=1e-6)
        assert squared_diffusion(path, t) == pytest.approx(float(path.a(t) ** 2 * growth), rel=1e-6)


def test_the_stable_diffusion_table_ends_at_its_known_level():
    start = VP.stable_diffusion().start()
    assert float(start.V) == pytest.approx(213.6, abs=0.1)
    assert float(VP.ddpm().start().V) == pytest.approx(24777, abs=1)


def test_w2_on_the_line_is_the_distance_of_quantile_functions():
    from scipy.stats import norm

    p, q = Gaussian(1.0, 0.5), Gaussian(0.2, 2.0)
    squared, _ = quad(lambda u: (norm.ppf(u, 1.0, 0.5**0.5) - norm.ppf(u, 0.2, 2.0**0.5)) ** 2, 0, 1)
    assert w2(p, q) == pytest.approx(np.sqrt(squared), rel=1e-6)


def test_w2_of_matrices_is_the_bures_formula():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(2)
    A, B = (x @ x.T + 0.1 * np.eye(3) for x in rng.standard_normal((2, 3, 3)))
    root = sqrtm(A)
    bures = np.trace(A + B - 2 * sqrtm(root @ B @ root)).real
    assert w2(Gaussian([1, 0, 0], A), Gaussian([0, 0, 2.0], B)) == pytest.approx(np.sqrt(5 + bures), rel=1e-10)
    assert w2(Gaussian([0, 0, 0], A), Gaussian([0, 0, 0], A.copy())) < 1e-7


def test_kl_is_the_mean_log_ratio():
    rng = np.random.default_rng(3)
    A, B = (x @ x.T + 0.3 * np.eye(2) for x in rng.standard_normal((2, 2, 2)))
    p, q = Gaussian([1.0, 0.5], A), Gaussian([0.0, 0.0], B)
    x = p.sample(200_000, seed=4)
    ratio = p.log_density(x) - q.log_density(x)
    assert abs(ratio.mean() - kl(p, q)) < 4 * ratio.std() / np.sqrt(x.shape[0])
    assert kl(p, p) == 0.0
    assert kl(Gaussian(0.0, 1.0), Gaussian(0.0, 0.0)) == np.inf


def test_distances_between_ode_and_sde_have_their_leading_order():
    target, V = Gaussian(1.5, 0.5), 1e8
    ode, sde = (terminal_law(target, VE(T=1e4), eta) for eta in (0.0, 1.0))
    assert w2(ode, sde) == pytest.approx(np.sqrt(0.5 * 1.5**2 / V), rel=1e-3)
    assert kl(ode, sde) == pytest.approx(1.5**2 / (2 * V), rel=1e-3)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: VE(T=-1.0), "VE's T"),
        (lambda: VE(sigma="cubic"), "sqrt"),
        (lambda: VE(T=0.001, sigma="geometric"), "sigma_max"),
        (lambda: VP(beta=1.0, beta_min=0.1), "two forms"),
        (lambda: VP(beta=float("nan")), "finite"),
        (lambda: RectifiedFlow(delta=1.0), "below 1"),
        (lambda: Gaussian(0.0, -1.0), "eigenvalue"),
        (lambda: Gaussian([0.0, 1.0], [[1.0, 0.2], [0.4, 1.0]]), "symmetric"),
        (lambda: Gaussian([0.0, 1.0, 2.0], [1.0, 1.0]), "agree"),
        (lambda: GaussianMixture([0.5, 0.6], [0.0, 1.0], 1.0), "sum"),
        (lambda: terminal_law(Gaussian(0.0, 1.0), VE(T=2.0), -0.5), "eta"),
        (lambda: terminal_law(Gaussian(0.0, 1.0), VE(T=2.0), 1.0, t_stop=2.0), "t_stop"),
        (lambda: terminal_law(Gaussian(0.0, 1.0), "sdxl", 1.0), "schedule"),
        (lambda: terminal_law(GaussianMixture([1.0], [0.0], 1.0), VE(T=2.0), 1.0), "reward_gap"),
    ],
)
def test_a_wrong_argument_is_named(make, names):
    with pytest.raises(EtudeError, match=names):
        make()


@pytest.mark.parametrize("distance", [w2, kl])
def test_laws_of_different_dimension_have_no_distance(distance):
    with pytest.raises(EtudeError, match="1 and 3 dimensions"):
        distance(Gaussian(0.0, 1.0), Gaussian([0.0, 0.0, 0.0], 1.0))

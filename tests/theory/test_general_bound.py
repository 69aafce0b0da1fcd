"""The general bound with its dimension: never below the coupling that it bounds, and absent where its condition fails."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from etude.errors import EtudeError
from etude.theory import Gaussian, QuadraticReward, reward_gap
from etude.theory.continuous_paths import VE, VP
from etude.theory.general_bound import Contractive, Dissipative, forward_equation, general_bound, general_bound_rows

CASES = list(itertools.product([1, 16], [0.5, 1.0], [0.1, 0.5, 1.0]))


def coupling(target: Gaussian, path: Contractive, eta: float) -> float:
    """sqrt(E|Y - Z|^2) of ODE and SDE from one start and one Gaussian target c I, by the moments' equations in reverse time."""
    c, d, T = float(target.spectrum[0]), target.d, float(path.T)
    m2 = float(target.mu @ target.mu)

    def slopes(tau: float, moments: np.ndarray) -> np.ndarray:
        t = T - tau
        a, s2 = float(path.a(t)), float(path.s(t)) ** 2
        L, g2, theta = 1 / (a**2 * c + s2), path.g**2, path.theta
        yy, zz, yz = moments  # E<u, v> of the states centred at the path's mean, which moves with the forward drift
        y, z = -theta - (1 + eta**2) / 2 * g2 * L, -theta - g2 * L / 2
        return np.array([2 * y * yy + eta**2 * g2 * d, 2 * z * zz, (y + z) * yz])

    begin = d * float(path.prior_variance) + float(path.a(T)) ** 2 * m2
    yy, zz, yz = solve_ivp(slopes, (0, T), [begin] * 3, rtol=1e-10, atol=1e-12).y[:, -1]
    return float((yy + zz - 2 * yz) ** 0.5)


@pytest.mark.parametrize(("d", "c", "eta"), CASES)
def test_the_bound_is_above_the_coupling_and_the_gap(d: int, c: float, eta: float) -> None:
    target, path = Gaussian(np.full(d, 0.7), np.full(d, c)), Contractive(1 / c, 2 * c)
    k = Dissipative.of(target, path, eta)
    bound = general_bound(k, 1.0, eta)
    reward = QuadraticReward(0.0, linear=np.full(d, d**-0.5))
    gap = abs(float(reward_gap(target, path, reward, eta)))
    assert gap < coupling(target, path, eta) < bound < np.inf
    assert general_bound(k, 1.0, eta, 1.0) <= bound


def test_one_in_the_place_of_the_dimension_bounds_the_coupling_no_more() -> None:
    """A wide path of many dimensions whose score is weak: there the noise d is all that moves the samplers apart."""
    d, eta = 400, 0.4
    target, path = Gaussian(np.zeros(d), np.full(d, 30.0)), Contractive(1.0, 0.5)
    k = Dissipative.of(target, path, eta)
    published = general_bound(k, 1.0, eta, 1.0)
    assert published < coupling(target, path, eta) < general_bound(k, 1.0, eta)


@pytest.mark.parametrize("path", [VE(T=4.0, sigma="sqrt"), VP(T=4.0), VP(beta_min=0.1, beta_max=12.0)])
def test_neither_ve_nor_vp_has_the_bound_at_any_eta(path: VE | VP) -> None:
    k = Dissipative.of(Gaussian(0.5, 1.0), path, 0.1)
    assert k.m <= 0
    assert k.largest_eta == 0
    assert general_bound(k, 1.0, 1e-3) == np.inf


def test_the_largest_eta_is_where_the_contraction_ends() -> None:
    k = Dissipative.of(Gaussian(0.5, 1.0), Contractive(1.0, 2.0), 0.3)
    assert k.largest_eta == pytest.approx(2.0)  # 2 sqrt(2 m - L) with m = L = 1
    assert k.kappa(k.largest_eta) == pytest.approx(0, abs=1e-12)
    assert general_bound(k, 1.0, k.largest_eta * 1.001) == np.inf
    assert general_bound(k, 1.0, 0.0) == 0


def test_the_levels_of_a_contractive_path_fit_together() -> None:
    path = Contractive(0.7, 1.5, 1.2)
    t = np.linspace(0.1, 1.5, 5)
    a, s = path.at_level(path.v(t))
    np.testing.assert_allclose(a, path.a(t), rtol=1e-12)
    np.testing.assert_allclose(s, path.s(t), rtol=1e-12)
    step = 1e-6
    slope = (path.s(t + step) ** 2 - path.s(t - step) ** 2) / (2 * step)
    f, g2 = forward_equation(path, t)
    np.testing.assert_allclose(slope, 2 * f * path.s(t) ** 2 + g2, rtol=1e-6)
    with pytest.raises(EtudeError, match="beyond this path's end"):
        path.at_level(2.0)


def test_the_rows_say_where_there_is_no_bound() -> None:
    rows = general_bound_rows(Gaussian(np.array([1.0, 0.5]), np.array([1.0, 0.4])), [0.0, 0.5, 1.5])
    assert [row["eta"] for row in rows] == [0.5, 1.5] * 4
    for row in rows:
        assert row["gap"] > 0
        assert np.isfinite(row["bound"]) == (row["eta"] < row["largest_eta"])
        assert row["gap"] <= row["bound"]

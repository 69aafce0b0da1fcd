"""Asymptotic rates against the exact gap far out, and the fit against a known power law."""

from __future__ import annotations

import numpy as np
import pytest

from etude.errors import EtudeError
from etude.theory import (
    VE,
    VP,
    Gaussian,
    QuadraticReward,
    RectifiedFlow,
    asymptotic_series,
    fit_rate,
    own_error_rates,
    rates,
    reward_gap,
    terminal_law,
)

COV = np.array([[1.0, 0.3], [0.3, 0.5]])
GENERIC = Gaussian([1.5, -1.0], COV)
CENTRED = Gaussian([0.0, 0.0], COV)
REWARD = QuadraticReward([[1.0, 0.2], [0.2, -0.3]], center=[2.0, 0.5])

FAR = {
    "ve-t": (VE(T=1e5), 1.0, 2.0),
    "ve-sqrt": (VE(T=1e10, sigma="sqrt"), 0.5, 1.0),
    "ve-geometric": (VE(T=1e5, sigma="geometric"), 1.0, 2.0),
    "vp": (VP(beta=1.0, T=23.0), 0.5, 1.0),
}


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("eta", [0.7, 1.0, 1.8])
def test_gap_tends_to_its_rate(name, eta):
    path, generic, centred = FAR[name]
    for target, exponent, regime in ((GENERIC, generic, "generic"), (CENTRED, centred, "centred")):
        rate = rates(target, path, REWARD, eta)
        assert (rate.exponent, rate.regime) == (pytest.approx(exponent), regime)
        assert reward_gap(target, path, REWARD, eta) == pytest.approx(float(rate(path)), rel=0.02)


@pytest.mark.parametrize("target", [GENERIC, CENTRED])
def test_rectified_flow_gap_tends_to_its_rate_in_delta(target):
    path = RectifiedFlow(delta=1e-5)
    rate = rates(target, path, REWARD, 1.0)
    assert (rate.exponent, rate.variable) == (1.0, "1/delta")
    assert reward_gap(target, path, REWARD, 1.0) == pytest.approx(float(rate(path)), rel=1e-3)


def test_small_eta_in_a_degenerate_direction_has_the_sde_rate():
    """g^T C^(1/2) m = 0 but g^T C^(kappa/2) m != 0: the SDE's own error is the slowest term."""
    c, m = np.array([1.0, 0.25]), np.array([1.0, 1.0])
    target, reward = Gaussian(m, c), QuadraticReward(0.0, linear=[1.0, -2.0])
    rate = rates(target, VE(T=1.0), reward, 0.5)
    assert rate.exponent == pytest.approx(1.25)
    path = VE(T=1e6)
    assert reward_gap(target, path, reward, 0.5) == pytest.approx(float(rate(path)), rel=1e-3)


@pytest.mark.parametrize("path", [VE(T=300.0), VP(beta=1.0, T=12.0), RectifiedFlow(delta=1e-3)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_samplers_own_errors_tend_to_their_rates(path, eta):
    mean, variance = own_error_rates(GENERIC, path, eta)
    law = terminal_law(GENERIC, path, eta)
    assert np.linalg.norm(law.mean - GENERIC.mean) == pytest.approx(float(mean(path)), rel=0.02)
    assert float(np.sum(law.spectrum - GENERIC.spectrum)) == pytest.approx(float(variance(path)), rel=0.02)


@pytest.mark.parametrize("target", [GENERIC, CENTRED])
def test_the_fit_of_the_numerical_gap_finds_exponent_and_constant(target):
    horizons = np.geomspace(100.0, 10_000.0, 30)
    path = VE(T=horizons)
    fit, rate = fit_rate(horizons, reward_gap(target, path, REWARD, 1.0)), rates(target, path, REWARD, 1.0)
    assert fit.exponent == pytest.approx(rate.exponent, abs=0.01)
    assert fit.constant == pytest.approx(rate.constant, rel=0.05)
    vp = VP(beta=1.0, T=np.linspace(8.0, 20.0, 30))
    fit, rate = fit_rate(np.exp(vp.total), reward_gap(target, vp, REWARD, 1.0)), rates(target, vp, REWARD, 1.0)
    assert fit.exponent == pytest.approx(rate.exponent, abs=0.01)


def test_the_series_is_closer_than_its_leading_term():
    for path in (VE(T=100.0), VP(beta=1.0, T=9.0), RectifiedFlow(delta=0.01)):
        gap = reward_gap(GENERIC, path, REWARD, 0.5)
        series, leading = asymptotic_series(GENERIC, path, REWARD, 0.5), rates(GENERIC, path, REWARD, 0.5)(path)
        assert abs(float(series) - gap) < 0.2 * abs(float(leading) - gap)


def test_no_gap_has_constant_zero():
    assert rates(Gaussian(0.0, 1.0), VP(beta=1.0, T=3.0), QuadraticReward(1.0), 1.0).constant == 0.0


def test_a_wrong_argument_is_named():
    with pytest.raises(EtudeError, match="eta is 0"):
        rates(GENERIC, VE(T=2.0), REWARD, 0.0)
    with pytest.raises(EtudeError, match="pure noise"):
        rates(GENERIC, RectifiedFlow(delta=0.0), REWARD, 1.0)
    with pytest.raises(EtudeError, match="4 points"):
        fit_rate([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(EtudeError, match="zeros"):
        fit_rate([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 0.0, 0.0])

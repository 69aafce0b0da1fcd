"""Optima of the path-space KL against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from etude.errors import EtudeError
from etude.theory import (
    VE,
    VP,
    Gaussian,
    QuadraticReward,
    finite_step_law,
    mean_policy_optimum,
    path_kl_optimum,
    terminal_law,
    tilt,
    w2,
)

BASE, REWARD, BETA = Gaussian(1.0, 1.0), QuadraticReward(1.0, center=2.0, linear=0.3), 1.5


def test_the_optimum_is_the_average_of_tilted_kernels():
    """Each start's kernel N(m + Phi (y - m), S) times exp(r/beta), by quadrature over kernel and start."""
    eta, V = 0.8, 25.0
    phi0 = (1 / (1 + V)) ** 0.5
    phi, S = phi0 ** (1 + eta**2), 1 - phi0 ** (2 * eta**2)
    z = np.linspace(-9, 9, 1201)
    prior = np.exp(-0.5 * z**2) / np.exp(-0.5 * z**2).sum()
    x = (1 + phi * (5.0 * z - 1))[:, None] + S**0.5 * z
    weight = np.exp(-0.5 * z**2 + REWARD(x.ravel()).reshape(x.shape) / BETA)
    weight *= prior[:, None] / weight.sum(axis=1, keepdims=True)
    mean = np.sum(weight * x)
    law = path_kl_optimum(BASE, VE(T=5.0), REWARD, BETA, eta)
    assert float(law.mean) == pytest.approx(mean, rel=1e-8)
    assert float(law.cov) == pytest.approx(np.sum(weight * (x - mean) ** 2), rel=1e-8)


def test_it_tends_to_the_tilt_when_the_sampler_forgets_its_start():
    base = Gaussian([1.0, -0.5], [[1.0, 0.3], [0.3, 0.5]])
    reward = QuadraticReward([[1.0, 0.2], [0.2, 0.5]], center=[2.0, 0.0])
    optimum = tilt(base, reward, BETA)
    assert w2(path_kl_optimum(base, VP(beta=1.0, T=40.0), reward, BETA, 1.5), optimum) < 1e-6
    assert w2(path_kl_optimum(base, VP(beta=1.0, T=2.0), reward, BETA, 0.5), optimum) > 0.1
    assert w2(path_kl_optimum(base, "flow", reward, BETA, 1.0), optimum) < 1e-6


def test_at_eta_zero_nothing_can_change():
    for steps, reference in ((None, terminal_law(BASE, "sd", 0.0)), (8, finite_step_law(BASE, "sd", 0.0, 8))):
        assert w2(path_kl_optimum(BASE, "sd", REWARD, BETA, 0.0, steps), reference) < 1e-7


def test_many_steps_tend_to_the_continuous_optimum():
    limit = path_kl_optimum(BASE, VE(T=5.0), REWARD, BETA, 1.0)
    far, near = (path_kl_optimum(BASE, VE(T=5.0), REWARD, BETA, 1.0, n, "log-snr") for n in (500, 2000))
    assert w2(near, limit) < 0.3 * w2(far, limit) < 0.01
    policy = mean_policy_optimum(BASE, VE(T=5.0), REWARD, BETA, 1.0, 2000, "log-snr")
    assert w2(policy.law, limit) < 0.01


def test_the_mean_policy_is_the_maximum_over_affine_policies():
    """Optimises all feedback and feedforward numbers of a two-noise-step sampler by a general-purpose method."""
    steps, eta = 3, 1.1
    best = mean_policy_optimum(BASE, "sd", REWARD, BETA, eta, steps)
    from etude.theory import levels

    grid = levels("sd", steps)
    a, s = grid.a, grid.s

    def loss(parameters):
        mean, var, kl = 0.0, 1.0, 0.0
        for i in range(steps):
            rho = (s[i + 1] * a[i] / (s[i] * a[i + 1])) ** (eta**2)
            K = a[i] ** 2 + s[i] ** 2
            G, std = a[i] / K, s[i + 1] * np.sqrt(1 - rho**2)
            gain, offset = (
                a[i + 1] * G + s[i + 1] * rho * s[i] / K,
                a[i + 1] - (a[i + 1] * G + s[i + 1] * rho * s[i] / K) * a[i],
            )
            F, f = parameters[2 * i : 2 * i + 2] if std > 0 else (0.0, 0.0)
            if std > 0:
                kl += ((F * mean + f) ** 2 + F**2 * var) / (2 * std**2)
            mean, var = (gain + F) * mean + offset + f, (gain + F) ** 2 * var + std**2
        return -(REWARD.expected(Gaussian(mean, var)) - BETA * kl)

    found = minimize(loss, np.zeros(2 * steps), method="BFGS", options={"gtol": 1e-9})
    assert best.value == pytest.approx(-found.fun, abs=1e-7)
    assert best.kl > 0
    assert best.value == pytest.approx(best.reward - BETA * best.kl)


def test_freedom_is_worth_something():
    """A policy restricted to the means gains less than the optimum over all trajectories with the same start."""
    steps, eta = 6, 1.0
    free = path_kl_optimum(BASE, "sd", REWARD, BETA, eta, steps)
    bound = mean_policy_optimum(BASE, "sd", REWARD, BETA, eta, steps)
    reference = REWARD.expected(finite_step_law(BASE, "sd", eta, steps))
    assert reference < bound.value
    assert w2(bound.law, free) > 1e-3


def test_a_wrong_argument_is_named():
    with pytest.raises(EtudeError, match="beta above"):
        path_kl_optimum(BASE, VE(T=5.0), QuadraticReward(-1.0), 1.0, 1.0)
    with pytest.raises(EtudeError, match="raise beta"):
        mean_policy_optimum(BASE, VE(T=5.0), QuadraticReward(-1.0), 1.0, 1.0, 10)
    with pytest.raises(EtudeError, match="beta"):
        path_kl_optimum(BASE, VE(T=5.0), REWARD, -1.0, 1.0)

"""Kernels that are gDDIM under another name, to twelve digits."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from etude.sampling.kernels import GDDIM, DanceSDE, Kernel, equivalent_eta
from etude.sampling.paths import FlowPath
from etude.sampling.published_kernels import Churn, DancePrecise, Precise
from support.gaussian_policy import sd_path

FLOW = FlowPath.from_config({"shift": 3.0}).grid(10)
VP = sd_path().grid(20)


def steps(grid):
    levels = list(zip(grid.a.tolist(), grid.s.tolist(), strict=True))
    return [step for step in pairwise(levels) if step[0][0] > 0]


def same(kernel: Kernel, eta: float, step) -> None:
    one, other = kernel.coefficients(*step), GDDIM(eta).coefficients(*step)
    for name in ("x0", "eps", "std"):
        assert float(getattr(one, name)) == pytest.approx(float(getattr(other, name)), rel=1e-12, abs=1e-12), name


@pytest.mark.parametrize("grid", [FLOW, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("n", [0.0, 0.3, 1.5, 4.0])
def test_precise_is_gddim_at_its_level_over_root_two(grid, n):
    for step in steps(grid):
        same(Precise(n), n / math.sqrt(2), step)


@pytest.mark.parametrize("grid", [FLOW, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("gamma", [0.0025, 0.4])
def test_churn_is_gddim_at_an_eta_that_falls_with_the_length_of_the_step(grid, gamma):
    for (a_t, s_t), (a_u, s_u) in steps(grid):
        if s_u > 0:
            ratio = (s_t / a_t) / (s_u / a_u)
            same(Churn(gamma), math.sqrt(math.log1p(gamma) / math.log(ratio)), ((a_t, s_t), (a_u, s_u)))


def test_churn_is_edms_noise_followed_by_the_odes_step():
    """In y = x / a: noise of variance sigma_hat^2 - sigma^2, then y' = x0 + sigma' / sigma_hat (y - x0)."""
    gamma, (a_t, s_t), (a_u, s_u) = 0.3, (0.4, 0.6), (0.5, 0.5)
    sigma, after = s_t / a_t, s_u / a_u
    hat = (1 + gamma) * sigma
    found = Churn(gamma).coefficients((a_t, s_t), (a_u, s_u))
    assert float(found.eps) == pytest.approx(a_u * after / hat * sigma, rel=1e-12)
    assert float(found.std) == pytest.approx(a_u * after / hat * math.sqrt(hat**2 - sigma**2), rel=1e-12)


@pytest.mark.parametrize("n", [0.3, 1.2])
def test_many_short_exact_steps_are_one_dance_precise_step_and_many_of_dance_sde(n):
    sigma = torch.linspace(0.9, 0.3, 20001, dtype=torch.float64)
    source, target = (1 - sigma[:-1], sigma[:-1]), (1 - sigma[1:], sigma[1:])
    kept = DancePrecise(n).coefficients(source, target)
    once = DancePrecise(n).coefficients((0.1, 0.9), (0.7, 0.3))
    # rho multiplies along the way.
    rho = (kept.eps / sigma[1:]).prod()
    assert float(rho) == pytest.approx(float(once.eps) / 0.3, rel=1e-10)
    short = DanceSDE(n).coefficients(source, target)
    assert float((short.std / kept.std - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("kernel", [Precise(1.5), DancePrecise(0.7), Churn(0.1)])
def test_they_keep_the_noise_of_the_level(kernel):
    for step in steps(FLOW):
        found = kernel.coefficients(*step)
        assert float(found.eps**2 + found.std**2) == pytest.approx(step[1][1] ** 2, rel=1e-12, abs=1e-15)
    assert float(kernel.coefficients(*steps(FLOW)[-1]).std) == 0


def test_fdfos_default_is_a_small_eta_and_precises_about_one():
    levels = steps(FlowPath.from_config({"shift": 3.0}).grid(25, [1 - i / 25 for i in range(25)]))[:-1]
    etas = [float(equivalent_eta(Churn(0.0025), *step)) for step in levels]
    assert (round(min(etas), 2), round(max(etas), 2)) == (0.06, 0.12)
    assert float(Precise(1.5).small_step_eta((0.5, 0.5))) == pytest.approx(1.0607, abs=1e-4)

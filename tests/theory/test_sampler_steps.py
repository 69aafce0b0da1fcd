"""The theory's steps are the sampler's, for every kernel and plan, and equal a second derivation of each kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from etude.errors import EtudeError
from etude.registry import KERNELS
from etude.sampling.kernels import CPS, DDIM, GDDIM, Coefficients, DanceSDE, FlowSDE, Kernel
from etude.sampling.paths import FlowPath
from etude.sampling.plans import SamplingPlan
from etude.theory import (
    VE,
    Gaussian,
    GaussianMixture,
    QuadraticReward,
    RectifiedFlow,
    finite_step_law,
    gap_split,
    levels,
    mean_policy_optimum,
    mixture_gap,
    path_kl_optimum,
    recommended_eta,
    reward_gap,
    simulate_gap,
    terminal_law,
    w2,
)
from etude.theory.euler_maruyama import EulerMaruyama
from etude.theory.exact_gap import continuous_gap
from etude.theory.sampler_steps import FORGETFUL, continuous_eta, largest_eta, sampler_steps
from oracles.kernel_formulas import FORMULAS, law

TUNED, REWARD = Gaussian(1.5, 0.5), QuadraticReward(1.0, center=2.0)
FLOW = levels(RectifiedFlow(delta=0.03, shift=2.0), 9)
GRIDS = {
    "sd": levels("sd", 12),
    "leading": levels("ddpm", 7, "leading"),
    "ve": levels(VE(T=20.0), 8, "karras"),
    "flow": FLOW,
    "one step": levels("sd", 1),
}
ANY_PATH = "gddim", "ddim", "cps", "euler-maruyama", "precise", "churn"
FLOW_ONLY = "flow_sde", "dance_sde", "dance_precise"
CASES = [
    *((kernel, grid, eta) for kernel in ANY_PATH for grid in GRIDS for eta in (0.0, 1e-4, 0.4, 1.0)),
    *((kernel, "flow", eta) for kernel in FLOW_ONLY for eta in (0.0, 0.3, 0.7, 1.2)),
    ("gddim", "sd", 7.0),
]


def oracle(kernel, grid, eta):
    """The formula's coefficients on every step, each [N]."""
    return FORMULAS[kernel](grid.a[:-1], grid.s[:-1], grid.a[1:], grid.s[1:], eta)


def test_the_oracle_has_every_kernel():
    assert set(FORMULAS) == {*KERNELS.builtin, "euler-maruyama"}


@pytest.mark.parametrize(("kernel", "grid", "eta"), CASES)
def test_coefficients_and_law_are_those_of_the_second_derivation(kernel, grid, eta):
    grid = GRIDS[grid]
    found, expected = sampler_steps(grid, eta, kernel=kernel), oracle(kernel, grid, eta)
    np.testing.assert_allclose(found.x0, expected[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.eps, expected[1], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.variance, expected[2] ** 2, rtol=1e-12, atol=1e-15)
    steps = list(zip(*(np.broadcast_to(x, (grid.steps,)) for x in expected), strict=True))
    mean, variance = law(1.5, 0.5, grid.a, grid.s, steps, float(grid.prior_variance))
    exact = finite_step_law(TUNED, grid, eta, kernel=kernel)
    assert float(exact.mean) == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert float(exact.cov) == pytest.approx(variance, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("kernel", "eta"), [("cps", 0.6), ("flow_sde", 0.7), ("dance_sde", 0.9)])
def test_law_is_that_of_simulated_samples(kernel, eta):
    """The sampler runs on samples with the exact denoiser, from the oracle's formulas."""
    n, rng = 100_000, np.random.default_rng(3)
    x = rng.standard_normal(n)
    for a, s, x0, eps, std in zip(FLOW.a[:-1], FLOW.s[:-1], *oracle(kernel, FLOW, eta), strict=True):
        eps_hat = s * (x - a * 1.5) / (a**2 * 0.5 + s**2)
        x = x0 * (x - s * eps_hat) / a + eps * eps_hat + std * rng.standard_normal(n)
    exact = finite_step_law(TUNED, FLOW, eta, kernel=kernel)
    assert abs(x.mean() - float(exact.mean)) < 5 * (float(exact.cov) / n) ** 0.5
    assert abs(x.var() - float(exact.cov)) < 5 * (2 / n) ** 0.5 * float(exact.cov)


def test_arrays_of_eta_and_horizon_pair_up_as_numpy_broadcasts():
    grid = levels(RectifiedFlow(delta=np.array([[0.0], [0.1]])), 5)
    etas = np.array([0.3, 0.0, 0.3])
    both = sampler_steps(grid, etas, kernel="flow_sde")
    assert both.x0.shape == both.eps.shape == both.variance.shape == (5, 2, 3)
    for row, delta in enumerate((0.0, 0.1)):
        for column, eta in enumerate(etas):
            one = sampler_steps(levels(RectifiedFlow(delta=delta), 5), eta, kernel="flow_sde")
            for name in ("x0", "eps", "variance"):
                np.testing.assert_array_equal(getattr(both, name)[:, row, column], getattr(one, name))


def test_a_kernel_keeps_its_own_parameters_and_brings_its_eta():
    np.testing.assert_array_equal(
        sampler_steps(FLOW, kernel=FlowSDE(0.7)).variance, sampler_steps(FLOW, 0.7, kernel="flow_sde").variance
    )
    assert (
        w2(finite_step_law(TUNED, "sd", 0.4, 9, kernel=DDIM(1.0)), finite_step_law(TUNED, "sd", 0.4, 9, kernel="ddim"))
        == 0
    )
    assert reward_gap(TUNED, "sd", REWARD, steps=9, kernel=GDDIM(1.2)) == reward_gap(TUNED, "sd", REWARD, 1.2, 9)


class Half(Kernel):
    """A user's own kernel: half of gDDIM's variance is fresh at every eta above 0."""

    def coefficients(self, source, target):
        one = GDDIM(self.eta).coefficients(source, target)
        std = one.std / 2**0.5
        return Coefficients(one.x0, (target[1] ** 2 - std**2).sqrt(), std)


def test_a_users_kernel_has_laws_and_gaps_too():
    law_of_half = finite_step_law(TUNED, "sd", steps=8, kernel=Half(1.0))
    assert w2(law_of_half, finite_step_law(TUNED, "sd", 1.0, 8)) > 0
    assert reward_gap(TUNED, "sd", REWARD, 1.0, 8, kernel=Half(0.0)) == pytest.approx(
        REWARD.expected(finite_step_law(TUNED, "sd", 0.0, 8)) - REWARD.expected(law_of_half), rel=1e-12
    )
    split = gap_split(TUNED, "flow", REWARD, steps=8, kernel=Half(1.0))
    assert split.prior == 0
    with pytest.raises(EtudeError, match="small_step_eta"):  # off pure noise the part of the start needs its limit
        gap_split(TUNED, "sd", REWARD, steps=8, kernel=Half(1.0))


def flow_grid(steps=10):
    return FlowPath.from_config({"shift": 3.0}).grid(steps)


@pytest.mark.parametrize("kernel", [GDDIM(1.5), CPS(0.5), FlowSDE(0.7), DanceSDE(0.4), DDIM(0.9)])
def test_a_plans_table_brings_its_own_steps(kernel):
    """A plan with the default first step is what the theory computes from the kernel; a window is the ODE elsewhere."""
    grid = flow_grid()
    whole = SamplingPlan.sde(10, kernel).tabulate(grid, torch.float64)
    assert w2(finite_step_law(TUNED, whole), finite_step_law(TUNED, grid, kernel=kernel)) < 1e-12
    window = SamplingPlan.window(10, kernel, start=3, size=2).tabulate(grid, torch.float64)
    steps, ode = sampler_steps(window), sampler_steps(grid, 0.0)
    inside = np.isin(np.arange(10), [3, 4])
    np.testing.assert_array_equal(steps.variance > 0, inside)
    np.testing.assert_allclose(steps.eps[~inside], ode.eps[~inside], rtol=1e-14)
    np.testing.assert_allclose(steps.variance[inside], sampler_steps(grid, kernel=kernel).variance[inside], rtol=1e-14)
    gap = REWARD.expected(finite_step_law(TUNED, grid, 0.0)) - REWARD.expected(finite_step_law(TUNED, window))
    assert reward_gap(TUNED, window, REWARD) == pytest.approx(gap, rel=1e-9)
    split = gap_split(TUNED, window, REWARD)
    assert split.prior == 0
    assert split.discretisation == pytest.approx(gap, rel=1e-9)


def test_a_capped_first_step_is_the_tables_own():
    grid = flow_grid()
    capped = SamplingPlan.sde(10, FlowSDE(0.7), first_step="capped").tabulate(grid, torch.float64)
    assert sampler_steps(capped).variance[0] == pytest.approx(0.7**2)
    assert sampler_steps(grid, 0.7, kernel="flow_sde").variance[0] == 0
    assert w2(finite_step_law(TUNED, capped), finite_step_law(TUNED, grid, 0.7, kernel="flow_sde")) > 1e-3


@pytest.mark.parametrize("kernel", [GDDIM(1.5), DDIM(0.9), CPS(0.5)])
def test_out_of_pure_noise_the_ode_step_has_the_law_of_every_kernel_that_keeps_the_levels_noise(kernel):
    grid = flow_grid()
    stochastic = SamplingPlan.sde(10, kernel, first_step="sde").tabulate(grid, torch.float64)
    assert w2(finite_step_law(TUNED, stochastic), finite_step_law(TUNED, grid, kernel=kernel)) < 1e-12


def test_a_tables_levels_serve_another_kernel():
    table = SamplingPlan.ode(10).tabulate(flow_grid(), torch.float64)
    assert (
        w2(
            finite_step_law(TUNED, table, 0.7, kernel="flow_sde"),
            finite_step_law(TUNED, flow_grid(), 0.7, kernel="flow_sde"),
        )
        == 0
    )


def test_an_eta_schedule_has_the_law_of_its_steps():
    etas = [0.0, 0.3, 1.5, 0.8, 0.0]
    grid = levels("sd", 5)
    table = SamplingPlan.from_etas(etas).tabulate(_torch_grid(grid), torch.float64)
    steps = [FORMULAS["gddim"](*x) for x in zip(grid.a[:-1], grid.s[:-1], grid.a[1:], grid.s[1:], etas, strict=True)]
    mean, variance = law(1.5, 0.5, grid.a, grid.s, steps)
    exact = finite_step_law(TUNED, table)
    assert (float(exact.mean), float(exact.cov)) == (pytest.approx(mean, rel=1e-12), pytest.approx(variance, rel=1e-12))


def _torch_grid(grid):
    from etude.sampling.paths import Grid

    return Grid(torch.zeros(grid.steps), torch.tensor(grid.a), torch.tensor(grid.s))


def test_mixtures_take_every_kernel():
    """One component is the Gaussian's closed form; the simulation agrees with the quadrature on two modes."""
    one, two = GaussianMixture([1.0], [1.5], [0.5]), GaussianMixture([0.3, 0.7], [-2.0, 2.0], 0.1)
    for kernel in (FlowSDE(0.7), CPS(0.5), DanceSDE(0.6)):
        exact = reward_gap(TUNED, "flow", REWARD, steps=6, kernel=kernel)
        assert mixture_gap(one, "flow", REWARD, steps=6, kernel=kernel) == pytest.approx(exact, abs=1e-7)
        line = mixture_gap(two, "flow", REWARD, steps=6, kernel=kernel)
        draws = simulate_gap(two, "flow", REWARD, steps=6, kernel=kernel, samples=40_000).gap
        assert abs(line - draws) < 1.5 * draws.error
    table = SamplingPlan.window(10, FlowSDE(0.7), start=2, size=3).tabulate(flow_grid(), torch.float64)
    assert mixture_gap(one, table, REWARD) == pytest.approx(reward_gap(TUNED, table, REWARD), abs=1e-7)


def test_optima_of_path_kl_take_every_kernel_and_plan():
    base, beta = Gaussian(1.0, 1.0), 1.5
    grid = flow_grid(6)
    for kernel in (FlowSDE(0.7), CPS(0.5)):
        table = SamplingPlan.sde(6, kernel).tabulate(grid, torch.float64)
        assert (
            w2(path_kl_optimum(base, grid, REWARD, beta, kernel=kernel), path_kl_optimum(base, table, REWARD, beta))
            < 1e-9
        )
        policy = mean_policy_optimum(base, table, REWARD, beta)
        assert policy.value > REWARD.expected(finite_step_law(base, table))
        assert not policy.feedback[0].any()  # the step out of pure noise is not trained


def test_continuous_time_is_the_limit_of_short_steps_in_the_kernels_unit():
    path = RectifiedFlow(delta=0.05)
    limit = reward_gap(TUNED, path, REWARD, 0.7 * 2**-0.5)
    assert reward_gap(TUNED, path, REWARD, 0.7, kernel="flow_sde") == pytest.approx(limit, rel=1e-12)
    far, near = (reward_gap(TUNED, path, REWARD, 0.7, n, kernel="flow_sde") for n in (1000, 2000))
    assert 2 * near - far == pytest.approx(limit, abs=1e-4)
    split = gap_split(TUNED, path, REWARD, 0.7, 20, kernel="flow_sde")
    assert split.prior == pytest.approx(limit, rel=1e-12)
    forgetful = gap_split(TUNED, path, REWARD, 0.5, 20, kernel="cps")
    assert continuous_eta("cps", 0.5, levels(path, 20)) == FORGETFUL
    exact = REWARD.expected(terminal_law(TUNED, path, 0.0)) - REWARD.expected(TUNED)
    assert forgetful.prior == pytest.approx(exact, rel=1e-12)
    assert continuous_gap(TUNED, path.start(), REWARD, 1e3) == pytest.approx(exact, rel=1e-12)


def test_largest_eta_is_the_kernels():
    grid = levels("sd", 50, "leading")
    step = (torch.tensor(grid.a[:-1]), torch.tensor(grid.s[:-1])), (torch.tensor(grid.a[1:]), torch.tensor(grid.s[1:]))
    assert largest_eta(grid, "ddim") == DDIM(0.0).largest_eta(*step)
    assert [largest_eta(grid, kernel) for kernel in ("gddim", "cps")] == [np.inf, 1.0]
    assert recommended_eta(TUNED, "sd", 20, kernel="cps").etas[-1] == 1.0
    assert 1.0 < recommended_eta(TUNED, "flow", 10, kernel="flow_sde").eta < 1.3


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: finite_step_law(TUNED, "sd", 0.7, 10, kernel="flow_sde"), "FlowSDE is defined on rectified flow"),
        (
            lambda: finite_step_law(TUNED, VE(T=5.0), 0.7, 10, kernel=DanceSDE(0.3)),
            "DanceSDE is defined on rectified flow",
        ),
        (lambda: finite_step_law(TUNED, "sd", 1.2, 10, kernel="cps"), "CPS with eta 1.2 folds back"),
        (lambda: finite_step_law(TUNED, "sd", 1.2, 10, kernel="flow_sd"), "did you mean 'flow_sde'"),
        (lambda: finite_step_law(TUNED, "sd", 1.2, 10, kernel=3.0), "the kernel is a float"),
        (lambda: finite_step_law(TUNED, "sd", steps=10), "eta is missing"),
        (lambda: reward_gap(TUNED, "sd", REWARD), "eta is missing"),
        (lambda: mixture_gap(GaussianMixture([1.0], [0.0], 1.0), "sd", REWARD, kernel="ddim"), "eta is missing"),
        (lambda: EulerMaruyama(1.2).coefficients((0.0, 1.0), (0.1, 0.9)), "a = 0"),
        (
            lambda: gap_split(TUNED, RectifiedFlow(delta=0.1), REWARD, 0.5, 9, kernel="dance_sde"),
            "another eta at each level",
        ),
        (
            lambda: finite_step_law(
                TUNED, SamplingPlan.window(10, GDDIM(1.0), 2, 2, compression=0.5).tabulate(flow_grid(), torch.float64)
            ),
            "compressed tail",
        ),
        (lambda: levels("sd", 1000, "leading"), "past the last one"),
    ],
)
def test_a_wrong_argument_is_one_sentence(make, names):
    with pytest.raises(EtudeError) as caught:
        make()
    assert names in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import EtudeError
from etude.sampling.kernels import CPS, DDIM, GDDIM, DanceSDE, FlowSDE, Kernel, Transition, equivalent_eta
from etude.sampling.paths import FlowPath, VPPath, to_x0_eps
from etude.sampling.plans import SamplingPlan
from support.kernels import KERNELS

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ETAS = st.floats(0, 60)


def vp(alpha: float) -> tuple[float, float]:
    return math.sqrt(alpha), math.sqrt(1 - alpha)


def flow(sigma: float) -> tuple[float, float]:
    return 1 - sigma, sigma


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def steps(draw):
    """A VP step (source, target) and a rectified flow one, by turns; alpha grows from source to target."""
    low = draw(st.floats(1e-6, 0.99))
    high = draw(st.floats(low, 0.9999))
    if draw(st.booleans()):
        return vp(low), vp(high)
    return (low, 1 - low), (high, 1 - high)


@settings(max_examples=200, deadline=None)
@given(step=steps(), eta=ETAS)
def test_gddim_keeps_the_marginals_of_the_true_pair(step, eta):
    source, target = step
    c = GDDIM(eta).coefficients(source, target)
    a_u, s_u = target
    assert float(c.x0) == pytest.approx(a_u, rel=1e-14)
    assert float(c.eps**2 + c.std**2) == pytest.approx(s_u**2, rel=1e-12)
    assert 0 <= float(c.std) <= s_u * (1 + 1e-15)
    assert 0 <= float(c.eps) <= s_u * (1 + 1e-15)


@settings(max_examples=200, deadline=None)
@given(step=steps(), etas=st.tuples(ETAS, ETAS))
def test_gddim_forgets_more_noise_at_a_higher_eta(step, etas):
    low, high = (GDDIM(eta).coefficients(*step) for eta in sorted(etas))
    assert low.std <= high.std
    assert low.eps >= high.eps


@settings(max_examples=100, deadline=None)
@given(alphas=st.lists(st.floats(0.001, 0.999), min_size=3, max_size=3, unique=True), eta=st.floats(0, 3))
def test_two_gddim_steps_with_the_same_x0_hat_are_one(alphas, eta):
    t, m, u = (vp(alpha) for alpha in sorted(alphas))
    kernel = GDDIM(eta)
    first, second, whole = kernel.coefficients(t, m), kernel.coefficients(m, u), kernel.coefficients(t, u)
    assert float(second.eps / m[1] * first.eps) == pytest.approx(float(whole.eps), rel=1e-9, abs=1e-12)
    var = (second.eps / m[1] * first.std) ** 2 + second.std**2
    assert float(var) == pytest.approx(float(whole.std**2), rel=1e-8, abs=1e-12)


def test_gddim_at_eta_one_is_the_ddpm_posterior():
    x0, eps = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=generator())
    alpha_t, alpha_u = 0.3, 0.45
    (a_t, s_t), (a_u, s_u) = vp(alpha_t), vp(alpha_u)
    ratio = alpha_t / alpha_u
    beta = 1 - ratio
    posterior_mean = a_u * beta / s_t**2 * x0 + math.sqrt(ratio) * s_u**2 / s_t**2 * (a_t * x0 + s_t * eps)
    posterior_var = beta * s_u**2 / s_t**2
    got = GDDIM(1.0).transition(x0, eps, (a_t, s_t), (a_u, s_u))
    torch.testing.assert_close(got.mean, posterior_mean)
    assert float(got.std**2) == pytest.approx(posterior_var, rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_and_gddim_are_one_kernel_at_eta_zero_and_one(eta):
    one, other = (kernel(eta).coefficients(vp(0.2), vp(0.6)) for kernel in (GDDIM, DDIM))
    torch.testing.assert_close((one.x0, one.eps, one.std), (other.x0, other.eps, other.std))


def test_ddim_and_gddim_differ_between():
    grid = VPPath.from_config({**SD, "set_alpha_to_one": False}).grid(50)
    last = (grid.a[-2], grid.s[-2]), (grid.a[-1], grid.s[-1])
    ratio = GDDIM(0.5).coefficients(*last).std / DDIM(0.5).coefficients(*last).std
    assert float(ratio) == pytest.approx(1.129, abs=5e-4)


def test_eta_zero_is_the_deterministic_ddim_step():
    c = GDDIM(0).coefficients(vp(0.2), vp(0.6))
    assert (float(c.x0), float(c.eps), float(c.std)) == (*vp(0.6), 0.0)


def test_gddim_is_the_exponential_integrator_with_x0_hat_frozen():
    """The moments of dw = -k w / (2 q) |dq| + eta dW, w = x / a - x0_hat, integrated from q_t to q_u (RK4)."""
    eta, (a_t, s_t), (a_u, s_u) = 0.8, vp(0.2), vp(0.6)
    q_t, q_u, kappa, n = (s_t / a_t) ** 2, (s_u / a_u) ** 2, 1 + eta**2, 2000
    h, q, mean, var = (q_t - q_u) / n, q_t, 1.0, 0.0

    def slope(q: float, mean: float, var: float) -> tuple[float, float]:
        return -kappa / (2 * q) * mean, -kappa / q * var + eta**2

    for _ in range(n):
        k1 = slope(q, mean, var)
        k2 = slope(q - h / 2, mean + h / 2 * k1[0], var + h / 2 * k1[1])
        k3 = slope(q - h / 2, mean + h / 2 * k2[0], var + h / 2 * k2[1])
        k4 = slope(q - h, mean + h * k3[0], var + h * k3[1])
        mean += h / 6 * (k1[0] + 2 * k2[0] + 2 * k3[0] + k4[0])
        var += h / 6 * (k1[1] + 2 * k2[1] + 2 * k3[1] + k4[1])
        q -= h
    c = GDDIM(eta).coefficients((a_t, s_t), (a_u, s_u))
    assert float(c.eps / a_u) == pytest.approx(mean * s_t / a_t, rel=1e-8)
    assert float(c.std / a_u) == pytest.approx(math.sqrt(var), rel=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.2, 3.0])
def test_true_pairs_keep_their_marginal_variance_in_samples(eta):
    """Var x_u = a_u^2 + s_u^2 = 1 for x0 ~ N(0, 1); 5 standard errors, sqrt(2 / n) each."""
    n = 200_000
    x0, eps, z = torch.randn(3, n, 1, generator=generator(3))
    transition = GDDIM(eta).transition(x0, eps, vp(0.1), vp(0.5))
    x_u = transition.sample(z)
    assert abs(float(x_u.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((x_u * x0).mean()) - math.sqrt(0.5)) < 5 * math.sqrt(1.5 / n)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kernel", [GDDIM(0.3), GDDIM(1.7), DDIM(0.9)])
def test_log_prob_is_that_of_torch_distributions(kernel, reduction):
    x0, eps, z = torch.randn(3, 5, 4, 8, 8, generator=generator(1))
    alphas = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    transition = kernel.transition(
        x0, eps, (alphas.sqrt(), (1 - alphas).sqrt()), ((alphas + 0.1).sqrt(), (0.9 - alphas).sqrt())
    )
    x = transition.sample(z)
    elementwise = torch.distributions.Normal(transition.mean, transition.std.expand_as(x)).log_prob(x).flatten(1)
    expected = elementwise.mean(1) if reduction == "mean" else elementwise.sum(1)
    got = transition.log_prob(x, reduction)
    assert got.shape == (5,)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(transition.log_prob(x), elementwise.mean(1), rtol=1e-5, atol=1e-6)


def test_log_prob_of_bf16_states_is_in_fp32_and_differentiates_through_the_mean():
    x0, eps, z = torch.randn(3, 2, 4, 8, 8, generator=generator(1))
    x0.requires_grad_(True)
    transition = GDDIM(1.0).transition(x0, eps, vp(0.2), vp(0.3))
    log_prob = transition.log_prob(transition.sample(z).detach().bfloat16(), "sum")
    assert log_prob.dtype == torch.float32
    log_prob.sum().backward()
    assert x0.grad is not None
    assert bool(x0.grad.abs().sum() > 0)


def test_a_deterministic_step_has_no_log_probability():
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=generator())
    for transition in (
        GDDIM(0.0).transition(x0, eps, vp(0.2), vp(0.3)),
        GDDIM(1.0).transition(x0, eps, vp(0.2), (1.0, 0.0)),
        Transition(x0, torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1)),
    ):
        with pytest.raises(EtudeError, match="no log-probability"):
            transition.log_prob(x0)


def test_an_unknown_reduction_is_an_error():
    x = torch.zeros(1, 4)
    with pytest.raises(EtudeError, match="'max' is unknown"):
        GDDIM(1.0).transition(x, x, vp(0.2), vp(0.3)).log_prob(x, "max")


@pytest.mark.parametrize("eta", [-0.1, math.nan, math.inf, -math.inf, "1"])
@pytest.mark.parametrize("kernel", KERNELS.values())
def test_an_eta_that_is_no_noise_level_is_an_error(kernel, eta):
    with pytest.raises(EtudeError, match="finite number that is at least 0"):
        kernel(eta)


def test_ddim_beyond_its_limit_is_an_error_that_names_the_limit_and_at_the_limit_it_is_fine():
    source, target = vp(0.2), vp(0.6)
    limit = DDIM(1.0).largest_eta(source, target)
    lam = [s / a for a, s in (source, target)]
    assert limit == pytest.approx(1 / math.sqrt(1 - (lam[1] / lam[0]) ** 2), rel=1e-12)
    c = DDIM(limit).coefficients(source, target)
    assert float(c.std) == pytest.approx(target[1], rel=1e-12)
    assert float(c.eps) == pytest.approx(0, abs=1e-7)
    with pytest.raises(EtudeError, match=f"{math.floor(limit * 1e6) / 1e6:.6f}"):
        DDIM(limit * 1.001).coefficients(source, target)


@settings(max_examples=100, deadline=None)
@given(step=steps(), fraction=st.floats(0, 1))
def test_legal_ddim_keeps_the_marginals_too(step, fraction):
    limit = min(DDIM(1.0).largest_eta(*step), 1e6)
    c = DDIM(fraction * limit).coefficients(*step)
    assert float(c.eps**2 + c.std**2) == pytest.approx(step[1][1] ** 2, rel=1e-9)


def test_a_step_that_ends_without_noise_is_deterministic_and_sets_ddim_no_limit():
    for kernel in (GDDIM(0.0), GDDIM(1.5), GDDIM(50.0), DDIM(1.0), DDIM(40.0)):
        c = kernel.coefficients(vp(0.9), (1.0, 0.0))
        assert (float(c.x0), float(c.eps), float(c.std)) == (1.0, 0.0, 0.0)


def test_from_pure_noise_every_eta_above_zero_redraws():
    target = vp(0.1)
    for eta in (1e-3, 1.0, 50.0):
        c = GDDIM(eta).coefficients((0.0, 1.0), target)
        assert (float(c.eps), float(c.std)) == (0.0, target[1])
    assert float(GDDIM(0.0).coefficients((0.0, 1.0), target).eps) == target[1]


@pytest.mark.parametrize("eta", [1e-200, 1e-8, 1e8, 1e200])
def test_extreme_etas_stay_finite(eta):
    for target in (vp(0.2), vp(0.20001), (1.0, 0.0)):
        c = GDDIM(eta).coefficients(vp(0.2), target)
        assert all(math.isfinite(float(v)) for v in (c.x0, c.eps, c.std))
        assert float(c.eps**2 + c.std**2) == pytest.approx(target[1] ** 2, rel=1e-12)


def test_a_step_that_stays_at_its_level_changes_nothing():
    for kernel in (GDDIM(1.5), DDIM(1.0), DDIM(30.0)):
        c = kernel.coefficients(vp(0.2), vp(0.2))
        assert (float(c.x0), float(c.eps), float(c.std)) == (*vp(0.2), 0.0)
    assert DDIM(1.0).largest_eta(vp(0.2), vp(0.2)) == math.inf


def test_the_noise_of_a_small_eta_is_not_lost_to_cancellation():
    """std -> s_u eta sqrt(2 log(lam_t / lam_u)) as eta -> 0."""
    source, target = vp(0.2), vp(0.6)
    log_ratio = math.log(source[1] / source[0] / (target[1] / target[0]))
    got = float(GDDIM(1e-9).coefficients(source, target).std)
    assert got == pytest.approx(target[1] * 1e-9 * math.sqrt(2 * log_ratio), rel=1e-12)


@pytest.mark.parametrize(
    ("source", "target"),
    [(vp(0.6), vp(0.2)), (vp(0.5), (0.0, 1.0)), ((0.0, 1.0), (0.0, 1.0)), ((1.0, 0.0), (1.0, 0.0))],
)
def test_a_step_towards_noise_is_an_error(source, target):
    with pytest.raises(EtudeError, match="noisy level to a less noisy one"):
        GDDIM(1.0).coefficients(source, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_pair_gives_an_fp32_transition(dtype):
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=generator()).to(dtype)
    transition = GDDIM(1.0).transition(x0, eps, vp(0.2), vp(0.3))
    assert transition.mean.dtype == transition.std.dtype == torch.float32


@st.composite
def flow_steps(draw):
    """(sigma_t, sigma_u), both inside (0, 1)."""
    sigma = draw(st.floats(1e-3, 0.999))
    return sigma, sigma * draw(st.floats(0.01, 0.999))


@settings(max_examples=100, deadline=None)
@given(step=flow_steps(), noise=st.floats(0.01, 3))
def test_flow_sde_is_the_published_step_in_x_and_v(step, noise):
    (sigma, sigma_u), dt = step, step[1] - step[0]
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator())
    x, v = (1 - sigma) * x0 + sigma * eps, eps - x0
    g = noise * math.sqrt(sigma / (1 - sigma))
    mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    got = FlowSDE(noise).transition(x0, eps, flow(sigma), flow(sigma_u))
    scale = float(mean.abs().max()) + g**2 / sigma
    torch.testing.assert_close(got.mean, mean, atol=1e-12 * scale, rtol=1e-10)
    assert float(got.std) == pytest.approx(g * math.sqrt(-dt), rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(step=flow_steps(), noise=st.floats(0.01, 3))
def test_dance_sde_is_the_published_step_in_x_v_and_the_score(step, noise):
    (sigma, sigma_u), dt = step, step[1] - step[0]
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator())
    x, v = (1 - sigma) * x0 + sigma * eps, eps - x0
    score = -(x - (1 - sigma) * x0) / sigma**2
    mean = x + v * dt - noise**2 / 2 * score * dt
    got = DanceSDE(noise).transition(x0, eps, flow(sigma), flow(sigma_u))
    torch.testing.assert_close(got.mean, mean, atol=1e-11 * (1 + noise**2 / sigma**2), rtol=1e-9)
    assert float(got.std) == pytest.approx(noise * math.sqrt(-dt), rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(step=steps(), share=st.floats(0, 1))
def test_cps_keeps_the_marginals_of_the_true_pair_and_its_share_whatever_the_step(step, share):
    c = CPS(share).coefficients(*step)
    a_u, s_u = step[1]
    assert float(c.x0) == pytest.approx(a_u, rel=1e-14)
    assert float(c.std) == pytest.approx(s_u * math.sin(share * math.pi / 2), rel=1e-12)
    assert float(c.eps**2 + c.std**2) == pytest.approx(s_u**2, rel=1e-12)
    assert float(c.eps) >= 0


@settings(max_examples=100, deadline=None)
@given(step=flow_steps(), noise=st.floats(0.01, 3))
def test_the_euler_maruyama_kernels_leave_too_much_noise_by_the_square_of_the_step(step, noise):
    sigma, sigma_u = step
    h = sigma - sigma_u
    for kernel, drift, diffusion in (
        (FlowSDE(noise), noise**2 / (2 * (1 - sigma)), noise**2 * sigma / (1 - sigma)),
        (DanceSDE(noise), noise**2 / (2 * sigma), noise**2),
    ):
        c = kernel.coefficients(flow(sigma), flow(sigma_u))
        excess = 2 * drift * h**2 + (drift * h) ** 2
        assert float(c.eps**2 + c.std**2 - sigma_u**2) == pytest.approx(excess, rel=1e-6, abs=1e-12 * diffusion + 1e-13)


@settings(max_examples=60, deadline=None)
@given(step=flow_steps())
def test_every_kernel_at_eta_zero_is_the_euler_step_of_the_flow(step):
    sigma, sigma_u = step
    x, v = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator())
    x0, eps = to_x0_eps(v, x, *flow(sigma), "flow")
    for kernel in KERNELS.values():
        got = kernel(0.0).transition(x0, eps, flow(sigma), flow(sigma_u))
        torch.testing.assert_close(got.mean, x + (sigma_u - sigma) * v, atol=1e-12, rtol=1e-12)
        assert float(got.std) == 0


def variance_at_the_end(kernel: Kernel, num_steps: int, target: float, start: float = 0.95, end: float = 0.02) -> float:
    """Var x at sigma = end under the exact posterior mean of x0 ~ N(0, target), from the exact law at start."""
    sigma = torch.linspace(start, end, num_steps + 1, dtype=torch.float64)
    a, s = 1 - sigma, sigma
    marginal = a**2 * target + s**2
    c = kernel.coefficients((a[:-1], s[:-1]), (a[1:], s[1:]))
    gain = c.x0 * (a * target / marginal)[:-1] + c.eps * (s / marginal)[:-1]
    variance = marginal[0]
    for i in range(num_steps):
        variance = gain[i] ** 2 * variance + c.std[i] ** 2
    return float(variance / marginal[-1])


@pytest.mark.parametrize("target", [0.3, 2.0])
@pytest.mark.parametrize("kernel", [GDDIM(1.2), FlowSDE(0.7), FlowSDE(1.2), DanceSDE(0.3), DanceSDE(1.0)])
def test_a_gaussian_target_keeps_its_marginals_in_the_limit_of_many_steps(kernel, target):
    """With an error of first order: twice the steps, half the error."""
    coarse, fine = (abs(variance_at_the_end(kernel, n, target) - 1) for n in (4_000, 8_000))
    assert fine < 2e-3
    assert fine / coarse == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("target", [0.3, 2.0])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_cps_keeps_a_fixed_part_of_a_gaussian_targets_variance_however_many_steps(share, target):
    """(1 + cos(eta pi / 2)) / 2, where the noise that a step redraws balances what the posterior mean contracts."""
    kept = (1 + math.cos(share * math.pi / 2)) / 2
    assert variance_at_the_end(CPS(share), 10_000, target) == pytest.approx(kept, rel=2e-3)
    assert variance_at_the_end(CPS(share), 100, target) < kept


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.3), CPS(0.8), GDDIM(1.4)])
def test_log_prob_of_the_flow_kernels_is_that_of_torch_distributions(kernel):
    x0, eps, z = torch.randn(3, 5, 16, 8, generator=generator(1))
    sigma = torch.linspace(0.3, 0.9, 5, dtype=torch.float64)
    transition = kernel.transition(x0, eps, (1 - sigma, sigma), (1.1 - sigma, sigma - 0.1))
    x = transition.sample(z)
    density = torch.distributions.Normal(transition.mean, transition.std.expand_as(x)).log_prob(x).flatten(1)
    torch.testing.assert_close(transition.log_prob(x, "sum"), density.sum(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(transition.log_prob(x), density.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.8), CPS(0.5)])
def test_samples_have_the_moments_that_the_coefficients_say(kernel):
    """5 standard errors: sqrt(1 / n) of a mean, sqrt(2 / n) of a variance."""
    n, source, target = 200_000, flow(0.6), flow(0.5)
    c = kernel.coefficients(source, target)
    x0, eps = torch.full((n, 1), 0.7), torch.full((n, 1), -0.4)
    x = kernel.transition(x0, eps, source, target).sample(torch.randn(n, 1, generator=generator(4)))
    assert abs(float(x.mean()) - float(0.7 * c.x0 - 0.4 * c.eps)) < 5 * float(c.std) / math.sqrt(n)
    assert abs(float(x.var() / c.std**2) - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("kernel", [FlowSDE(0.7), FlowSDE(1.2), DanceSDE(0.3), GDDIM(0.5), DDIM(0.9)])
def test_equivalent_eta_tends_to_the_small_step_eta(kernel, sigma):
    limit = float(kernel.small_step_eta(flow(sigma)))
    errors = []
    for h in (1e-3, 1e-4):
        eta = float(equivalent_eta(kernel, flow(sigma), flow(sigma - h * min(sigma, 1 - sigma))))
        errors.append(abs(eta / limit - 1))
    assert errors[1] < 2e-4
    assert errors[1] < 0.2 * errors[0] + 1e-9


@given(noise=st.floats(0, 5), sigma=st.floats(0.01, 0.99))
def test_the_noise_level_of_flow_grpo_is_root_two_times_eta(noise, sigma):
    assert float(FlowSDE(noise).small_step_eta(flow(sigma))) == pytest.approx(noise / math.sqrt(2), rel=1e-12)
    dance = float(DanceSDE(noise).small_step_eta(flow(sigma)))
    assert dance == pytest.approx(noise * math.sqrt((1 - sigma) / (2 * sigma)), rel=1e-12)
    same = FlowSDE(noise * math.sqrt((1 - sigma) / sigma))  # the two differ by their unit of noise only
    assert float(same.small_step_eta(flow(sigma))) == pytest.approx(dance, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(step=steps(), eta=st.floats(0.01, 1.2))
def test_gddim_at_the_equivalent_eta_has_the_kernels_std(step, eta):
    source, target = step
    limit = DDIM(0.0).largest_eta(source, target)
    kernels: list[Kernel] = [GDDIM(eta), CPS(min(eta / 2, 0.99)), DDIM(min(eta, 0.99 * limit))]
    if sum(source) == pytest.approx(1, abs=1e-9):
        kernels += [FlowSDE(eta), DanceSDE(eta)]
    for kernel in kernels:
        std = float(kernel.coefficients(source, target).std)
        equivalent = float(equivalent_eta(kernel, source, target))
        if std >= target[1]:
            assert equivalent == math.inf
        elif source != target and equivalent < 1e100:
            assert float(GDDIM(equivalent).coefficients(source, target).std) == pytest.approx(std, rel=1e-6, abs=1e-12)


def test_equivalent_eta_of_gddim_and_of_ddim_at_one_is_their_own_and_of_a_deterministic_step_zero():
    step = flow(0.6), flow(0.5)
    for eta in (0.0, 0.1, 1.0, 2.0):
        assert float(equivalent_eta(GDDIM(eta), *step)) == pytest.approx(eta, rel=1e-12)
    assert float(equivalent_eta(DDIM(1.0), *step)) == pytest.approx(1, rel=1e-12)
    for kernel in KERNELS.values():
        assert float(equivalent_eta(kernel(0.5), flow(0.1), flow(0.0))) == 0
        assert float(equivalent_eta(kernel(0.0), *step)) == 0
    assert float(equivalent_eta(FlowSDE(3.0), *step)) == math.inf
    assert float(equivalent_eta(CPS(1.0), *step)) == math.inf
    assert float(CPS(0.5).small_step_eta(step[0])) == math.inf
    assert float(CPS(0.0).small_step_eta(step[0])) == 0


def test_equivalent_eta_takes_many_steps_at_once():
    sigma = torch.linspace(0.9, 0.0, 10, dtype=torch.float64)
    source, target = (1 - sigma[:-1], sigma[:-1]), (1 - sigma[1:], sigma[1:])
    eta = equivalent_eta(FlowSDE(0.7), source, target)
    assert eta.shape == (9,)
    for i in range(9):
        one = equivalent_eta(FlowSDE(0.7), flow(float(sigma[i])), flow(float(sigma[i + 1])))
        assert float(eta[i]) == pytest.approx(float(one), rel=1e-9)


SHIFTED = FlowPath.from_config({"shift": 3.0})
FLUX = FlowPath.from_config({"use_dynamic_shifting": True})


@pytest.mark.parametrize("num_steps", [1, 2, 6, 50, 1000])
@pytest.mark.parametrize("first_step", ["ode", "sde", "capped"])
@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_is_ever_nan_or_infinite_on_a_flow(name, first_step, num_steps):
    """Where a kernel is legal; where it is not it says so."""
    grids = [
        SHIFTED.grid(num_steps),
        FLUX.grid(num_steps, torch.linspace(1, 1 / num_steps, num_steps).tolist(), mu=1.15),
    ]
    for grid in grids:
        for eta in (0.0, 0.5, 1.0, 1.5, 5.0, 50.0):
            try:
                table = SamplingPlan.sde(num_steps, KERNELS[name](eta), first_step=first_step).tabulate(grid)
            except EtudeError:
                over = name == "cps" and eta > 1
                over |= name == "ddim" and eta > 1
                assert over or (name == "flow_sde" and first_step == "sde" and eta > 0)
                continue
            assert bool(torch.stack([table.x0, table.eps, table.std]).isfinite().all())
            assert table.stochastic == (
                *(eta > 0 and (i > 0 or first_step != "ode") for i in range(num_steps - 1)),
                False,
            )
            x0, eps = torch.randn(2, 2, 4, generator=generator())
            for dtype in (torch.float32, torch.bfloat16):
                for i in {0, num_steps // 2, num_steps - 1}:
                    transition = table.transition(i, x0.to(dtype), eps.to(dtype))
                    assert bool(transition.sample(x0).isfinite().all())
                    if table.stochastic[i]:
                        assert bool(transition.log_prob(transition.sample(x0)).isfinite().all())


def test_flow_kernels_refuse_other_paths_pure_noise_and_rising_levels():
    for kernel in (FlowSDE(0.7), DanceSDE(0.3)):
        with pytest.raises(EtudeError, match=r"rectified flow \(a \+ s = 1\) only"):
            kernel.coefficients(vp(0.2), vp(0.6))
        with pytest.raises(EtudeError, match="less noisy one"):
            kernel.coefficients(flow(0.2), flow(0.6))
    with pytest.raises(EtudeError, match="infinite noise at sigma = 1"):
        FlowSDE(0.7).coefficients(flow(1.0), flow(0.9))
    with pytest.raises(EtudeError, match="beyond float64"):
        FlowSDE(1e200).coefficients(flow(0.9), flow(0.8))
    assert float(FlowSDE(0.7).coefficients(flow(1.0), flow(0.0)).std) == 0
    assert float(FlowSDE(0.0).coefficients(flow(1.0), flow(0.9)).eps) == 0.9
    assert float(DanceSDE(0.3).coefficients(flow(1.0), flow(0.9)).std) == pytest.approx(0.3 * math.sqrt(0.1))


def test_levels_that_have_been_in_fp32_are_on_the_flow_still():
    sigma = torch.tensor([0.9004, 0.7511, 0.0089])
    got = FlowSDE(0.7).coefficients((1 - sigma[0], sigma[0]), (1 - sigma[1:], sigma[1:]))
    assert got.std.shape == (2,)


def test_cps_beyond_one_is_an_error():
    with pytest.raises(EtudeError, match="folds back"):
        CPS(1.01)
    assert CPS(0.5).largest_eta(flow(0.5), flow(0.4)) == 1
    c = CPS(1.0).coefficients(flow(0.5), flow(0.4))
    assert (float(c.eps), float(c.std)) == (0, 0.4)


def test_a_kernel_without_a_small_step_eta_says_so():
    class Still(Kernel):
        def coefficients(self, source, target):
            return GDDIM(0.0).coefficients(source, target)

    with pytest.raises(EtudeError, match="Still states no eta"):
        Still(0.1).small_step_eta(flow(0.5))


def test_kernels_are_equal_by_class_and_eta():
    kernels = [kernel(0.5) for kernel in KERNELS.values()]
    assert len(set(kernels)) == len(kernels)
    assert all(kernel(0.5) == kernel(eta=0.5) and kernel(0.5) != kernel(0.6) for kernel in KERNELS.values())


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("num_steps", [4, 10, 25])
def test_a_capped_first_step_is_flow_grpos_with_the_next_level_in_the_denominator(num_steps, eta):
    """In x and v as published, where sigma = 1 is sigma_1 in 1 - sigma alone; the log-probability is that of the Gaussian it draws from."""
    grid = SHIFTED.grid(num_steps)
    table = SamplingPlan.sde(num_steps, FlowSDE(eta), first_step="capped").tabulate(grid, torch.float64)
    x, v, z = torch.randn(3, 2, 6, generator=generator(), dtype=torch.float64)
    for i in range(num_steps - 1):
        sigma, after, first = grid.s[i], grid.s[i + 1], grid.s[1]
        g = eta * (sigma / (1 - (first if sigma == 1 else sigma))).sqrt()
        dt = after - sigma
        mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        transition = table.transition(i, *to_x0_eps(v, x, grid.a[i], sigma, "flow"))
        torch.testing.assert_close(transition.mean, mean, rtol=1e-12, atol=1e-12)
        std = g * (-dt).sqrt()
        torch.testing.assert_close(transition.std.reshape(()), std, rtol=1e-12, atol=0)
        drawn = transition.sample(z)
        density = torch.distributions.Normal(mean, std).log_prob(drawn).sum(1)
        torch.testing.assert_close(transition.log_prob(drawn, "sum"), density, rtol=1e-10, atol=1e-10)
    assert float(table.std[0]) == pytest.approx(eta, rel=1e-12)
    assert table.trained == (*[True] * (num_steps - 1), False)


@pytest.mark.parametrize("name", KERNELS)
def test_a_cap_changes_only_flow_sde_and_there_only_the_step_out_of_pure_noise(name):
    grid, kernel = SHIFTED.grid(8), KERNELS[name](0.7)
    ode, capped = (SamplingPlan.sde(8, kernel, first_step=first).tabulate(grid) for first in ("ode", "capped"))
    for key in ("x0", "eps", "std"):
        assert torch.equal(getattr(ode, key)[1:], getattr(capped, key)[1:])
    if name != "flow_sde":
        sde = SamplingPlan.sde(8, kernel, first_step="sde").tabulate(grid)
        assert torch.equal(sde.std, capped.std)
        assert torch.equal(sde.eps, capped.eps)
    one = SamplingPlan.sde(1, kernel, first_step="capped").tabulate(SHIFTED.grid(1))
    assert one.stochastic == (False,)

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import EtudeError
from etude.kernels import DDIM, GDDIM, Transition
from etude.paths import VPPath

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ETAS = st.floats(0, 60)


def vp(alpha: float) -> tuple[float, float]:
    return math.sqrt(alpha), math.sqrt(1 - alpha)


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
@pytest.mark.parametrize("kernel", [GDDIM, DDIM])
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

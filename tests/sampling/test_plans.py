from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import EtudeError
from etude.sampling.kernels import DDIM, GDDIM
from etude.sampling.noise import keyed_noise
from etude.sampling.paths import Grid, VPPath, to_x0_eps
from etude.sampling.plans import SamplingPlan, Step, StepTable

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
PATH = VPPath.from_config(SD)
ZERO_SNR = VPPath.from_config({**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})


def gaussian_pair(x: torch.Tensor, a: float, s: float, mean: float, var: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact (E[x0 | x], E[eps | x]) for data N(mean, var)."""
    gain = a * var / (a * a * var + s * s)
    x0 = mean + gain * (x - a * mean)
    return x0, (x - a * x0) / s


def recursion(grid: Grid, etas: list[float], mean: float, var: float) -> tuple[float, float]:
    """e <- A e, S <- A^2 S + B^2 in y = x / a from e = -mean, S = 1 / a_T^2, for data N(mean, var)."""
    v = (grid.s / grid.a).tolist()
    e, spread = -mean, 1 / float(grid.a[0]) ** 2
    for eta, v_t, v_u in zip(etas, v[:-1], v[1:], strict=True):
        theta = v_u / v_t
        w = theta ** (1 + eta**2)
        gain = (var + v_t**2 * w) / (var + v_t**2)
        e *= gain
        spread = gain**2 * spread + v_u**2 * (1 - theta ** (2 * eta**2))
    return float(grid.a[-1]) * (mean + e), float(grid.a[-1]) ** 2 * spread


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("num_steps", [1, 2, 6, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5, 5.0])
def test_the_law_of_n_steps_on_a_gaussian_target_is_the_exact_recursion(num_steps, eta, set_alpha_to_one):
    mean, var = 1.5, 0.5
    grid = VPPath.from_config({**SD, "set_alpha_to_one": set_alpha_to_one}).grid(num_steps)
    table = SamplingPlan.sde(num_steps, GDDIM(eta)).tabulate(grid, dtype=torch.float64)
    mu, spread = 0.0, 1.0
    for i in range(num_steps):
        a, s = float(table.a[i]), float(table.s[i])
        probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        at_zero, at_one = table.transition(i, *gaussian_pair(probe, a, s, mean, var)).mean.flatten().tolist()
        slope = at_one - at_zero
        mu, spread = at_zero + slope * mu, slope**2 * spread + float(table.std[i]) ** 2
    expected = recursion(grid, [eta] * num_steps, mean, var)
    assert (mu, spread) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("etas", "seed"), [([0.0] * 8, 1), ([1.2] * 8, 2), ([0.0, 0.3, 0.6, 0.9, 1.2, 0.9, 0.5, 0.0], 3)]
)
def test_samples_of_a_gaussian_target_have_the_mean_and_variance_of_the_recursion(etas, seed):
    """100,000 chains in fp32; the sample mean and variance within 5 standard errors of the exact law."""
    n, mean, var = 100_000, 1.5, 0.5
    grid = PATH.grid(len(etas))
    table = SamplingPlan.from_etas(etas).tabulate(grid)
    x = keyed_noise(seed, "initial", 0, [0], 0, (n, 1))[0]
    for i in range(len(etas)):
        pair = gaussian_pair(x, float(table.a[i]), float(table.s[i]), mean, var)
        x = table.transition(i, *pair).sample(keyed_noise(seed, "step", 0, [0], i, (n, 1))[0])
    mu, spread = recursion(grid, etas, mean, var)
    assert abs(float(x.mean()) - mu) < 5 * math.sqrt(spread / n)
    assert abs(float(x.var()) - spread) < 5 * spread * math.sqrt(2 / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", [PATH, ZERO_SNR], ids=["sd", "zero-snr"])
@pytest.mark.parametrize("first_step", ["ode", "sde"])
@pytest.mark.parametrize("num_steps", [1, 2, 6, 50, 1000])
def test_no_eta_and_no_step_count_makes_a_nan(num_steps, first_step, path, dtype):
    for eta in (0.0, 0.5, 1.0, 1.5, 5.0, 50.0):
        grid = path.grid(num_steps)
        table = SamplingPlan.sde(num_steps, GDDIM(eta), first_step=first_step).tabulate(grid)
        x = keyed_noise(0, "initial", 0, [0, 1], 0, (4, 2, 2))
        noise = keyed_noise(0, "step", 0, [0, 1], 0, (4, 2, 2))
        for i in range(num_steps):
            output = (0.9 * x).to(dtype)
            pair = to_x0_eps(output, x, table.a[i], table.s[i], path.prediction_type)
            transition = table.transition(i, *pair)
            x = transition.sample(noise)
            if table.stochastic[i] and i % 7 == 0:
                assert bool(transition.log_prob(x).isfinite().all())
        assert bool(x.isfinite().all())
        assert x.dtype == torch.float32


def test_mixed_steps_in_a_batch_give_each_sample_the_bits_of_its_own_step():
    table = SamplingPlan.from_etas([0.4, 0.7, 1.0, 1.3, 2.0]).tabulate(PATH.grid(5))
    x0, eps, x = torch.randn(3, 9, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 3, 1, 1, 2, 0, 3, 2, 1])
    mixed = table.transition(steps, x0, eps)
    assert torch.equal(table.a[steps], torch.stack([table.a[i] for i in steps.tolist()]))
    for step in range(4):
        alone, rows = table.transition(step, x0, eps), steps == step
        assert torch.equal(alone.mean[rows], mixed.mean[rows])
        assert torch.equal(alone.sample(x)[rows], mixed.sample(x)[rows])
        assert torch.equal(alone.log_prob(x)[rows], mixed.log_prob(x)[rows])
        assert torch.equal(alone.log_prob(x, "sum")[rows], mixed.log_prob(x, "sum")[rows])


def test_a_transition_reads_nothing_back_from_the_device():
    """On the meta device any value read back (item, cpu, a branch on a tensor) is an error."""
    table = SamplingPlan.sde(5, GDDIM(1.2)).tabulate(PATH.grid(5)).to("meta")
    x = torch.empty(3, 4, 8, 8, device="meta")
    for step in (2, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64, device="meta")):
        on_device = step if isinstance(step, int) else step.to("meta")
        pair = to_x0_eps(x, x, table.a[on_device], table.s[on_device], "epsilon")
        assert table.transition(step, *pair).sample(x).shape == x.shape
    assert table.transition(torch.tensor([0, 1, 2]), x, x).log_prob(x).shape == (3,)


def test_a_replayed_transition_has_ratio_exactly_one():
    table = SamplingPlan.sde(6, GDDIM(1.2)).tabulate(PATH.grid(6))
    x0, eps, z = torch.randn(3, 8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    first = table.transition(2, x0, eps)
    x = first.sample(z)
    replay = table.transition(torch.full((8,), 2), x0, eps).log_prob(x)
    assert bool(((replay - first.log_prob(x)).exp() == 1).all())


def test_a_deterministic_step_among_mixed_ones_has_no_log_probability():
    table = SamplingPlan.sde(5, GDDIM(1.0)).tabulate(PATH.grid(5))
    x = torch.zeros(2, 4)
    assert table.transition(torch.tensor([0, 3]), x, x).log_prob(x).shape == (2,)
    for step in (4, torch.tensor([0, 4])):
        with pytest.raises(EtudeError, match="no log-probability"):
            table.transition(step, x, x).log_prob(x)


@pytest.mark.parametrize("step", [-1, 5, torch.tensor([0, 5]), torch.tensor([-1, 0])])
def test_a_step_outside_the_table_is_an_error(step):
    table = SamplingPlan.ode(5).tabulate(PATH.grid(5))
    with pytest.raises(EtudeError, match="not in this 5-step table"):
        table.transition(step, torch.zeros(2, 4), torch.zeros(2, 4))


def test_the_table_is_in_fp32_and_moves_whole():
    table = SamplingPlan.sde(5, GDDIM(1.0)).tabulate(PATH.grid(5))
    moved = table.to("meta")
    for name in ("a", "s", "x0", "eps", "std"):
        assert getattr(table, name).dtype == torch.float32
        assert getattr(moved, name).device.type == "meta"
    assert table.timesteps.tolist() == [999, 799, 599, 399, 199]
    assert moved.trained == table.trained


def test_only_stochastic_steps_are_trained():
    grid = PATH.grid(5)
    assert SamplingPlan.sde(5, GDDIM(1.2)).tabulate(grid).trained_steps == (0, 1, 2, 3)
    assert SamplingPlan.sde(5, GDDIM(0.0)).tabulate(grid).trained_steps == ()
    assert SamplingPlan.sde(5, GDDIM(1.2), trained=False).tabulate(grid).trained_steps == ()
    assert SamplingPlan.ode(5).tabulate(grid).stochastic == (False,) * 5
    noisy_end = VPPath.from_config({**SD, "set_alpha_to_one": False}).grid(5)
    assert SamplingPlan.sde(5, GDDIM(1.2)).tabulate(noisy_end).trained_steps == (0, 1, 2, 3, 4)


def test_an_eta_schedule_trains_where_eta_is_above_zero():
    table = SamplingPlan.from_etas([0.0, 0.5, 0.0, 1.0, 1.0]).tabulate(PATH.grid(5))
    assert table.trained_steps == (1, 3)
    assert table.stochastic == (False, True, False, True, False)


@settings(max_examples=60, deadline=None)
@given(num_steps=st.integers(1, 12), start=st.integers(-2, 13), size=st.integers(-1, 13))
def test_a_window_is_stochastic_inside_and_the_ode_outside_or_an_error(num_steps, start, size):
    if size < 1 or start < 0 or start + size > num_steps:
        with pytest.raises(EtudeError, match="does not fit"):
            SamplingPlan.window(num_steps, GDDIM(1.0), start, size)
        return
    plan = SamplingPlan.window(num_steps, GDDIM(1.0), start, size)
    inside = set(range(start, start + size))
    assert [i for i, step in enumerate(plan.steps) if step.trained] == sorted(inside)
    assert {i for i, step in enumerate(plan.steps) if step.kernel.eta > 0} == inside
    ode, table = (p.tabulate(PATH.grid(num_steps)) for p in (SamplingPlan.ode(num_steps), plan))
    for i in set(range(num_steps)) - inside:
        assert (table.x0[i], table.eps[i], table.std[i]) == (ode.x0[i], ode.eps[i], 0)


def test_a_step_from_pure_noise_is_an_untrained_ode_step_unless_the_redraw_is_asked_for():
    grid = ZERO_SNR.grid(5)
    ode, sde = (SamplingPlan.sde(5, GDDIM(1.0), first_step=first).tabulate(grid) for first in ("ode", "sde"))
    assert (ode.stochastic[0], ode.trained[0], float(ode.std[0])) == (False, False, 0.0)
    assert float(ode.eps[0]) == float(grid.s[1].float())
    assert (sde.stochastic[0], sde.trained[0], float(sde.eps[0])) == (True, True, 0.0)
    assert torch.equal(ode.std[1:], sde.std[1:])
    normal = SamplingPlan.sde(5, GDDIM(1.0)).tabulate(PATH.grid(5))
    assert normal.trained[0]


@pytest.mark.parametrize(("num_steps", "limit"), [(20, "1.0168"), (50, "1.0455")])
def test_ddim_beyond_the_limit_of_its_grid_is_an_error_that_names_it(num_steps, limit):
    config = {**SD, "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    grid = VPPath.from_config(config).grid(num_steps)
    with pytest.raises(EtudeError, match=f"these {num_steps}-step samples is {limit}"):
        SamplingPlan.sde(num_steps, DDIM(1.2)).tabulate(grid)
    exact = DDIM(1.0).largest_eta((grid.a[:-1], grid.s[:-1]), (grid.a[1:], grid.s[1:]))
    assert bool(SamplingPlan.sde(num_steps, DDIM(exact)).tabulate(grid).std.isfinite().all())
    with pytest.raises(EtudeError, match=f"is {limit}"):
        SamplingPlan.sde(num_steps, DDIM(exact * 1.0001)).tabulate(grid)


def test_a_ddim_window_is_limited_by_its_own_steps_only():
    config = {**SD, "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    grid = VPPath.from_config(config).grid(50)
    assert SamplingPlan.window(50, DDIM(1.2), 2, 4).tabulate(grid).trained_steps == (2, 3, 4, 5)


def test_a_last_step_that_stays_at_its_level_limits_no_ddim_eta():
    grid = VPPath.from_config({**SD, "set_alpha_to_one": False}).grid(10, "linspace")
    assert grid.a[-1] == grid.a[-2]
    for kernel in (DDIM(1.0), GDDIM(1.5)):
        table = SamplingPlan.sde(10, kernel).tabulate(grid)
        assert not table.stochastic[-1]
        assert all(table.stochastic[:-1])


@pytest.mark.parametrize("num_steps", [0, -1, 1.5, True])
def test_a_plan_needs_a_whole_number_of_steps(num_steps):
    for make in (SamplingPlan.ode, lambda n: SamplingPlan.sde(n, GDDIM(1.0))):
        with pytest.raises(EtudeError, match="at least 1"):
            make(num_steps)
    with pytest.raises(EtudeError, match="at least 1"):
        SamplingPlan.from_etas([])


def test_a_plan_of_another_length_than_its_grid_is_an_error():
    with pytest.raises(EtudeError, match="plan of 4 steps does not fit a grid of 5"):
        SamplingPlan.ode(4).tabulate(PATH.grid(5))


def test_an_unknown_first_step_is_an_error():
    with pytest.raises(EtudeError, match="first_step 'sdee'"):
        SamplingPlan((Step(GDDIM(1.0)),), first_step="sdee")


def test_plans_are_values():
    assert SamplingPlan.sde(3, GDDIM(0.5)) == SamplingPlan.sde(3, GDDIM(0.5))
    assert SamplingPlan.from_etas([0.5] * 3) == SamplingPlan.sde(3, GDDIM(0.5))
    assert isinstance(SamplingPlan.ode(2).tabulate(PATH.grid(2)), StepTable)


@settings(max_examples=60, deadline=None)
@given(num_steps=st.integers(1, 40), data=st.data())
def test_a_tail_keeps_the_stated_share_of_the_steps_after_the_window_and_ends_with_the_grid(num_steps, data):
    size = data.draw(st.integers(1, num_steps))
    start, compression = data.draw(st.integers(0, num_steps - size)), data.draw(st.floats(0.001, 1.0))
    plan, grid = SamplingPlan.window(num_steps, GDDIM(1.0), start, size, compression=compression), PATH.grid(num_steps)
    table, plain = plan.tabulate(grid), SamplingPlan.window(num_steps, GDDIM(1.0), start, size).tabulate(grid)
    end, rest = start + size, num_steps - start - size
    assert plan.grid_size == num_steps
    assert table.trained_steps == plain.trained_steps
    if rest == 0:
        assert (table.tail, plan.tail_steps, table.num_steps) == (None, 0, num_steps)
        return
    assert torch.equal(table.std, plain.std[:end])
    assert torch.equal(table.s, plain.s[: end + 1])
    tail, kept = table.tail, max(1, round(rest * compression))
    assert (table.num_steps, tail.num_steps, table.num_evaluations, plan.num_steps) == (
        end,
        kept,
        end + kept,
        end + kept,
    )
    levels = [grid.s.tolist().index(s) for s in tail.s.tolist()]
    assert (levels[0], levels[-1]) == (end, num_steps)
    assert tail.timesteps.tolist() == grid.timesteps[levels[:-1]].tolist()
    gaps = [later - sooner for sooner, later in pairwise(levels)]
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


@pytest.mark.parametrize("compression", [0.0, -0.4, 1.1, math.nan])
def test_a_compression_outside_its_range_is_an_error_even_without_a_tail(compression):
    for start in (0, 6):
        with pytest.raises(EtudeError, match="above 0 and at most 1"):
            SamplingPlan.window(10, GDDIM(1.0), start, 4, compression=compression)


def test_a_plan_that_does_not_reach_the_last_level_is_an_error():
    steps = (Step(GDDIM(1.0), True),) * 4
    with pytest.raises(EtudeError, match="ends before the last of 6"):
        SamplingPlan(steps, grid_steps=6)
    with pytest.raises(EtudeError, match="do not fit a grid of 6"):
        SamplingPlan(steps, tail_steps=3, grid_steps=6)
    with pytest.raises(EtudeError, match="a tail of -1"):
        SamplingPlan(steps, tail_steps=-1)


def test_the_prefix_is_the_deterministic_steps_before_the_first_stochastic_one():
    grid = PATH.grid(6)
    assert SamplingPlan.window(6, GDDIM(1.0), 2, 2).tabulate(grid).prefix_steps == 2
    assert SamplingPlan.ode(6).tabulate(grid).prefix_steps == 6
    assert SamplingPlan.sde(6, GDDIM(1.0)).tabulate(grid).prefix_steps == 0
    assert SamplingPlan.sde(6, GDDIM(1.0)).tabulate(ZERO_SNR.grid(6)).prefix_steps == 1


def test_the_tail_moves_with_the_table():
    table = SamplingPlan.window(8, GDDIM(1.0), 1, 2, compression=0.4).tabulate(PATH.grid(8)).to("meta")
    assert table.tail.timesteps.device.type == "meta"
    assert table.tail.s.dtype == torch.float64

from __future__ import annotations

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import EtudeError
from etude.sampling.paths import FlowPath, VPPath, is_flow_config, to_x0_eps

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "LMSDiscreteScheduler",
        "HeunDiscreteScheduler",
    ],
)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_levels_are_those_of_every_vp_scheduler(name, schedule):
    scheduler = getattr(diffusers, name)(**{**SD, "beta_schedule": schedule})
    path = VPPath.from_config(scheduler.config)
    torch.testing.assert_close(path.alphas_cumprod, scheduler.alphas_cumprod.double(), atol=0, rtol=1e-6)
    assert path.timestep_spacing == scheduler.config.timestep_spacing


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(beta_schedule="sigmoid"),
        diffusers.HeunDiscreteScheduler(beta_schedule="exp"),
        diffusers.DDIMScheduler(trained_betas=torch.linspace(0.001, 0.3, 64).tolist(), num_train_timesteps=64),
        diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True),
    ],
    ids=["sigmoid", "exp", "trained", "zero-snr"],
)
def test_the_levels_are_those_of_the_unusual_schedules(scheduler):
    path = VPPath.from_config(scheduler.config)
    assert torch.equal(path.alphas_cumprod, scheduler.alphas_cumprod.double())


@pytest.mark.parametrize(
    ("config", "final"),
    [
        ({"_class_name": "PNDMScheduler", **SD}, "first"),
        ({"_class_name": "DDIMScheduler", **SD}, "clean"),
        ({"_class_name": "DDPMScheduler", **SD}, "clean"),
        ({"_class_name": "EulerDiscreteScheduler", **SD}, "clean"),
        ({"_class_name": "EulerDiscreteScheduler", **SD, "final_sigmas_type": "sigma_min"}, "first"),
        ({"_class_name": "DDIMScheduler", **SD, "set_alpha_to_one": False}, "first"),
        (SD, "clean"),
    ],
)
def test_an_absent_key_takes_the_default_of_the_class_that_the_config_names(config, final):
    path = VPPath.from_config(config)
    assert path.final_alpha_cumprod == (1.0 if final == "clean" else float(path.alphas_cumprod[0]))


@pytest.mark.parametrize("num_steps", [2, 6, 10, 50, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_timesteps_are_those_of_diffusers_ddim(num_steps, spacing, offset):
    scheduler = diffusers.DDIMScheduler(**{**SD, "steps_offset": offset, "timestep_spacing": spacing})
    scheduler.set_timesteps(num_steps)
    path = VPPath.from_config(scheduler.config)
    assert torch.equal(path.grid(num_steps).timesteps, scheduler.timesteps)
    assert torch.equal(
        VPPath.from_config(SD | {"steps_offset": offset}).timesteps(num_steps, spacing), scheduler.timesteps
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 2, 6, 50, 1000])
def test_a_grid_descends_in_noise_and_every_step_ends_where_the_next_begins(spacing, num_steps):
    path = VPPath.from_config({**SD, "steps_offset": 0})
    grid = path.grid(num_steps, spacing)
    assert grid.timesteps.dtype == torch.int64
    assert grid.a.dtype == grid.s.dtype == torch.float64
    assert len(grid.a) == len(grid.s) == grid.num_steps + 1 == num_steps + 1
    assert bool((grid.a.diff() > 0).all())
    torch.testing.assert_close(grid.a**2 + grid.s**2, torch.ones_like(grid.a))
    a, s = path.level(grid.timesteps)
    assert torch.equal(a, grid.a[:-1])
    assert torch.equal(s, grid.s[:-1])


def test_one_step_under_linspace_starts_from_noise():
    assert VPPath.from_config(SD).timesteps(1, "linspace").tolist() == [999]


@pytest.mark.parametrize("num_steps", [0, -3, 1001, 2.5, True])
def test_a_step_count_outside_the_schedule_is_an_error(num_steps):
    with pytest.raises(EtudeError, match="from 1 to 1000"):
        VPPath.from_config(SD).grid(num_steps)


def test_an_offset_past_the_last_timestep_is_an_error():
    with pytest.raises(EtudeError, match="steps_offset 1 reach timestep 1000"):
        VPPath.from_config(SD).grid(1000, "leading")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**SD, "timestep_spacing": "trailling"}, "did you mean 'trailing'"),
        ({**SD, "prediction_type": "epsilom"}, "did you mean 'epsilon'"),
        ({**SD, "beta_schedule": "cubic"}, "beta_schedule 'cubic'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "not a variance preserving"),
        (diffusers.FlowMatchEulerDiscreteScheduler().config, "not a variance preserving"),
        ({"_class_name": "FlowMatchGDDIMScheduler"}, "not a variance preserving"),
        ({"_class_name": "EDMEulerScheduler"}, "not a variance preserving"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
    ],
)
def test_a_config_that_is_no_vp_path_is_an_error_that_says_why(config, says):
    with pytest.raises(EtudeError, match=says):
        VPPath.from_config(config)


def test_an_unknown_spacing_is_an_error():
    with pytest.raises(EtudeError, match="unknown timestep_spacing 'middle'"):
        VPPath.from_config(SD).grid(10, "middle")


def test_zero_terminal_snr_is_reached_by_trailing_spacing_and_refused_to_epsilon_models():
    config = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    grid = VPPath.from_config({**config, "prediction_type": "v_prediction"}).grid(10)
    assert grid.a[0] == 0
    assert grid.s[0] == 1
    with pytest.raises(EtudeError, match="zero terminal SNR"):
        VPPath.from_config(config).grid(10)
    assert VPPath.from_config(config).grid(10, "leading").a[0] > 0


def test_a_level_without_noise_inside_the_schedule_is_an_error():
    config = {"trained_betas": [0.0, 0.1, 0.2, 0.3], "num_train_timesteps": 4}
    with pytest.raises(EtudeError, match="without noise"):
        VPPath.from_config(config).grid(4)


OUTPUTS = {
    "epsilon": lambda x0, eps, a, s: eps,
    "v_prediction": lambda x0, eps, a, s: a * eps - s * x0,
    "sample": lambda x0, eps, a, s: x0,
}


@settings(max_examples=40, deadline=None)
@given(angle=st.floats(0.05, 1.5), kind=st.sampled_from(sorted(OUTPUTS)), seed=st.integers(0, 2**31))
def test_every_prediction_type_converts_to_the_pair_it_was_made_of(angle, kind, seed):
    a, s = torch.tensor(angle).double().cos(), torch.tensor(angle).double().sin()
    x0, eps = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    got = to_x0_eps(OUTPUTS[kind](x0, eps, a, s), a * x0 + s * eps, a, s, kind)
    torch.testing.assert_close(got, (x0, eps), atol=1e-10, rtol=1e-10)


def test_a_flow_velocity_converts_to_the_pair_it_was_made_of():
    x0, eps = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.5, 0.01], dtype=torch.float64)
    x = (1 - sigma).view(3, 1, 1, 1) * x0 + sigma.view(3, 1, 1, 1) * eps
    torch.testing.assert_close(to_x0_eps(eps - x0, x, 1 - sigma, sigma, "flow"), (x0, eps))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conversion_is_in_fp32_and_per_sample_levels_give_the_same_bits(kind, dtype):
    output, x = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    output = output.to(dtype)
    scalar = to_x0_eps(output, x, 0.3, 0.954, kind)
    mixed = to_x0_eps(output, x, torch.full((5,), 0.3), torch.full((5,), 0.954), kind)
    assert scalar[0].dtype == scalar[1].dtype == torch.float32
    assert torch.equal(scalar[0], mixed[0])
    assert torch.equal(scalar[1], mixed[1])
    assert torch.equal(scalar[0], to_x0_eps(output.float(), x, 0.3, 0.954, kind)[0])


def test_an_unknown_prediction_type_is_an_error():
    with pytest.raises(EtudeError, match="unknown prediction_type 'score'"):
        to_x0_eps(torch.zeros(1, 1), torch.zeros(1, 1), 0.5, 0.5, "score")


SHIFTS = {
    "none": {},
    "static": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift_terminal": 0.02, "use_dynamic_shifting": True},
    "karras": {"use_karras_sigmas": True, "shift": 3.0},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True, "shift": 1.7},
    "stochastic": {"stochastic_sampling": True, "num_train_timesteps": 250},
}


@pytest.mark.parametrize("num_steps", [2, 6, 50, 1000])
@pytest.mark.parametrize("given", [True, False], ids=["sigmas", "count"])
@pytest.mark.parametrize("name", SHIFTS)
def test_the_flow_levels_are_those_of_diffusers_under_every_shift(name, given, num_steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SHIFTS[name])
    sigmas = torch.linspace(1, 1 / num_steps, num_steps).tolist() if given else None
    mu = 0.8 if scheduler.config.use_dynamic_shifting else None
    scheduler.set_timesteps(num_steps, sigmas=sigmas, mu=mu)
    assert is_flow_config(scheduler.config)
    path = FlowPath.from_config(scheduler.config)
    grid = path.grid(num_steps, sigmas, mu)
    assert grid.timesteps.dtype == torch.float32
    assert grid.a.dtype == grid.s.dtype == torch.float64
    assert torch.equal(grid.timesteps, scheduler.timesteps)
    assert torch.equal(grid.s, scheduler.sigmas.double())
    assert torch.equal(grid.a, 1 - grid.s)
    assert (grid.a[-1], grid.s[-1]) == (1, 0)


def test_a_flow_starts_from_pure_noise_exactly_however_the_shift_rounds():
    for hundredths in range(101, 600):
        for num_steps in (6, 10):
            grid = FlowPath.from_config({"shift": hundredths / 100}).grid(num_steps)
            assert (grid.a[0], grid.s[0]) == (0, 1), hundredths


def test_the_usual_and_the_dynamic_shift_are_their_formulas():
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.1], dtype=torch.float64)
    static = FlowPath.from_config({"shift": 3.0}).grid(4, sigmas.tolist())
    torch.testing.assert_close(static.s[:-1], 3 * sigmas / (1 + 2 * sigmas), atol=1e-7, rtol=1e-6)
    dynamic = FlowPath.from_config({"use_dynamic_shifting": True, "shift": 3.0}).grid(4, sigmas.tolist(), mu=1.15)
    growth = torch.tensor(1.15).double().exp()
    torch.testing.assert_close(dynamic.s[:-1], growth / (growth + 1 / sigmas - 1), atol=1e-7, rtol=1e-6)


def test_a_flow_of_one_step_starts_from_pure_noise_and_ends_clean():
    grid = FlowPath.from_config({"shift": 3.0}).grid(1)
    assert (grid.a.tolist(), grid.s.tolist(), grid.timesteps.tolist()) == ([0, 1], [1, 0], [1000])


def test_mu_is_ignored_without_a_dynamic_shift_as_pipelines_give_it_regardless():
    path = FlowPath.from_config({"shift": 3.0})
    assert torch.equal(path.grid(5, mu=2.0).s, path.grid(5).s)


def test_the_scheduler_class_decides_the_path():
    flow = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchGDDIMScheduler")
    for name in flow:
        config = {"_class_name": name, "shift": 3.0}
        assert is_flow_config(config)
        path = FlowPath.from_config(config)
        assert (path.config["shift"], path.prediction_type, path.config["num_train_timesteps"]) == (3.0, "flow", 1000)
    for config in ({}, {"_class_name": "EulerDiscreteScheduler"}, {"_class_name": "GDDIMScheduler"}):
        assert not is_flow_config(config)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler is not a rectified-flow scheduler"),
        (diffusers.DDIMScheduler().config, "with betas is not a rectified-flow scheduler"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "Only one of"),
        ({"time_shift_type": "cubic"}, "time_shift_type"),
    ],
)
def test_a_config_that_is_no_flow_path_is_an_error_that_says_why(config, says):
    with pytest.raises(EtudeError, match=says):
        FlowPath.from_config(config)


@pytest.mark.parametrize(
    ("config", "arguments", "says"),
    [
        ({"use_dynamic_shifting": True}, {"num_steps": 4}, "no mu was given: pass mu"),
        ({"use_dynamic_shifting": True}, {"num_steps": 4, "mu": float("nan")}, "finite"),
        ({"shift_terminal": 0.1}, {"num_steps": 1}, "at least 2 steps"),
        ({"shift": 0.0}, {"num_steps": 3}, "change the shift"),
        ({}, {"num_steps": 0}, "at least 1"),
        ({}, {"num_steps": 2.5}, "at least 1"),
        ({}, {"num_steps": True}, "at least 1"),
        ({}, {"num_steps": 3, "sigmas": [1.0, 0.5]}, "do not give 3 steps"),
        ({}, {"num_steps": 2, "sigmas": [0.5, 1.0]}, "falling numbers"),
        ({}, {"num_steps": 2, "sigmas": [1.0, 0.0]}, "without the final 0"),
        ({}, {"num_steps": 2, "sigmas": [1.5, 0.5]}, "at most 1"),
        ({}, {"num_steps": 2, "sigmas": [1.0, float("nan")]}, "falling numbers"),
    ],
)
def test_a_flow_grid_that_cannot_be_is_an_error_that_says_why(config, arguments, says):
    with pytest.raises(EtudeError, match=says):
        FlowPath.from_config(config).grid(**arguments)

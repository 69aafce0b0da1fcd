"""The gap between any two samplers; the ODE/SDE gap is its special case, to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from etude.cli.app import app
from etude.config import SamplerSettings, parse_sampler
from etude.errors import EtudeError
from etude.measuring.gap import reward_gap
from etude.measuring.pairs import Measurement
from etude.measuring.statistics import estimate_mean
from etude.measuring.transfer import transfer_gap
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.policies.stable_diffusion_xl import StableDiffusionXLPolicy
from etude.rewards import register
from etude.sampling.sampler import ODE, SDE
from etude.sampling.solvers import Solver
from support.tiny import save_stable_diffusion, stable_diffusion, stable_diffusion_xl

PROMPTS = ["red heart", "pizza", "tiger", "sun"]


def brightness(images, prompts, **metadata):
    return images.float().mean((1, 2, 3))


@pytest.fixture(scope="module")
def policy():
    return StableDiffusionPolicy(stable_diffusion())


@pytest.fixture
def measurement():
    register("brightness")(brightness)
    return Measurement.of(["brightness"], PROMPTS, num_images=8)


def test_from_the_sde_to_the_ode_it_is_the_reward_gap_to_the_bit(policy, measurement):
    training, deployed = parse_sampler("eta=1.2,steps=4,guidance=2"), parse_sampler("ode,steps=4,guidance=2")
    row = transfer_gap(policy, training, [deployed], measurement).rows[0]
    known = reward_gap(policy, sampler=SDE(1.2, 4, guidance=2.0), measurement=measurement).rows[0]
    assert (row.ode, row.sde, row.gap, row.improvement) == (known.ode, known.sde, known.gap, known.improvement)


def test_it_is_the_difference_under_solver_steps_and_guidance_of_each_side(policy, measurement):
    training, deployed = (
        parse_sampler("eta=0.5,kernel=cps,steps=3,guidance=1"),
        parse_sampler("heun,steps=2,guidance=4"),
    )
    row = transfer_gap(policy, training, [deployed], measurement).rows[0]
    begun, served = (
        brightness(sampler.draw(policy, PROMPTS * 2, seed=0), PROMPTS * 2).double().numpy()
        for sampler in (SDE(0.5, 3, "cps", guidance=1.0), Solver("heun", 2, 4.0))
    )
    assert row.gap == estimate_mean(served - begun, [0, 1, 2, 3] * 2)
    assert list(json.loads(transfer_gap(policy, training, [deployed], measurement).to_json())["rows"][0]) == [
        "sampler", "reward", "deployed", "training", "gap",
    ]  # fmt: skip


def test_another_size_is_drawn_by_the_same_weights(policy, measurement):
    """With the model resized to its own size nothing changes; at another, images are those of a model loaded at it."""
    assert policy.resized(None) is policy
    assert policy.resized(policy.image_size[0]) is policy
    larger = policy.resized(16)
    assert larger.network is policy.network
    loaded = StableDiffusionPolicy(stable_diffusion(), resolution=16)
    assert torch.equal(ODE(2).draw(larger, PROMPTS), ODE(2).draw(loaded, PROMPTS))
    row = transfer_gap(policy, SamplerSettings(steps=2), [SamplerSettings(steps=2, size=16)], measurement).rows[0]
    assert row.ode.mean == pytest.approx(brightness(ODE(2).draw(loaded, PROMPTS * 2), []).double().mean().item())
    assert policy.image_size == (8, 8)


def test_sdxl_is_told_the_size_that_it_draws():
    policy = StableDiffusionXLPolicy(stable_diffusion_xl())
    before = ODE(2).draw(policy, ["sun"])
    loaded = StableDiffusionXLPolicy(stable_diffusion_xl(), resolution=16)
    assert torch.equal(ODE(2).draw(policy.resized(16), ["sun"]), ODE(2).draw(loaded, ["sun"]))
    assert torch.equal(ODE(2).draw(policy, ["sun"]), before)


def test_images_per_prompt_fixes_how_many_images_show_each_prompt(measurement):
    each = Measurement.of(["brightness"], PROMPTS, num_images=8, images_per_prompt=4)
    assert each.shown().texts == ["red heart", "pizza"] * 4
    with pytest.raises(EtudeError, match="num_images = 8 is not a multiple of images_per_prompt = 3"):
        Measurement.of(["brightness"], PROMPTS, num_images=8, images_per_prompt=3)


def test_a_sampler_takes_what_it_does_not_name_from_the_one_beside_it():
    beside = SamplerSettings(steps=7, guidance=0.0, size=64)
    assert parse_sampler("heun", beside) == SamplerSettings(solver="heun", steps=7, guidance=0.0, size=64)
    assert parse_sampler("eta=1.2,steps=10,guidance=1").sampler() == SDE(1.2, 10, guidance=1.0)
    assert parse_sampler("ode").sampler() == ODE(20, 5.0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("heun,eta=1", "solver heun is deterministic"),
        ("kernel=cps", "give an eta above 0"),
        ("step=4", "unknown key 'step'"),
        ("heun,solver=ddim", "solver stands twice"),
        ("steps=", "steps has no value"),
        ("", "solver has no value"),
        ("lms", "ode"),
    ],
)
def test_a_sampler_that_cannot_be_is_one_sentence(text, problem):
    with pytest.raises(EtudeError, match=problem):
        parse_sampler(text)


def test_the_command_measures_it_and_refuses_two_of_what_the_samplers_name(tmp_path):
    register("brightness")(brightness)
    save_stable_diffusion(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = [
        "gap",
        str(tmp_path / "sd"),
        "--reward",
        "brightness",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--samples",
        "8",
    ]
    words += ["--images-per-prompt", "4", "--steps", "3", "--guidance", "2", "--json", str(tmp_path / "gap.json")]
    words += ["--from", "eta=1.2", "--to", "ode", "--to", "heun,steps=2"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    tree = json.loads((tmp_path / "gap.json").read_text())
    assert tree["settings"]["training"] == SamplerSettings(eta=1.2, steps=3, guidance=2).model_dump()
    assert [row["sampler"]["solver"] for row in tree["rows"]] == ["ode", "heun"]
    assert (tree["settings"]["prompts"], tree["settings"]["images_per_prompt"]) == (PROMPTS[:2], 4)
    assert "heun, 2 steps, guidance 2" in result.output
    assert CliRunner().invoke(app, [*words, "--eta", "1", "--eta", "2"]).exit_code == 2

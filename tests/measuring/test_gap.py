"""The gap is a paired difference: same weights, prompts, noise, steps and guidance, image by image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.measuring.gap import reward_gap
from etude.measuring.statistics import paired_summary
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.rewards import register
from etude.sampling.sampler import make_plan, sample_images
from support.tiny import save_stable_diffusion, stable_diffusion

PROMPTS = ["red heart", "pizza", "tiger", "sun"]


@pytest.fixture(autouse=True)
def _brightness():
    register("brightness")(brightness)


def brightness(images, prompts, **metadata):
    return images.float().mean((1, 2, 3))


@pytest.fixture
def policy():
    return StableDiffusionPolicy(stable_diffusion())


def gap(policy, **kwargs):
    defaults = {"etas": [1.2], "steps": [4], "rewards": ["brightness"], "prompts": PROMPTS, "num_images": 8}
    return reward_gap(policy, **{**defaults, **kwargs})


def test_a_sampler_against_itself_has_a_gap_of_exactly_zero(policy):
    row = gap(policy, etas=[0.0]).rows[0]
    assert row["ode"] == row["sde"]
    assert (row["gap"]["mean"], row["gap"]["low"], row["gap"]["high"]) == (0, 0, 0)


def test_the_gap_is_the_mean_of_image_by_image_differences_from_the_same_noise(policy):
    row = gap(policy).rows[0]
    captions = [PROMPTS[i % 4] for i in range(8)]
    ode, sde = (
        brightness(sample_images(policy, captions, make_plan("gddim", eta, 4), seed=0), captions).double().numpy()
        for eta in (0.0, 1.2)
    )
    expected = paired_summary(ode - sde, [i % 4 for i in range(8)])
    assert row["gap"]["mean"] == pytest.approx(np.mean(ode - sde))
    assert row["gap"]["low"] == expected.low
    assert row["gap"]["n"] == 8


def test_one_row_per_step_count_eta_and_reward(policy):
    report = gap(policy, etas=[0.5, 1.0, 3.0], steps=[2, 4], rewards=["brightness", "colorfulness"])
    keys = [(r["num_steps"], r["eta"], r["reward"]) for r in report.rows]
    assert len(set(keys)) == 12
    assert json.loads(report.to_json())["rows"] == report.rows


def test_the_same_seed_measures_the_same_gap_at_any_batch_size(policy):
    first, second = gap(policy), gap(policy, batch_size=3)
    assert first.rows[0]["gap"]["mean"] == pytest.approx(second.rows[0]["gap"]["mean"], abs=0.05)
    assert first.rows == gap(policy).rows
    assert first.rows != gap(policy, seed=1).rows


def test_an_adapter_adds_the_improvement_over_the_base_model(tmp_path):
    base = save_stable_diffusion(tmp_path / "base")
    policy = StableDiffusionPolicy(stable_diffusion())
    policy.add_lora(LoraConfig(), seed=0)
    policy.export(tmp_path / "untrained")
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05)
    policy.export(tmp_path / "trained")
    settings = {"steps": [4], "rewards": ["brightness"], "prompts": PROMPTS, "num_images": 8}
    untouched = reward_gap(base, lora=tmp_path / "untrained", **settings).rows[0]
    trained = reward_gap(base, lora=tmp_path / "trained", **settings).rows[0]
    assert (untouched["improvement"]["mean"], untouched["improvement"]["low"]) == (0, 0)
    assert trained["improvement"]["mean"] == pytest.approx(trained["ode"]["mean"] - untouched["ode"]["mean"])
    assert "improvement" not in gap(policy).rows[0]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"etas": [-1.0]}, "eta"),
        ({"etas": [float("nan")]}, "eta"),
        ({"etas": [1.5], "kernel": "ddim"}, "largest|legal|limit"),
        ({"steps": [0]}, "0"),
        ({"rewards": ["brightnes"]}, "did you mean 'brightness'"),
        ({"num_images": 1}, "at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_sampled(policy, wrong, says):
    policy.predict = None
    with pytest.raises(EtudeError, match=says):
        gap(policy, **wrong)


def test_progress_counts_every_image_step(policy):
    announced, done = [], []
    gap(policy, etas=[0.5, 1.0], steps=[2, 3], on_start=announced.append, on_step=done.append)
    assert announced == [8 * 3 * 5]
    assert sum(done) == announced[0]

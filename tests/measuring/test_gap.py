"""The gap is a paired difference: same weights, prompts, noise, steps and guidance, image by image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.measuring.gap import reward_gap
from etude.measuring.pairs import Measurement
from etude.measuring.statistics import Estimate, estimate_mean
from etude.policies import load_policy
from etude.policies.source import ModelSource
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.rewards import register
from etude.sampling.sampler import ODE, SDE
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


def measurement(rewards=("brightness",), **values) -> Measurement:
    return Measurement.of(rewards, **{"prompts": PROMPTS, "num_images": 8, **values})


def test_a_prompt_that_its_source_repeats_is_one_cluster(policy, tmp_path):
    (tmp_path / "repeated.txt").write_text("moon\nred heart\nMoon\nred  heart\n" * 2)
    repeated = Measurement.of(["brightness"], str(tmp_path / "repeated.txt"), num_images=16)
    assert repeated.clusters == [0, 1] * 8
    assert measurement().clusters == [0, 1, 2, 3] * 2
    estimate = gap(policy, repeated, etas=[1.2])["brightness", 1.2].ode
    assert (estimate.clusters, estimate.n) == (2, 16)
    scores = repeated.scores(repeated.images(policy, ODE(4)))["brightness"]
    assert estimate.standard_error == pytest.approx(abs(scores[::2].mean() - scores[1::2].mean()) / 2)  # of two means


def gap(policy, on=None, steps=(4,), **kwargs):
    samplers = [SDE(1.2, count) for count in steps]
    return reward_gap(policy, **{"sampler": samplers, "measurement": on or measurement(), **kwargs})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """A base model, and two adapters of it: one as it was drawn, which changes nothing, and one that was moved."""
    root = tmp_path_factory.mktemp("adapters")
    save_stable_diffusion(root / "base")
    tuned = StableDiffusionPolicy(stable_diffusion())
    tuned.add_lora(LoraConfig(), seed=0)
    tuned.export(root / "untrained")
    move(tuned)
    tuned.export(root / "trained")
    return {name: root / name for name in ("base", "untrained", "trained")}


@torch.no_grad()
def move(policy) -> None:
    for parameter in policy.trainable().values():
        parameter.add_(0.05)


def test_a_sampler_against_itself_has_a_gap_of_exactly_zero(policy):
    row = gap(policy, etas=[0.0])["brightness", 0.0]
    assert row.ode == row.sde
    assert (row.gap.mean, row.gap.low, row.gap.high) == (0, 0, 0)


def test_the_gap_is_the_mean_of_image_by_image_differences_from_the_same_noise(policy):
    row = gap(policy)["brightness", 1.2]
    captions = [PROMPTS[i % 4] for i in range(8)]
    ode, sde = (
        brightness(sampler.draw(policy, captions, seed=0), captions).double().numpy()
        for sampler in (ODE(4), SDE(1.2, 4))
    )
    assert row.gap == estimate_mean(ode - sde, [i % 4 for i in range(8)])
    assert row.gap.mean == pytest.approx(np.mean(ode - sde))


def test_one_row_per_step_count_eta_and_reward(policy):
    report = gap(policy, measurement(["brightness", "colorfulness"]), etas=[0.5, 1.0, 3.0], steps=[2, 4])
    keys = [(r.num_steps, r.eta, r.reward) for r in report.rows]
    assert len(set(keys)) == 12
    for steps, eta, reward in keys:
        row = report[reward, eta, steps]
        assert (row.num_steps, row.eta, row.reward) == (steps, eta, reward)
        assert isinstance(row.gap, Estimate)


def test_the_files_rows_are_the_estimates_of_the_report(policy):
    report = gap(policy, etas=[0.5], sampler=SDE(1.2, 4, guidance=2.0, first_step="sde"))
    tree = json.loads(report.to_json())
    (row,) = tree["rows"]
    assert list(row) == ["num_steps", "eta", "reward", "ode", "sde", "gap"]
    assert Estimate.from_dict(row["gap"]) == report["brightness", 0.5].gap
    assert tree["settings"] == {
        "model": "StableDiffusionPolicy", "lora": None, "kernel": "gddim", "first_step": "sde", "shift": None,
        "resolution": None, "dtype": None, "guidance_scale": 2.0, "num_images": 8, "prompts": PROMPTS, "seed": 0,
    }  # fmt: skip


def test_a_row_is_found_by_reward_and_eta_and_where_several_match_by_steps(policy):
    report = gap(policy, steps=[2, 4])
    with pytest.raises(EtudeError, match=r"names several rows.*\['brightness', 1.2, 2\], \['brightness', 1.2, 4\]"):
        report["brightness", 1.2]
    with pytest.raises(EtudeError, match="was not measured"):
        report["brightness", 0.7, 2]


def test_a_report_prints_as_a_table(policy):
    report = gap(policy, etas=[0.0, 1.2])
    lines = str(report).splitlines()
    assert lines[0].split() == ["steps", "eta", "reward", "ODE", "SDE", "gap", "(ODE", "-", "SDE)", "pairs"]
    assert lines[2].split()[:3] == ["4", "1.2", "brightness"]
    assert str(report["brightness", 1.2].gap) in lines[2]
    assert "\x1b" not in str(report)
    assert repr(report) == str(report)


def test_the_same_seed_measures_the_same_gap_at_any_batch_size(policy):
    first, second = gap(policy), gap(policy, measurement(batch_size=3))
    assert first.rows[0].gap.mean == pytest.approx(second.rows[0].gap.mean, abs=0.05)
    assert first.rows == gap(policy).rows
    assert first.rows != gap(policy, measurement(seed=1)).rows


def test_an_adapter_adds_the_improvement_over_the_base_model(adapters, policy):
    untouched, trained = (
        gap(ModelSource(adapters["base"], lora=adapters[name])).rows[0] for name in ("untrained", "trained")
    )
    assert (untouched.improvement.mean, untouched.improvement.low) == (0, 0)
    assert trained.improvement.mean == pytest.approx(trained.ode.mean - untouched.ode.mean) != 0
    assert gap(policy).rows[0].improvement is None


def test_every_way_to_load_an_adapter_measures_the_same_and_names_it(adapters):
    base, lora = adapters["base"], adapters["trained"]
    by_hand = load_policy(base)
    by_hand.load_lora(lora)
    reports = [gap(model) for model in (ModelSource(base, lora=lora), load_policy(base, lora=lora), by_hand)]
    assert len({report.to_json() for report in reports}) == 1
    assert reports[0].settings["lora"] == str(lora)
    assert reports[0].rows[0].improvement is not None


def test_the_improvement_of_a_policy_in_training_is_over_the_model_before_training(policy):
    before = gap(policy).rows[0]
    policy.train_everything()
    assert gap(policy).rows[0].improvement.mean == 0
    move(policy)
    after = gap(policy).rows[0]
    assert after.improvement.mean == pytest.approx(after.ode.mean - before.ode.mean) != 0
    assert gap(policy, measurement(with_base=False)).rows[0].improvement is None


def test_there_is_no_improvement_over_a_base_model_that_is_not_there(policy):
    with pytest.raises(EtudeError, match="no base model to compare StableDiffusionPolicy with"):
        gap(policy, measurement(with_base=True))
    policy.train_everything(keep_reference=False)
    move(policy)
    assert gap(policy).rows[0].improvement is None
    with pytest.raises(EtudeError, match="no base model to compare"):
        gap(policy, measurement(with_base=True))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"etas": [-1.0]}, "eta"),
        ({"etas": [float("nan")]}, "eta"),
        ({"sampler": SDE(1.5, kernel="ddim")}, "largest|legal|limit"),
        ({"sampler": [SDE(0.5), SDE(0.5, kernel="cps")]}, "differ in eta and steps alone"),
        ({"steps": [0]}, "0"),
        ({"measurement": None, "rewards": ["brightnes"]}, "did you mean 'brightness'"),
        ({"rewards": ["brightness"]}, "a measurement has its own rewards"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_sampled(policy, wrong, says):
    policy.predict = None
    with pytest.raises(EtudeError, match=says):
        gap(policy, **wrong)


def test_a_measurement_needs_two_images_and_a_prompt():
    with pytest.raises(EtudeError, match="at least 2"):
        measurement(num_images=1)
    with pytest.raises(EtudeError, match="no prompt"):
        measurement(prompts=[])


def test_a_measurement_shows_distinct_prompts_and_no_more_than_images():
    assert measurement(prompts=["a", "b", "a"]).prompts.texts == ["a", "b"]
    assert measurement(num_images=3).prompts.texts == PROMPTS[:3]


def test_progress_counts_every_image_step(policy):
    done, totals = [], set()
    gap(policy, etas=[0.5, 1.0], steps=[2, 3], on_progress=lambda n, total: (done.append(n), totals.add(total)))
    assert totals == {8 * 3 * 5} == {sum(done)}

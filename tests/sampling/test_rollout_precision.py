"""Sampling in another precision than training: whose log-probabilities the ratios are held against, and what they start at."""

from __future__ import annotations

import pytest
import torch

from etude.config import LoraConfig, parse_config
from etude.errors import EtudeError
from etude.policies.flux import FluxPolicy
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.rewards import register
from etude.sampling.kernels import GDDIM
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan
from etude.sampling.replay import replay, replay_log_prob
from etude.sampling.rollout import denoise, rollout
from etude.training.blueprint import make_algorithm
from etude.training.trainer import Trainer
from support.gaussian_policy import GaussianPolicy, sd_path
from support.small_runs import brief_settings, metrics, redness, same, weights
from support.tiny import flux, stable_diffusion

PROMPTS = ["red heart", "pizza", "tiger", "sun", "moon", "car"]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=["sd", "flux"])
def policy(request):
    policy = StableDiffusionPolicy(stable_diffusion()) if request.param == "sd" else FluxPolicy(flux())
    policy.add_lora(LoraConfig(), seed=0)
    return policy


def sampled(policy, dtype, batch_size=6, **kwargs):
    """A rollout in a precision, and what its replay needs."""
    plan = SamplingPlan.sde(5, GDDIM(1.2))
    table, conditioning = plan.tabulate(policy.grid(5)), policy.encode(PROMPTS)
    with policy.precision(dtype):
        found = rollout(
            policy, table, conditioning, NoiseSource(0, "training", 1), list(range(6)), 2.0, batch_size, **kwargs
        )
    return table, conditioning, found


def pairs(trajectory, order):
    """All (sample, step) pairs in an order."""
    count = len(trajectory.steps)
    return order // count, order % count


@pytest.mark.parametrize("dtype", HALF)
def test_stored_log_probabilities_are_those_of_the_network_that_sampled(policy, dtype):
    table, conditioning, trajectory = sampled(policy, dtype)
    rows, columns = torch.arange(6), torch.full((6,), 1)
    with policy.precision(dtype):
        drew, target = replay(policy, table, trajectory, rows, columns, conditioning, 2.0, False)
    trains, _ = replay(policy, table, trajectory, rows, columns, conditioning, 2.0, False)
    assert torch.equal(drew.log_prob(target), trajectory.log_prob[:, 1])
    ratio = (trains.log_prob(target) - trajectory.log_prob[:, 1]).exp()
    exact = ((target - drew.mean).square() - (target - trains.mean).square()).flatten(1).mean(1) / 2
    assert torch.allclose(ratio, (exact / drew.std.flatten().square()).exp(), atol=1e-6)
    assert (ratio != 1).all()


@pytest.mark.parametrize("dtype", [None, *HALF])
@pytest.mark.parametrize("micro_batch", [1, 4, 30])
def test_ratios_against_the_replays_own_log_probabilities_start_at_exactly_one(policy, dtype, micro_batch):
    table, conditioning, trajectory = sampled(policy, dtype)
    drawn = trajectory.log_prob.clone()
    count = 6 * len(trajectory.steps)
    steps = [pairs(trajectory, part) for part in torch.randperm(count, generator=torch.manual_seed(0)).chunk(2)]
    found = replay_log_prob(policy, table, trajectory, steps, conditioning, 2.0, micro_batch)
    for rows, columns in steps:
        for row, column in zip(rows.split(micro_batch), columns.split(micro_batch), strict=True):
            transition, target = replay(policy, table, trajectory, row, column, conditioning, 2.0)
            assert torch.equal(transition.log_prob(target), trajectory.log_prob[row, column])
    differences = (trajectory.log_prob - drawn).flatten()
    assert torch.equal(torch.cat(found).sort().values, differences.sort().values)


def test_of_pairs_that_several_steps_train_the_first_ones_batches_count(policy):
    table, conditioning, trajectory = sampled(policy, None)
    once = [pairs(trajectory, torch.arange(3)), pairs(trajectory, torch.arange(3, 8))]
    replay_log_prob(policy, table, trajectory, [*once, pairs(trajectory, torch.arange(8))], conditioning, 2.0, 8)
    for rows, columns in once:
        transition, target = replay(policy, table, trajectory, rows, columns, conditioning, 2.0)
        assert torch.equal(transition.log_prob(target), trajectory.log_prob[rows, columns])


@pytest.mark.parametrize("dtype", HALF)
def test_weights_that_have_not_moved_have_no_kl_to_their_reference_whatever_the_rollouts_precision(policy, dtype):
    table, conditioning, trajectory = sampled(policy, dtype, reference=policy.reference)
    for column in range(len(trajectory.steps)):
        columns = torch.full((6,), column)
        transition, _ = replay(policy, table, trajectory, torch.arange(6), columns, conditioning, 2.0, False)
        assert torch.equal(transition.mean, trajectory.reference_mean[:, column])


def test_a_precision_ends_with_its_block_and_null_is_that_of_the_weights(policy):
    table, conditioning, _ = sampled(policy, None)
    x = torch.randn(6, *policy.latent_shape, generator=torch.manual_seed(0))

    def mean():
        return denoise(policy, table, 2, x, conditioning, 2.0).mean.detach()

    outside, half = mean(), []

    def broken_off():
        with policy.precision(torch.bfloat16):
            half.append(mean())
            with policy.precision(None):
                assert torch.equal(mean(), outside)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert torch.equal(mean(), outside)
    assert not torch.equal(half[0], outside)
    assert torch.allclose(half[0], outside, atol=0.1)


def test_a_policy_of_one_precision_says_so():
    with (
        pytest.raises(EtudeError, match=r"GaussianPolicy .* leave rollout.dtype null"),
        GaussianPolicy(0.0, 1.0, sd_path()).precision(torch.bfloat16),
    ):
        pass


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    register("redness")(redness)
    return {**brief_settings(tmp_path_factory.mktemp("model")), "rewards": {"redness": 1.0}}


def run(settings, out, **sections):
    tree = {name: {**settings.get(name, {}), **value} for name, value in sections.items()}
    trainer = Trainer(parse_config({**settings, **tree}), out)
    trainer.train()
    return trainer, metrics(out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_says_what_the_rollouts_precision_does_to_the_ratio_before_the_first_update(settings, tmp_path, dtype):
    steps = {"updates_per_epoch": 1, "batch_size": 5}
    _, measured = run(settings, tmp_path / "measured", rollout={"dtype": dtype}, objective=steps)
    again = {**steps, "old_log_prob": "replay"}
    _, corrected = run(settings, tmp_path / "corrected", rollout={"dtype": dtype}, objective=again)
    first, other = measured[1], corrected[1]  # the same images of the same weights
    assert first["rollout_ratio_max_deviation"] == first["ratio_max_deviation"] > 0
    assert other["rollout_ratio_deviation"] == pytest.approx(first["rollout_ratio_deviation"], rel=1e-3)
    assert all(row["ratio_max_deviation"] == 0 and row["ratio_mean"] == 1 for row in corrected[1:])


def test_the_disagreement_in_nats_is_that_of_the_image_whatever_the_reduction(settings, tmp_path):
    """In equal batches and float32 it is exactly 0; in half precision the replay's own log-probabilities do not hide it."""
    steps = {"updates_per_epoch": 1, "batch_size": 4, "num_inner_epochs": 1}
    one = {"iterations": 1, "sampling": {**settings["sampling"], "num_steps": 1}}
    _, equal = run({**settings, **one}, tmp_path / "equal", rollout={"batch_size": 4}, objective=steps)
    assert (equal[1]["rollout_mismatch"], equal[1]["rollout_mismatch_max"]) == (0, 0)
    half, short = {"dtype": "bfloat16"}, {**settings, "iterations": 1}
    trainer, mean = run(short, tmp_path / "mean", rollout=half, objective=steps)
    again = {**steps, "old_log_prob": "replay"}
    summed = {**again, "logprob_reduction": "sum"}
    _, replayed = run(short, tmp_path / "again", rollout=half, objective=again)
    _, total = run(short, tmp_path / "sum", rollout=half, objective=summed)
    found = mean[1]["rollout_mismatch"]
    assert found == pytest.approx(mean[1]["rollout_ratio_deviation"] * trainer.policy.dimensions, rel=1e-2)
    assert replayed[1]["rollout_mismatch"] == pytest.approx(found, rel=1e-3)
    assert total[1]["rollout_mismatch"] == pytest.approx(found, rel=1e-2)
    assert mean[1]["rollout_mismatch_max"] > found > 0


def test_a_disagreement_above_its_limit_stops_the_run_before_the_iteration_is_kept(settings, tmp_path):
    limited = {"objective": {"mismatch_limit": 1e-6, "updates_per_epoch": 1}, "rollout": {"dtype": "bfloat16"}}
    with pytest.raises(
        EtudeError, match=r"nats a step in iteration 1, and objective.mismatch_limit allows 1e-06.*iteration 0"
    ):
        run(settings, tmp_path / "limited", **limited)
    assert [row["iteration"] for row in metrics(tmp_path / "limited")] == [0]
    limited["objective"]["mismatch_limit"] = 1e6
    assert len(run(settings, tmp_path / "allowed", **limited)[1]) == 3
    with pytest.raises(
        EtudeError, match=r"mismatch_limit is for log-probabilities of steps, which objective.kind = nft"
    ):
        make_algorithm(parse_config({"objective": {"kind": "nft", "mismatch_limit": 1.0}}))


def test_a_disagreement_is_normal_with_the_distance_of_the_means_as_its_deviation(policy):
    """log p' - log p = k z - k^2 / 2 for x drawn by p, k = ||m' - m|| / std: the bound that the documentation states."""
    table, conditioning, trajectory = sampled(policy, torch.bfloat16, reduction="sum")
    rows, columns = pairs(trajectory, torch.arange(6 * len(trajectory.steps)))
    with policy.precision(torch.bfloat16):
        drew, target = replay(policy, table, trajectory, rows, columns, conditioning, 2.0, False)
    trains, _ = replay(policy, table, trajectory, rows, columns, conditioning, 2.0, False)
    k = ((trains.mean - drew.mean) / drew.std).double().flatten(1).norm(dim=1)
    mismatch = (trains.log_prob(target, "sum") - drew.log_prob(target, "sum")).double()
    assert (mismatch.abs() <= 4.5 * k + k**2 / 2 + 1e-4).all()  # 4.5 deviations: one of 150,000
    assert mismatch.abs().mean() <= 1.4 * (2 / torch.pi) ** 0.5 * k.square().mean().sqrt()


def test_the_rollouts_precision_is_nobody_elses(settings, tmp_path):
    """What is evaluated, and the evaluation's images, are those of a run that samples as it trains."""
    _, plain = run(settings, tmp_path / "plain")
    _, half = run(settings, tmp_path / "half", rollout={"dtype": "bfloat16"})
    assert plain[0] == half[0]
    assert plain[1] != half[1]


def test_scoring_again_changes_nothing_where_rollout_and_replay_have_the_same_bits(settings, tmp_path):
    equal = {"sampling": {"num_steps": 1}, "rollout": {"batch_size": 4}}
    steps = {"updates_per_epoch": 1, "batch_size": 4, "num_inner_epochs": 2}
    first, _ = run(settings, tmp_path / "rollout", objective=steps, **equal)
    again, _ = run(settings, tmp_path / "replay", objective={**steps, "old_log_prob": "replay"}, **equal)
    assert same(weights(first), weights(again))


def test_settings_that_contradict_one_another_are_one_sentence(settings):
    with pytest.raises(EtudeError, match=r"rollout\.dtype = float16 needs weights in float32"):
        parse_config({"dtype": "bfloat16", "rollout": {"dtype": "float16"}})
    assert parse_config({"dtype": "bfloat16", "rollout": {"dtype": "bfloat16"}}).rollout.dtype == "bfloat16"

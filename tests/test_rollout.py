"""Rollout and replay: one function, one set of bits."""

from __future__ import annotations

import pytest
import torch

from etude.config import LoraConfig
from etude.kernels import GDDIM
from etude.objectives import ppo_loss
from etude.plans import SamplingPlan
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.rollout import NoiseSource, replay, rollout
from tiny import stable_diffusion

PROMPTS = ["red heart", "pizza", "tiger", "sun", "moon", "car"]


@pytest.fixture(scope="module")
def policy():
    policy = StableDiffusionPolicy(stable_diffusion())
    policy.add_lora(LoraConfig(), seed=0)
    return policy


def make_rollout(policy, plan, batch_size=6, samples=None, seed=0, **kwargs):
    samples = samples if samples is not None else list(range(len(PROMPTS)))
    table = plan.tabulate(policy.grid(plan.grid_size))
    conditioning = policy.encode([PROMPTS[i] for i in samples])
    noise = NoiseSource(seed, "training", iteration=1)
    return table, conditioning, rollout(policy, table, conditioning, noise, samples, 5.0, batch_size, **kwargs)


@pytest.mark.parametrize("eta", [0.5, 1.2, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_ratio_of_the_first_update_is_exactly_one_at_equal_batch_shape(policy, eta, reduction):
    plan = SamplingPlan.sde(8, GDDIM(eta))
    table, conditioning, trajectory = make_rollout(policy, plan, reduction=reduction)
    rows = torch.tensor([4, 1, 0, 5, 2, 3])
    columns = torch.tensor([7, 0, 3, 3, 1, 5])
    transition, target = replay(policy, table, trajectory, rows, columns, conditioning, 5.0)
    log_prob = transition.log_prob(target, reduction)
    assert torch.equal(log_prob, trajectory.log_prob[rows, columns])
    loss = ppo_loss(log_prob, trajectory.log_prob[rows, columns], torch.ones(6), 1e-4, 5.0)
    assert (loss.ratio == 1).all()


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_the_ratio_of_the_first_update_is_one_to_1e_5_at_any_micro_batch(policy, micro_batch):
    table, conditioning, trajectory = make_rollout(policy, SamplingPlan.sde(8, GDDIM(1.2)))
    rows, columns = torch.arange(6).repeat(8), torch.arange(8).repeat_interleave(6)
    for row, column in zip(rows.split(micro_batch), columns.split(micro_batch), strict=True):
        transition, target = replay(policy, table, trajectory, row, column, conditioning, 5.0, with_gradient=False)
        ratio = (transition.log_prob(target) - trajectory.log_prob[row, column]).exp()
        assert (ratio - 1).abs().max() < 1e-5


def test_images_do_not_depend_on_the_batch_size_or_on_who_else_is_sampled(policy):
    plan = SamplingPlan.sde(5, GDDIM(1.2))
    _, _, whole = make_rollout(policy, plan)
    _, _, small = make_rollout(policy, plan, batch_size=4)
    _, _, some = make_rollout(policy, plan, samples=[5, 2])
    assert torch.allclose(whole.latents, small.latents, atol=1e-5)
    assert torch.allclose(whole.latents[[5, 2]], some.latents, atol=1e-5)


def test_the_trajectory_holds_the_trained_steps_and_no_more(policy):
    _, _, full = make_rollout(policy, SamplingPlan.sde(8, GDDIM(1.2)))
    _, _, window = make_rollout(policy, SamplingPlan.window(8, GDDIM(1.2), start=3, size=2))
    _, _, ode = make_rollout(policy, SamplingPlan.ode(8))
    assert full.states.shape[1] == 9
    assert window.states.shape[1] == 3
    assert window.steps == (3, 4)
    assert ode.states.shape[1] == 0
    assert ode.log_prob.shape == (6, 0)


def test_stored_states_follow_the_transitions(policy):
    table, conditioning, trajectory = make_rollout(policy, SamplingPlan.sde(4, GDDIM(0.7)))
    noise = NoiseSource(0, "training", iteration=1)
    for step in range(4):
        column = torch.full((6,), step)
        transition, target = replay(policy, table, trajectory, torch.arange(6), column, conditioning, 5.0, False)
        assert torch.equal(target, transition.sample(noise.step(list(range(6)), step, policy.latent_shape)))
    assert torch.equal(trajectory.states[:, -1], trajectory.latents)


def test_a_policy_that_has_not_moved_has_no_kl_to_its_reference(policy):
    _, _, trajectory = make_rollout(policy, SamplingPlan.sde(4, GDDIM(1.0)), with_reference=True)
    table, conditioning, _ = make_rollout(policy, SamplingPlan.sde(4, GDDIM(1.0)))
    transition, _ = replay(policy, table, trajectory, torch.arange(6), torch.zeros(6).long(), conditioning, 5.0, False)
    assert torch.equal(trajectory.reference_mean[:, 0], transition.mean)

"""Rollout and replay: one function, one set of bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.learning.objectives.ppo import ppo_loss
from etude.policies.flux import FluxPolicy
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.sampling.kernels import GDDIM
from etude.sampling.model import Conditioning
from etude.sampling.noise import NoiseSource
from etude.sampling.paths import FlowPath, VPPath
from etude.sampling.plans import SamplingPlan
from etude.sampling.replay import replay
from etude.sampling.rollout import Trajectory, rollout
from support.tiny import flux, stable_diffusion

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
    assert (loss.records["ratio"] == 1).all()


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
    _, _, trajectory = make_rollout(policy, SamplingPlan.sde(4, GDDIM(1.0)), reference=policy.reference)
    table, conditioning, _ = make_rollout(policy, SamplingPlan.sde(4, GDDIM(1.0)))
    transition, _ = replay(policy, table, trajectory, torch.arange(6), torch.zeros(6).long(), conditioning, 5.0, False)
    assert torch.equal(trajectory.reference_mean[:, 0], transition.mean)


GROUPS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
WINDOW = SamplingPlan.window(8, GDDIM(1.2), start=3, size=2)
FLASH = SamplingPlan.window(8, GDDIM(1.2), start=3, size=2, compression=0.4)


@pytest.fixture(scope="module")
def flux_policy():
    policy = FluxPolicy(flux())
    policy.add_lora(LoraConfig(), seed=0)
    return policy


def group_rollout(policy, plan, batch_size, share_prefix, groups=GROUPS, prompts=None, **kwargs):
    table = plan.tabulate(policy.grid(plan.grid_size))
    conditioning = policy.encode(prompts or [PROMPTS[g] for g in groups])
    samples, noise = list(range(100, 100 + len(groups))), NoiseSource(0, "training", iteration=3)
    told = prompts or groups
    shared = {"noise_samples": groups, "prompts": told if share_prefix else None}
    return rollout(policy, table, conditioning, noise, samples, 2.0, batch_size, **shared, **kwargs)


def assert_same(one, other, **tolerance):
    for name in ("latents", "states", "log_prob", "reference_mean"):
        first, second = getattr(one, name), getattr(other, name)
        assert torch.equal(first, second) if not tolerance else torch.allclose(first, second, **tolerance), name


@pytest.mark.parametrize("plan", [WINDOW, FLASH], ids=["window", "flash"])
@pytest.mark.parametrize("kind", ["policy", "flux_policy"])
def test_a_shared_prefix_gives_the_same_bits_in_batches_of_the_same_size(kind, plan, request):
    policy = request.getfixturevalue(kind)
    one, other = (group_rollout(policy, plan, 4, share, reference=policy.reference) for share in (True, False))
    assert_same(one, other)
    assert torch.equal(one.states[0::3, 0], one.states[1::3, 0])  # a group is one path until the window
    assert not torch.equal(one.latents[0], one.latents[1])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_a_shared_prefix_gives_the_same_images_in_any_batches(policy, batch_size):
    """A group of 3 in batches of 1, 2 and 5: smaller than the group, and across its borders."""
    one = group_rollout(policy, FLASH, batch_size, True, reference=policy.reference)
    other = group_rollout(policy, FLASH, 4, False, reference=policy.reference)
    assert_same(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("plan", "shared", "own"),
    [(WINDOW, 3, 5), (FLASH, 3, 3), (SamplingPlan.ode(4), 4, 0), (SamplingPlan.sde(4, GDDIM(1.0)), 1, 3)],
)
def test_the_network_sees_each_group_once_before_the_first_stochastic_step(
    flux_policy, plan, shared, own, share, monkeypatch
):
    """Rows that the network sees, and the steps of images that are reported. Out of pure noise the SDE's first step is the ODE's."""
    seen, reported = [], []
    predict = flux_policy.predict
    monkeypatch.setattr(flux_policy, "predict", lambda x, *rest: seen.append(len(x)) or predict(x, *rest))
    group_rollout(flux_policy, plan, 5, share, on_step=reported.append)
    assert sum(seen) == (4 * shared + 12 * own if share else 12 * (shared + own))
    assert max(seen) <= 5
    assert sum(reported) == 12 * (shared + own)


def test_only_equal_prompts_share_a_prefix(policy):
    prompts = ["sun", "moon", "sun", "moon", "sun", "car"]
    one, other = (group_rollout(policy, WINDOW, 3, share, [7, 7, 7, 7, 8, 7], prompts) for share in (True, False))
    assert torch.allclose(one.latents, other.latents, atol=2e-5)
    starts = one.states[:, 0]
    assert torch.equal(starts[0], starts[2])
    assert torch.equal(starts[1], starts[3])
    assert len(torch.unique(starts, dim=0)) == 4


def test_without_keys_of_their_own_all_images_start_from_different_noise(policy):
    _, _, trajectory = make_rollout(policy, WINDOW)
    assert len(torch.unique(trajectory.states[:, 0], dim=0)) == 6


def test_keys_that_do_not_fit_the_samples_are_an_error(policy):
    with pytest.raises(EtudeError, match="2 keys of the initial noise do not fit 6 samples"):
        make_rollout(policy, WINDOW, noise_samples=[0, 1])


def test_the_ratio_after_a_shared_prefix_and_before_a_tail_is_exactly_one(flux_policy):
    trajectory = group_rollout(flux_policy, FLASH, 4, True)
    table, conditioning = FLASH.tabulate(flux_policy.grid(8)), flux_policy.encode([PROMPTS[g] for g in GROUPS])
    assert trajectory.states.shape[1] == 3
    rows, columns = torch.tensor([4, 0, 9, 11]), torch.tensor([0, 1, 1, 0])
    transition, target = replay(flux_policy, table, trajectory, rows, columns, conditioning, 2.0)
    assert torch.equal(transition.log_prob(target), trajectory.log_prob[rows, columns])


def test_a_replay_reads_nothing_back_from_the_device():
    """On the meta device any value read back (item, cpu, a branch on a tensor) is an error."""
    policy = SimpleNamespace(predict=lambda x, *_: 0.5 * x, prediction_type="epsilon", path=None)
    table = WINDOW.tabulate(VPPath.from_config({}).grid(8)).to("meta")
    states, index = torch.empty(6, 3, 4, 8, 8, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    trajectory = Trajectory(states[:, 0], (3, 4), states, torch.empty(6, 2, device="meta"), index, index, (3, 4, 5))
    rows = torch.zeros(5, dtype=torch.int64, device="meta")
    conditioning = Conditioning({"prompt": torch.empty(6, 7, device="meta")}, {})
    transition, target = replay(policy, table, trajectory, rows, rows, conditioning, 5.0)
    assert transition.log_prob(target).shape == (5,)


@pytest.mark.parametrize("path", [VPPath.from_config({}), FlowPath.from_config({"shift": 3.0})], ids=["vp", "flow"])
def test_a_rollout_with_a_shared_prefix_and_a_solvers_tail_reads_nothing_back_from_the_device(path):
    policy = SimpleNamespace(
        predict=lambda x, *_: 0.5 * x, prediction_type=path.prediction_type, path=path, latent_shape=(4, 8, 8)
    )
    policy.device, policy.denoiser, policy.computing_dtype = torch.device("meta"), "network", torch.float32
    table = FLASH.tabulate(path.grid(8)).to("meta")
    conditioning = Conditioning({"prompt": torch.empty(12, 7, device="meta")}, {})
    told = {"noise_samples": GROUPS, "prompts": GROUPS}
    found = rollout(policy, table, conditioning, NoiseSource(0, "training", 1), list(range(12)), 2.0, 5, **told)
    assert found.states.shape == (12, 3, 4, 8, 8)
    assert found.latents.device.type == "meta"

"""Gradients that the rollout takes are those of each image alone, and an update with them is the replay's."""

from __future__ import annotations

import json

import pytest
import torch

from etude.config import LoraConfig, load_config, parse_config
from etude.errors import EtudeError
from etude.policies.flux import FluxPolicy
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.sampling.kernels import GDDIM
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan
from etude.sampling.replay import replay
from etude.sampling.rollout import rollout
from etude.sampling.sample_gradients import SampleGradients
from etude.training.trainer import Trainer
from support.small_runs import brief_settings, metrics, weights
from support.tiny import flux, stable_diffusion

PROMPTS = ["red heart", "pizza", "sun"]


def trainable(policy, seed=0):
    """The policy with an adapter whose both matrices are random, so that no gradient is 0."""
    targets = ["to_q", "to_v", "proj_in"] if policy.denoiser == "unet" else ["to_q", "to_v"]
    policy.add_lora(LoraConfig(targets=targets), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return policy


def drawn(policy, batch_size, gradients=None):
    table = SamplingPlan.sde(4, GDDIM(1.2)).tabulate(policy.grid(4))
    keys, conditioning = list(range(len(PROMPTS))), policy.encode(PROMPTS)
    trajectory = rollout(
        policy, table, conditioning, NoiseSource(0, "training"), keys, 3.0, batch_size, gradients=gradients
    )
    return table, conditioning, trajectory


POLICIES = {
    "guided UNet": lambda: StableDiffusionPolicy(stable_diffusion()),
    "transformer": lambda: FluxPolicy(flux()),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_each_image_gets_the_gradient_of_its_own_log_probabilities_and_the_images_stay(name, checkpointing):
    policy = trainable(POLICIES[name]())
    plain = drawn(policy, 2)[2]
    if checkpointing:
        policy.enable_gradient_checkpointing()
        policy.network.train()  # diffusers checkpoints in training mode alone
    parameters = policy.trainable()
    gradients = SampleGradients(policy.network, parameters, len(PROMPTS))
    table, conditioning, trajectory = drawn(policy, 2, gradients)
    assert torch.equal(trajectory.latents, plain.latents)
    assert torch.equal(trajectory.log_prob, plain.log_prob)
    columns = torch.arange(len(trajectory.steps))
    for image in range(len(PROMPTS)):
        rows = torch.full_like(columns, image)
        transition, target = replay(policy, table, trajectory, rows, columns, conditioning, 3.0)
        expected = torch.autograd.grad(transition.log_prob(target).sum(), list(parameters.values()))
        for value, own in zip(expected, gradients.values.values(), strict=True):
            assert value.abs().max() > 0
            assert torch.allclose(own[image], value, rtol=1e-3, atol=1e-4 * value.abs().max())


def test_rows_that_are_drawn_again_count_once():
    policy = trainable(POLICIES["guided UNet"]())
    once, twice = (SampleGradients(policy.network, policy.trainable(), len(PROMPTS)) for _ in range(2))
    drawn(policy, 3, once)
    drawn(policy, 3, twice)
    drawn(policy, 3, twice)
    assert all(torch.equal(value, twice.values[name]) for name, value in once.values.items())


def test_a_parameter_of_another_layer_is_refused():
    policy = StableDiffusionPolicy(stable_diffusion())
    policy.train_everything(keep_reference=False)
    with pytest.raises(
        EtudeError, match=r"objective\.gradients = rollout needs trained weights of linear layers and 1 x 1"
    ):
        SampleGradients(policy.network, policy.trainable(), 2)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    tree = brief_settings(tmp_path_factory.mktemp("model"))
    tree["objective"] |= {"updates_per_epoch": 1}
    return tree | {"optimizer": {"learning_rate": 1e-3}}


@pytest.mark.parametrize("kind", ["ppo", "reinforce"])
def test_an_update_without_a_second_forward_is_that_of_the_replay(settings, tmp_path, kind):
    trainers = {}
    for gradients in ("replay", "rollout"):
        objective = settings["objective"] | {"kind": kind, "gradients": gradients}
        trainers[gradients] = Trainer(parse_config({**settings, "objective": objective}), tmp_path / gradients)
    calls, predict = [], trainers["rollout"].policy.predict
    trainers["rollout"].policy.predict = lambda x, *rest: calls.append(len(x)) or predict(x, *rest)
    for trainer in trainers.values():
        trainer.train()
    drawn, evaluated = 2 * 4 * 3, 2 * 2 * 4 * 3
    assert sum(calls) == drawn + evaluated
    ours, theirs = (metrics(tmp_path / name)[1:] for name in ("rollout", "replay"))
    assert ours[0].keys() == theirs[0].keys()
    for own, other in zip(ours, theirs, strict=True):
        assert own["ratio_max_deviation"] == 0
        assert other["ratio_max_deviation"] < 1e-5
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)
    for name, value in weights(trainers["replay"]).items():
        assert torch.allclose(value, weights(trainers["rollout"])[name], atol=2e-5)
    assert json.loads((tmp_path / "rollout" / "summary.json").read_text())["iterations"] == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["objective.updates_per_epoch=2"], r"gradients = rollout needs updates_per_epoch = 1"),
        (["objective.old_log_prob=replay"], r"gradients = rollout needs old_log_prob = rollout"),
        (["lora.rank=0"], r"does not go with lora\.rank = 0"),
        (["compile=full"], r"does not go with compile = full"),
        (["objective.kl_coef=0.1"], r"for ppo and reinforce without a KL"),
    ],
)
def test_what_needs_a_second_forward_is_refused_in_a_sentence(changes, says, tmp_path):
    sets = ["objective.updates_per_epoch=1", "objective.gradients=rollout", *changes]
    with pytest.raises(EtudeError, match=says):
        Trainer(load_config("emoji-ddpo", sets), tmp_path / "run")

"""Training beside float16 weights: the loss is scaled by a power of two that leaves no trace where nothing under- or overflows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from etude.config import LoraConfig, parse_config
from etude.learning.loss_scale import LossScale
from etude.policies.flux import FluxPolicy
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.policies.stable_diffusion_3 import StableDiffusion3Policy
from etude.policies.stable_diffusion_xl import StableDiffusionXLPolicy
from etude.training.trainer import Trainer
from support.small_runs import brief_settings, outcome, same, weights
from support.tiny import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

FAMILIES = {
    "stable-diffusion": (StableDiffusionPolicy, stable_diffusion),
    "stable-diffusion-xl": (StableDiffusionXLPolicy, stable_diffusion_xl),
    "stable-diffusion-3": (StableDiffusion3Policy, stable_diffusion_3),
    "flux": (FluxPolicy, flux),
}


def gradients(policy, scale, small):
    """Of a loss whose gradients are `small` at the network's output, taken at a scale that is taken back."""
    policy.add_lora(LoraConfig(rank=2, alpha=2.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    output = policy.predict(x, policy.grid(4).timesteps[1:3], policy.encode(["red heart", "pizza"]), 3.0)
    (output.square().sum() * small * scale).backward()
    found = {name: parameter.grad / scale for name, parameter in policy.trainable().items()}
    return torch.cat([g.flatten() for g in found.values()])


@pytest.mark.parametrize("name", FAMILIES)
def test_scaled_float16_gradients_are_those_of_float32_and_unscaled_ones_vanish(name):
    adapter, pipeline = FAMILIES[name]
    small = 2.0**-24
    exact = gradients(adapter(pipeline()), 1.0, small)
    scaled = gradients(adapter(pipeline(), dtype=torch.float16), 2.0**24, small)
    lost = gradients(adapter(pipeline(), dtype=torch.float16), 1.0, small)
    assert scaled.dtype == torch.float32
    assert (scaled - exact).norm() < 0.02 * exact.norm()
    assert (lost - exact).norm() > 0.5 * exact.norm()


def parameter(gradient):
    made = nn.Parameter(torch.zeros(len(gradient)))
    made.grad = torch.tensor(gradient)
    return made


def test_the_scale_is_the_power_of_two_next_to_the_numbers_that_the_loss_averages():
    scale = LossScale(True, dimensions=1000)
    scale.begin_step(pairs=7)
    assert scale.value == 8192  # 7000
    assert scale.take_back([trained := parameter([8192.0, 1.0])])
    assert trained.grad.tolist() == [1.0, 1 / 8192]
    scale.begin_step(pairs=10**9)
    assert scale.value == 2.0**32


def test_an_overflow_lowers_the_scale_until_the_iteration_ends():
    scale = LossScale(True, dimensions=1024)
    scale.begin_step(1)
    assert not scale.take_back([parameter([1.0, float("inf")])])
    scale.begin_step(1)
    assert scale.value == 64
    assert not scale.take_back([parameter([float("nan")])])
    scale.begin_step(1)
    assert scale.value == 4
    scale.begin_iteration()
    scale.begin_step(1)
    assert scale.value == 1024


def test_gradients_that_overflow_unscaled_are_left_to_the_one_who_asks_for_their_norm():
    scale = LossScale(True, dimensions=1)
    scale.begin_step(1)
    assert scale.take_back([parameter([float("inf")])])


def test_one_process_that_overflows_makes_all_of_them_repeat():
    scale = LossScale(True, 4, agree=lambda finite: torch.tensor(False))
    scale.begin_step(1)
    assert not scale.take_back([parameter([1.0])])


def test_without_need_nothing_is_scaled_or_asked():
    scale = LossScale(False, dimensions=1000)
    scale.begin_step(7)
    assert scale.value == 1
    assert scale.take_back([trained := parameter([float("inf"), 2.0])])
    assert trained.grad[1] == 2


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return brief_settings(tmp_path_factory.mktemp("model"))


def test_a_scaled_run_in_float32_is_the_unscaled_one_bit_for_bit(settings, tmp_path):
    trainers = [Trainer(parse_config({**settings, "iterations": 1}), tmp_path / name) for name in ("plain", "scaled")]
    trainers[1].learner.loss_scale.needed = True
    for trainer in trainers:
        trainer.train()
    assert trainers[1].learner.loss_scale.value == 512  # 64 dimensions, 2 images of 3 steps: 384
    assert outcome(tmp_path / "plain") == outcome(tmp_path / "scaled")


def test_a_float16_run_survives_an_overflow_by_repeating_the_step_at_a_smaller_scale(settings, tmp_path, monkeypatch):
    trainer = Trainer(parse_config({**settings, "dtype": "float16"}), tmp_path / "run")
    before, scales, backward = weights(trainer), [], trainer.accelerator.backward

    def overflowing(loss):
        scales.append(trainer.learner.loss_scale.value)
        backward(loss * float("inf") if scales[-1] > 100 else loss)

    monkeypatch.setattr(trainer.accelerator, "backward", overflowing)
    trainer.train()
    assert scales == [512, 32, 32, 512, 32, 32]  # the iteration's second step does not try again
    assert not same(before, weights(trainer))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters.values())

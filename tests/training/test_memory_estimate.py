"""The estimated memory is that of the things themselves, and the activations those that the same operations make in earnest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from etude.config import OptimizerConfig, parse_config
from etude.learning.optimizers import make_optimizer
from etude.sampling.noise import NoiseSource
from etude.sampling.rollout import rollout
from etude.training import memory_estimate as module
from etude.training.dry_run import outlined
from etude.training.memory_estimate import (
    _Live,
    optimizer_bytes,
    peak_bytes,
    readable,
    trajectory_floats,
)
from etude.training.trainer import Trainer
from support.adapters import peft, write
from support.tiny import flux, save_flux, save_stable_diffusion, stable_diffusion


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("model")
    (root / "prompts.txt").write_text("red heart\npizza\n")
    save_flux(root / "flux")
    return {
        "model": str(save_stable_diffusion(root / "sd")),
        "iterations": 3,
        "rewards": {"colorfulness": 1.0},
        "prompts": {"train": str(root / "prompts.txt"), "evaluation": str(root / "prompts.txt")},
        "sampling": {"eta": 1.2, "num_steps": 6, "guidance_scale": 3.5},
        "rollout": {"images_per_iteration": 6, "images_per_prompt": 3, "batch_size": 6},
        "objective": {"batch_size": 4},
        "advantage": {"kind": "group"},
        "evaluation": {"num_images": 4},
    }


def trainer(settings: dict[str, Any], tmp_path: Any, **sections: Any) -> Trainer:
    tree = {**settings}
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return Trainer(parse_config(tree), tmp_path / "run")


def memory_estimate(made: Trainer) -> dict[str, int]:
    return module.memory_estimate(made.blueprint, made.policy, made.schedule)


def activations(made: Trainer) -> dict[str, int]:
    return module.activations(made.config, made.policy, made.schedule.table_at(1), ["red heart"])


@pytest.mark.parametrize("window", [None, {"size": 2}])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_trajectory_takes_what_its_tensors_take(settings, tmp_path, window, kl_coef):
    made = trainer(settings, tmp_path, sampling={"window": window}, objective={"kl_coef": kl_coef})
    policy, table = made.policy, made.schedule.table_at(1)
    prompts = ["red heart"] * 6
    reference = policy.reference if kl_coef > 0 else None
    stored = rollout(
        policy, table, policy.encode(prompts), NoiseSource(0, "t"), list(range(6)), 3.5, 6, reference=reference
    )
    tensors = [stored.latents, stored.states, stored.log_prob]
    tensors += [stored.reference_mean] if kl_coef else []
    taken = sum(tensor.nbytes for tensor in tensors)
    assert 6 * 4 * trajectory_floats(table, policy.dimensions, kl_coef > 0) == taken
    assert memory_estimate(made)["trajectory of 6 images"] == taken


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_the_optimiser_state_takes_what_its_moments_take(kind):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((96, 96), (70, 70), (4,))]
    config = OptimizerConfig(kind=kind)
    optimizer = make_optimizer(config, parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moments = {"exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2"}
    taken = sum(v.nbytes for state in optimizer.state.values() for k, v in state.items() if k in moments)
    assert optimizer_bytes(parameters, config) == taken


def test_weights_are_those_of_every_part_that_stays_on_the_device(settings, tmp_path):
    made = trainer(settings, tmp_path)
    estimate, components = memory_estimate(made), made.policy.pipeline.components
    size = {
        name: sum(t.nbytes for t in [*part.parameters(), *part.buffers()])
        for name, part in components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert estimate["frozen weights"] + estimate["adapter"] == sum(size.values())
    assert estimate["gradients"] == estimate["adapter"] == sum(p.nbytes for p in made.parameters.values())
    assert sum(list(estimate.values())[:-1]) == estimate["in all, roughly"]
    offloaded = memory_estimate(trainer(settings, tmp_path, memory={"offload": True}))
    assert offloaded["frozen weights"] + offloaded["adapter"] == size["unet"]


def test_full_fine_tuning_with_a_kl_and_an_average_holds_the_network_three_times(settings, tmp_path):
    made = trainer(settings, tmp_path, lora={"rank": 0}, objective={"kl_coef": 0.1}, ema={"decay": 0.9})
    estimate, network = memory_estimate(made), sum(p.nbytes for p in made.policy.network.parameters())
    names = ["trained weights", "gradients", "moving average", "copy of the model before training"]
    assert {estimate[name] for name in names} == {network}
    assert estimate["optimiser state (adamw)"] == 2 * network


def test_the_peak_is_the_most_alive_at_once_and_views_are_free():
    def work():
        first = torch.ones(1000)  # 4,000 bytes
        first.add_(1).reshape(10, 100).t()
        second = first * 2  # 8,000 alive
        del first
        third = second + 1  # 8,000 again
        del second, third
        return torch.ones(500)

    assert peak_bytes(work) == 8000


def test_under_autocast_norms_count_as_a_gpu_computes_them_in_float32():
    norm = torch.nn.GroupNorm(1, 4).requires_grad_(False)

    def work():
        x = torch.ones(10, 4, 25, dtype=torch.bfloat16)  # 2,000 bytes
        with torch.autocast("cpu", torch.bfloat16):
            return x, norm(x)

    # 4,000 for the input in float32, as much for the result, and a mean and a deviation of each sample.
    assert peak_bytes(work) == 2000 + 4000 + 4000 + 2 * 10 * 4


@pytest.mark.parametrize("model", ["sd", "flux"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_activations_are_those_of_a_real_replay(settings, tmp_path, model, checkpointing):
    model = settings["model"].removesuffix("sd") + model
    made = trainer(settings, tmp_path, model=model, memory={"gradient_checkpointing": checkpointing})
    policy = made.policy
    told = policy.encode(["red heart"] * 4)
    before = {name: value.clone() for name, value in policy.network.state_dict().items()}
    fake = activations(made)["replay of 4"]
    assert all(p.grad is None for p in policy.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in policy.network.state_dict().items())
    with _Live() as live:
        x = torch.randn(4, *policy.latent_shape)
        output = policy.predict(x, made.schedule.table_at(1).timesteps[:1].expand(4), told, 3.5)
        torch.autograd.grad(output.square().mean(), list(made.parameters.values()))
        del output, x
    assert fake == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("model", ["sd", "flux"])
def test_a_dry_run_counts_a_dora_that_is_trained_on_as_the_run_does(settings, tmp_path, model):
    pipeline, part = (stable_diffusion(), "unet") if model == "sd" else (flux(), "transformer")
    adapter = write(tmp_path / "dora", peft(getattr(pipeline, part), part, use_dora=True)[0])
    tree = {**settings, "model": settings["model"].removesuffix("sd") + model, "lora": {"init": str(adapter)}}
    blueprint, outline, schedule = outlined(parse_config(tree), tmp_path / "run")
    made = trainer(tree, tmp_path)
    assert any("magnitude" in name for name in made.parameters)
    shapes = {name: (p.shape, p.dtype) for name, p in outline.trainable().items()}
    assert shapes == {name: (p.shape, p.dtype) for name, p in made.parameters.items()}
    assert module.memory_estimate(blueprint, outline, schedule) == memory_estimate(made)


def test_checkpointing_and_small_micro_batches_take_less(settings, tmp_path):
    plain = activations(trainer(settings, tmp_path))
    checkpointed = activations(trainer(settings, tmp_path, memory={"gradient_checkpointing": True}))
    halved = activations(trainer(settings, tmp_path, objective={"batch_size": 2}))
    assert checkpointed["replay of 4"] < 0.8 * plain["replay of 4"]
    assert halved["replay of 2"] < 0.6 * plain["replay of 4"]
    assert plain["rollout of 6"] == checkpointed["rollout of 6"] == halved["rollout of 6"]


def test_an_offloaded_part_counts_while_it_visits(settings, tmp_path):
    stays, visits = (activations(trainer(settings, tmp_path, memory={"offload": o})) for o in (False, True))
    vae = trainer(settings, tmp_path).policy.pipeline.vae
    assert visits["decoding of 6"] - stays["decoding of 6"] == sum(p.nbytes for p in vae.parameters())
    assert "encoding prompts" in visits
    assert "encoding prompts" not in stays


@pytest.mark.parametrize(("size", "says"), [(2**20, "1.0 MiB"), (2**30, "1.0 GiB"), (3 * 2**29, "1.5 GiB")])
def test_sizes_are_said_in_binary_units(size, says):
    assert readable(size) == says

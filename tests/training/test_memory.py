"""What saves memory changes no result: gradient checkpointing, half precision beside adapters, offloading, 8-bit optimiser state."""

from __future__ import annotations

import sys

import pytest
import torch

from etude.config import LoraConfig, OptimizerConfig, parse_config
from etude.errors import EtudeError
from etude.learning.optimizers import load_optimizer_tensors, make_optimizer, optimizer_tensors
from etude.policies.flux import FluxPolicy
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.policies.stable_diffusion_3 import StableDiffusion3Policy
from etude.policies.stable_diffusion_xl import StableDiffusionXLPolicy
from etude.training.trainer import Trainer
from support.gaussian_policy import GaussianPolicy, flow_path
from support.small_runs import brief_settings, metrics
from support.tiny import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

FAMILIES = {
    "stable-diffusion": (StableDiffusionPolicy, stable_diffusion),
    "stable-diffusion-xl": (StableDiffusionXLPolicy, stable_diffusion_xl),
    "stable-diffusion-3": (StableDiffusion3Policy, stable_diffusion_3),
    "flux": (FluxPolicy, flux),
}
PROMPTS = ["red heart", "pizza"]


@pytest.fixture(params=list(FAMILIES))
def family(request):
    adapter, pipeline = FAMILIES[request.param]
    return lambda **options: adapter(pipeline(), **options)


def adapted(policy, checkpointed=False):
    """With an adapter that is no longer zero."""
    if checkpointed:
        policy.enable_gradient_checkpointing()
    policy.add_lora(LoraConfig(rank=2, alpha=2.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def gradients(policy):
    """Of a loss of predictions with guidance, and how often a layer in the middle of the network was evaluated."""
    layers = [module for name, module in policy.network.named_modules() if name.endswith("to_q")]
    calls = []
    layers[len(layers) // 2].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    output = policy.predict(x, policy.grid(4).timesteps[1:3], policy.encode(PROMPTS), 3.0)
    output.square().mean().backward()
    return {name: parameter.grad for name, parameter in policy.trainable().items()}, len(calls)


def test_checkpointed_gradients_are_the_gradients(family):
    (plain, once), (checkpointed, twice) = gradients(adapted(family())), gradients(adapted(family(), True))
    assert (once, twice) == (1, 2)  # computed again on the way back
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_beside_bfloat16_weights_are_float32_and_point_the_same_way(family, checkpointed):
    exact, _ = gradients(adapted(family()))
    found, _ = gradients(adapted(family(dtype=torch.bfloat16), checkpointed))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    one, other = (torch.cat([g.flatten() for g in each.values()]) for each in (found, exact))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.95


def test_a_policy_without_checkpointing_says_so():
    with pytest.raises(EtudeError, match=r"leave memory\.gradient_checkpointing off"):
        GaussianPolicy(0.0, 1.0, flow_path()).enable_gradient_checkpointing()


def watched(policy, monkeypatch):
    """Where each part of the pipeline is sent, `(component, device)`: a torch.device is the policy's own, "cpu" is the waiting room."""
    names = {id(part): name for name, part in policy.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    sent = []
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda module, device: sent.append((names[id(module)], device)) or module
    )
    return sent


def test_offloaded_parts_are_on_the_device_only_while_they_work(family, monkeypatch):
    policy, plain = family(offload=True), family()
    latents = torch.randn(3, *policy.latent_shape)
    expected = plain.encode(PROMPTS), plain.decode(latents)
    sent = watched(policy, monkeypatch)
    device, encoders = policy.device, [name for name in policy.pipeline.components if name.startswith("text_encoder")]
    encoders = [name for name in encoders if getattr(policy.pipeline, name) is not None]
    told = policy.encode(PROMPTS)
    assert sent == [*((name, device) for name in encoders), *((name, "cpu") for name in encoders)]
    sent.clear()
    policy.encode(PROMPTS[::-1])
    assert sent == []  # nothing is left to encode
    pictures = policy.decode(latents)
    assert sent == [("vae", device), ("vae", "cpu")]
    assert torch.equal(pictures, expected[1])
    assert all(torch.equal(rows, expected[0].prompt[name]) for name, rows in told.prompt.items())


def test_an_offloaded_part_comes_back_after_a_failure(monkeypatch):
    policy = StableDiffusionPolicy(stable_diffusion(), offload=True)
    sent = watched(policy, monkeypatch)
    with pytest.raises(RuntimeError):
        policy.decode(torch.randn(1, 3, 4, 4))  # three channels where there are four
    assert sent[-1] == ("vae", "cpu")


def test_loading_offloaded_sends_only_the_denoiser_to_the_device(family, monkeypatch):
    sent, to = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *a, **k: sent.append(type(module)) or to(module, *a, **k))
    policy = family(offload=True)
    assert set(sent) == {type(policy.network)}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return brief_settings(tmp_path_factory.mktemp("model"))


def run(settings, out, **sections):
    trainer = Trainer(parse_config({**settings, **sections}), out)
    trainer.train()
    return trainer, metrics(out)


def test_a_run_that_saves_memory_is_the_same_run_bit_for_bit(settings, tmp_path):
    plain, logged = run(settings, tmp_path / "plain")
    memory = {"gradient_checkpointing": True, "offload": True, "decode_batch_size": 32}
    saving, also = run(settings, tmp_path / "saving", memory=memory)
    assert saving.policy.offload
    assert logged == also
    assert all(torch.equal(p, plain.parameters[name]) for name, p in saving.parameters.items())


def test_an_offloading_run_encodes_every_prompt_before_it_draws(settings, tmp_path, monkeypatch):
    trainer = Trainer(parse_config({**settings, "memory": {"offload": True}}), tmp_path)
    policy, events = trainer.policy, []
    encode, predict = policy._encode_key, policy.predict
    monkeypatch.setattr(policy, "_encode_key", lambda prompt: events.append("encode") or encode(prompt))
    monkeypatch.setattr(policy, "predict", lambda *arguments: events.append("draw") or predict(*arguments))
    trainer.train()
    assert "encode" not in events[events.index("draw") :]


def test_the_decode_batch_size_is_the_configurations(settings, tmp_path):
    trainer = Trainer(parse_config({**settings, "memory": {"decode_batch_size": 3}}), tmp_path)
    assert trainer.policy.decode_batch.size == 3
    assert trainer.policy.decode_batch.setting == "memory.decode_batch_size"


def test_a_missing_bitsandbytes_is_named_before_a_model_is_loaded(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("etude.learning.optimizers.find_spec", lambda name: None)
    config = parse_config({**settings, "model": "no/such/model", "optimizer": {"kind": "adamw8bit"}})
    with pytest.raises(EtudeError, match=r"pip install 'etude\[bitsandbytes\]'"):
        Trainer(config, tmp_path / "run")


def test_adamw_is_torchs_own_with_the_configured_settings():
    config = OptimizerConfig(learning_rate=0.1, betas=(0.5, 0.6), weight_decay=0.2, epsilon=1e-3)
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.1, (0.5, 0.6), 0.2, 1e-3)


def eight_bit(weights):
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    return parameters, make_optimizer(OptimizerConfig(kind="adamw8bit", learning_rate=1e-2), parameters.values())


def steps(parameters, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_restored_eight_bit_state_goes_on_bit_for_bit():
    pytest.importorskip("bitsandbytes")
    weights = {"large": torch.randn(96, 96), "small": torch.randn(4)}
    whole, optimizer = eight_bit(weights)
    steps(whole, optimizer, range(2))
    kept = {name: p.detach().clone() for name, p in whole.items()}
    state = optimizer_tensors(optimizer, whole)
    assert state["large.state1"].dtype == torch.uint8
    steps(whole, optimizer, range(2, 5))
    again, restored = eight_bit(kept)
    load_optimizer_tensors(restored, again, state)
    steps(again, restored, range(2, 5))
    assert all(torch.equal(again[name], whole[name]) for name in weights)


def test_eight_bit_state_of_another_model_is_refused():
    pytest.importorskip("bitsandbytes")
    whole, optimizer = eight_bit({"w": torch.randn(96, 96)})
    steps(whole, optimizer, [0])
    other, into = eight_bit({"w": torch.randn(48, 96)})
    with pytest.raises(EtudeError, match=r"'w' has shape \[96, 96\]"):
        load_optimizer_tensors(into, other, optimizer_tensors(optimizer, whole))

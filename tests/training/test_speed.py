"""Settings that change a run's speed keep what is promised: equal bits or ratios of 1, exact resume, the same export."""

from __future__ import annotations

import json

import pytest
import torch

from etude.config import LoraConfig, OptimizerConfig, load_config, parse_config
from etude.errors import EtudeError
from etude.learning.optimizers import load_optimizer_tensors, make_optimizer, optimizer_tensors
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.policies.stable_diffusion_3 import StableDiffusion3Policy
from etude.training.speed import SMALL, WORTH_COMPILING, compilation
from etude.training.trainer import Trainer
from support.small_runs import brief_settings, metrics, outcome, same, train_until, weights
from support.tiny import stable_diffusion, stable_diffusion_3

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    tree = brief_settings(tmp_path_factory.mktemp("model"))
    tree["objective"] |= {"updates_per_epoch": 1, "old_log_prob": "replay"}
    return tree


@pytest.fixture
def backend(monkeypatch):
    """The compiler's front half alone: graphs with their gradients, which run operation by operation."""
    torch._dynamo.reset()
    monkeypatch.setattr("etude.policies.compiling.BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def trained(settings, out, **changes):
    trainer = Trainer(parse_config({**settings, **changes}), out)
    trainer.train()
    return trainer


def test_a_compiled_run_starts_at_ratios_of_one_resumes_exactly_and_exports_the_same_names(settings, tmp_path, backend):
    changes = {"compile": "regional", "sampling": settings["sampling"] | {"num_steps": 2}}
    compiled = trained(settings, tmp_path / "compiled", **changes)
    assert all(row["ratio_max_deviation"] == 0 for row in metrics(tmp_path / "compiled")[1:])
    assert not any("_orig_mod" in name for name in [*weights(compiled), *outcome(tmp_path / "compiled")[0]])
    assert json.loads((tmp_path / "compiled" / "summary.json").read_text())["speed"] == {"compile": "regional"}
    train_until(Trainer(parse_config({**settings, **changes}), tmp_path / "broken"), 2)
    Trainer(parse_config({**settings, **changes}), tmp_path / "broken", resume=True).train()
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "compiled")


def test_a_compiled_network_computes_what_the_plain_one_does(backend):
    def gradients(how):
        policy = StableDiffusionPolicy(stable_diffusion())
        policy.add_lora(LoraConfig(), seed=0)
        if how is not None:
            policy.compile(how)
        x = torch.linspace(-1, 1, 64).reshape(1, *policy.latent_shape)
        output = policy.predict(x, torch.tensor([500]), policy.encode(["a"]), 2.0)
        return output, *torch.autograd.grad(output.square().sum(), list(policy.trainable().values()))

    for plain, compiled in zip(gradients(None), gradients("regional"), strict=True):
        assert torch.allclose(plain, compiled, rtol=1e-4, atol=1e-6)


def test_regional_compilation_takes_the_repeated_blocks_and_full_the_network():
    def compiled(policy, how):
        policy.compile(how)
        network = policy.network
        return {type(m).__name__ for m in network.modules() if m._compiled_call_impl is not None}

    assert compiled(StableDiffusionPolicy(stable_diffusion()), "regional") == {"BasicTransformerBlock"}
    assert compiled(StableDiffusion3Policy(stable_diffusion_3()), "regional") == {"JointTransformerBlock"}
    assert compiled(StableDiffusionPolicy(stable_diffusion()), "full") == {"UNet2DConditionModel"}


def test_auto_compiles_long_runs_on_a_gpu_graphs_small_networks_and_says_why():
    auto = load_config("emoji-ddpo", ["compile=auto"])
    assert compilation(auto, CPU, 10**9, 10**9) == ("off", "auto: off on a CPU")
    assert compilation(auto, GPU, WORTH_COMPILING, SMALL)[0] == "regional"
    how, reason = compilation(auto, GPU, WORTH_COMPILING - 1, SMALL)
    assert (how, reason) == ("off", "auto: off for 19,999 network evaluations, where 20,000 are worth it")
    how, reason = compilation(auto, GPU, 1, 3_000_000)
    assert (how, reason) == ("graphs", "auto: graphs for 3,000,000 parameters, fewer than 100,000,000")
    assert compilation(load_config("emoji-ddpo", ["compile=full"]), CPU, 1, 1) == ("full", "full")


def test_a_network_whose_blocks_are_unknown_is_refused():
    policy = StableDiffusionPolicy(stable_diffusion())
    policy.network.__class__ = type(
        "Own", (type(policy.network),), {"_repeated_blocks": None, "_no_split_modules": None}
    )
    with pytest.raises(EtudeError, match="compile = regional: a Own does not say which of its blocks repeat"):
        policy.compile("regional")


def test_channels_last_changes_the_layout_and_not_the_result(settings, tmp_path):
    last = trained(settings, tmp_path / "last", channels_last=True)
    plain = trained(settings, tmp_path / "plain")
    convolution = last.policy.network.conv_in.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert not convolution.is_contiguous()
    for name, value in weights(plain).items():
        assert torch.allclose(value, weights(last)[name], atol=1e-4)


@pytest.mark.parametrize("computing", [torch.bfloat16, torch.float32])
def test_an_adapter_that_keeps_its_inputs_gives_the_same_bits_with_gradients(computing):
    def gradients(casts):
        policy = StableDiffusionPolicy(stable_diffusion(), computing)
        policy.add_lora(load_config("emoji-ddpo").lora, seed=0)
        for module in policy.network.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                assert not module.cast_input_dtype_enabled
                module.cast_input_dtype_enabled = casts
        parameters = policy.trainable()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        x = torch.randn(2, *policy.latent_shape, generator=generator)
        output = policy.predict(x, torch.tensor([500, 500]), policy.encode(["a", "b"]), 2.0)
        return [output, *torch.autograd.grad(output.square().sum(), list(parameters.values()))]

    for before, after in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(before, after)


def test_fused_adamw_takes_the_same_steps_and_resumes_exactly():
    def steps(fused, count, state=None):
        torch.manual_seed(0)
        parameters = {name: torch.nn.Parameter(torch.randn(8, 3)) for name in "ab"}
        optimizer = make_optimizer(OptimizerConfig(fused=fused), parameters.values())
        if state is not None:
            values, moments, start = state
            for name, parameter in parameters.items():
                parameter.data.copy_(values[name])
            load_optimizer_tensors(optimizer, parameters, moments)
        for step in range(0 if state is None else start, count):
            torch.manual_seed(step + 1)
            for parameter in parameters.values():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        return values, {name: t.clone() for name, t in optimizer_tensors(optimizer, parameters).items()}, count

    whole = steps(True, 4)
    assert same(steps(True, 4, steps(True, 2))[0], whole[0])
    for name, value in steps(False, 4)[0].items():
        assert torch.allclose(value, whole[0][name], rtol=1e-6, atol=1e-7)
    with pytest.raises(EtudeError, match=r"fused = true is for kind = adamw"):
        load_config("emoji-ddpo", ["optimizer.kind=adamw8bit", "optimizer.fused=true"])


def in_half(**settings):
    policy = StableDiffusionPolicy(stable_diffusion(), torch.bfloat16)
    policy.add_lora(LoraConfig(**settings), seed=0)
    return policy


def test_without_autocast_the_network_computes_what_the_plain_pipelines_does_in_half_precision():
    policy = in_half()
    policy.leave_autocast()
    x, timesteps, told = (
        torch.linspace(-1, 1, 64).reshape(1, *policy.latent_shape),
        torch.tensor([500]),
        policy.encode(["a"]),
    )
    plain = StableDiffusionPolicy(stable_diffusion(), torch.bfloat16).pipeline.unet
    with torch.no_grad():
        theirs = plain(x.bfloat16(), timesteps, **told.prompt, return_dict=False)[0]
        assert torch.equal(policy.predict(x, timesteps, told, 1.0), theirs.float())  # an adapter begins as nothing


@pytest.mark.parametrize("targets", [["to_q", "to_out.0"], ["conv1", "to_k"]])
def test_without_autocast_an_adapter_in_float32_gets_the_gradients_of_one_with_it_to_rounding(targets):
    found = []
    for autocast in (True, False):
        policy = in_half(targets=targets)
        if not autocast:
            policy.leave_autocast()
        for i, parameter in enumerate(policy.trainable().values()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
        x = torch.linspace(-1, 1, 64).reshape(1, *policy.latent_shape)
        output = policy.predict(x, torch.tensor([500]), policy.encode(["a"]), 2.0)
        gradients = torch.autograd.grad(output.square().sum(), list(policy.trainable().values()))
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        found.append([output, *gradients])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 0.05 * one.norm()


def test_a_run_without_autocast_says_so_starts_at_ratios_of_one_and_is_refused_in_float32(settings, tmp_path):
    changes = {"autocast": False, "dtype": "bfloat16", "sampling": settings["sampling"] | {"num_steps": 2}}
    trained(settings, tmp_path / "half", **changes)
    assert all(row["ratio_max_deviation"] == 0 for row in metrics(tmp_path / "half")[1:])
    assert json.loads((tmp_path / "half" / "summary.json").read_text())["speed"] == {"autocast": "off: bfloat16 alone"}
    with pytest.raises(EtudeError, match="autocast = false does not go with dtype = float32"):
        load_config("emoji-ddpo", ["autocast=false"])
    with pytest.raises(EtudeError, match=r"autocast = false does not go with lora.rank = 0"):
        load_config("emoji-ddpo", ["autocast=false", "dtype=bfloat16", "lora.rank=0"])


def test_a_network_that_cannot_be_compiled_as_told_leaves_nothing_behind(settings, tmp_path):
    with pytest.raises(EtudeError, match="which a cpu has not: set compile to off"):
        trained(settings, tmp_path / "graphs", compile="graphs")
    assert not (tmp_path / "graphs").exists()

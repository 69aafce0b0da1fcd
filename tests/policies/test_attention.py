"""The attention kernels are those that were asked for, and one that fails in training is named before it spoils a weight."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from etude.config import parse_config
from etude.errors import EtudeError
from etude.policies.attention import AttentionBackend
from etude.training.trainer import Trainer
from support.small_runs import brief_settings, same, weights

CPU, GPU = torch.device("cpu"), torch.device("cuda")
plain_attention = functional.scaled_dot_product_attention


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return brief_settings(tmp_path_factory.mktemp("model")) | {"iterations": 1}


def test_auto_leaves_out_cudnn_on_a_gpu_and_leaves_the_choice_to_torch_on_a_cpu():
    assert AttentionBackend().kernels(GPU) == ["flash", "efficient", "math"]
    assert AttentionBackend().kernels(CPU) == []
    assert AttentionBackend("cudnn").kernels(GPU) == ["cudnn"]
    assert AttentionBackend().text(CPU) is None
    assert AttentionBackend().text(GPU) == "auto: flash, efficient or math"


def test_inside_the_context_the_named_kernel_alone_is_allowed():
    def allowed():
        cuda = torch.backends.cuda
        states = cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled, cuda.math_sdp_enabled
        return [state() for state in states]

    before = allowed()
    with AttentionBackend("flash").allowed(CPU, "unet"):
        assert allowed() == [True, False, False, False]
    with AttentionBackend().allowed(CPU, "unet"):
        assert allowed() == before
    assert allowed() == before


def test_a_kernel_that_cannot_compute_a_call_is_one_sentence_and_other_errors_pass():
    query = torch.zeros(1, 1, 2, 4)
    refusal = r"attention\.backend = cudnn cannot compute the attention of the unet"
    with pytest.raises(EtudeError, match=refusal), AttentionBackend("cudnn").allowed(CPU, "unet"):
        plain_attention(query, query, query)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"), AttentionBackend("math").allowed(CPU, "unet"):
        torch.zeros(2) @ torch.zeros(3)


def test_math_and_torchs_choice_train_alike_and_the_summary_names_the_kernel(settings, tmp_path):
    found = {}
    for name in ("auto", "math"):
        trainer = Trainer(parse_config({**settings, "attention": {"backend": name}}), tmp_path / name)
        trainer.train()
        found[name] = torch.cat([p.detach().flatten() for p in trainer.parameters.values()])
    assert torch.allclose(found["auto"], found["math"], atol=1e-5)
    said = [json.loads((tmp_path / name / "summary.json").read_text()).get("speed") for name in found]
    assert said == [None, {"attention.backend": "math: math"}]


class Failing(torch.autograd.Function):
    """The identity, whose gradient is NaN or an error."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.error is not None:
            raise RuntimeError(ctx.error)
        return gradient * float("nan"), None


def broken_attention(monkeypatch, call, error=None):
    """Attention whose backward fails in the `call`-th call that needs gradients, and how many there were."""
    calls = []

    def attention(*arguments, **options):
        output = plain_attention(*arguments, **options)
        if not output.requires_grad:
            return output
        calls.append(1)
        return Failing.apply(output, error) if len(calls) == call else output

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    return calls


def test_gradients_that_are_no_numbers_end_the_run_in_a_sentence_that_names_the_layer(settings, tmp_path, monkeypatch):
    trainer = Trainer(parse_config(settings), tmp_path / "run")
    before = weights(trainer)
    broken_attention(monkeypatch, call=2)
    with pytest.raises(EtudeError, match=r"first backward gives NaN .* gradient of '.*attn2\.to_(v|k|q)\.lora") as told:
        trainer.train()
    assert "attention.backend" in str(told.value)
    assert same(weights(trainer), before)


def test_a_kernel_that_fails_in_its_backward_is_one_sentence(settings, tmp_path, monkeypatch):
    trainer = Trainer(parse_config(settings), tmp_path / "run")
    broken_attention(monkeypatch, 1, "Expected mha_graph.execute(...).is_good() to be true, but got false.")
    with pytest.raises(EtudeError, match=r"attention\.backend = auto cannot compute .*mha_graph"):
        trainer.train()


def test_later_steps_are_not_waited_for(settings, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr("etude.learning.update.check_gradients", lambda *arguments: checked.append(1))
    Trainer(parse_config({**settings, "iterations": 2}), tmp_path / "run").train()
    assert len(checked) == 1

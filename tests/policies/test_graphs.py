"""Recorded calls give what plain calls give, with gradients; what cannot be recorded is called plainly."""

from __future__ import annotations

import warnings

import pytest
import torch

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.policies.graphs import MOST, GraphedForward, check_graphs
from etude.policies.stable_diffusion import StableDiffusionPolicy
from support.tiny import stable_diffusion


class Remembered:
    """A recording of a call that a CPU can make: it computes anew, into one place."""

    def __init__(self, call, tensors, parameters):
        self.call, self.parameters, self.output = call, list(parameters), call(*tensors).detach().clone()
        self.played = 0

    def play(self, tensors):
        self.played += 1
        with torch.set_grad_enabled(bool(self.parameters)):
            self.last = self.call(*[tensor.clone() for tensor in tensors])
        self.output.copy_(self.last.detach())
        return self.output

    def backward(self, slope):
        return torch.autograd.grad(self.last, self.parameters, slope, allow_unused=True)


@pytest.fixture
def policy():
    policy = StableDiffusionPolicy(stable_diffusion())
    policy.add_lora(LoraConfig(), seed=0)
    for i, parameter in enumerate(policy.trainable().values()):
        torch.nn.init.constant_(parameter, 0.01 * (i % 7 - 3))
    return policy


def graphed(policy, record=Remembered):
    calls = GraphedForward(policy.network, lambda: policy._is_reference, record)
    policy.network.forward = calls
    return calls


def loss(policy, rows, guidance=2.0):
    x = torch.linspace(-1, 1, rows * 64).reshape(rows, *policy.latent_shape)
    times = torch.full((rows,), 500)
    return policy.predict(x, times, policy.encode(["a"] * rows), guidance).square().sum()


def gradients(policy, *losses):
    total = sum(losses)
    return [g.clone() for g in torch.autograd.grad(total, list(policy.trainable().values()))]


def test_a_recorded_call_gives_the_plain_calls_bits_and_gradients(policy):
    plain = [loss(policy, rows).detach() for rows in (1, 2)], gradients(policy, loss(policy, 2))
    with torch.no_grad(), policy.reference():
        reference = loss(policy, 2)
    calls = graphed(policy)
    for _ in range(2):  # recorded, then played
        values = []
        for rows in (1, 2):
            with torch.no_grad():
                values.append(loss(policy, rows))
        assert torch.equal(torch.stack(values), torch.stack(plain[0]))
        for ours, theirs in zip(gradients(policy, loss(policy, 2)), plain[1], strict=True):
            assert torch.equal(ours, theirs)
        with torch.no_grad(), policy.reference():
            assert torch.equal(loss(policy, 2), reference)
    assert sorted(recording.played for recording in calls.recorded.values()) == [2, 2, 2, 2]


def test_a_recording_sees_weights_that_have_changed_in_place(policy):
    graphed(policy)
    with torch.no_grad():
        before = loss(policy, 1)
        next(iter(policy.trainable().values())).mul_(2)
        after = loss(policy, 1)
        assert after != before
    policy.network.forward = policy.network.forward.plain
    assert torch.equal(loss(policy, 1).detach(), after)


def test_a_second_call_before_the_first_ones_backward_is_made_plainly(policy):
    twice = gradients(policy, loss(policy, 1), loss(policy, 1).sqrt())
    calls = graphed(policy)
    ours = gradients(policy, loss(policy, 1), loss(policy, 1).sqrt())
    assert [recording.played for recording in calls.recorded.values()] == [1]
    for one, other in zip(ours, twice, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    assert not calls.waiting


def test_what_cannot_be_recorded_is_called_plainly_with_one_warning(policy):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = loss(policy, 1).detach()
    graphed(policy, refuse)
    with pytest.warns(UserWarning, match="compile = graphs: a call of the network cannot be recorded"):
        first = loss(policy, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(loss(policy, 1), first)
    assert torch.equal(first.detach(), expected)


def test_the_number_of_recordings_has_an_end(policy, monkeypatch):
    calls = graphed(policy)
    calls.recorded = dict.fromkeys(range(MOST))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(policy, 1)
    assert len(calls.recorded) == MOST


def test_a_device_without_cuda_graphs_is_refused(policy):
    with pytest.raises(
        EtudeError, match="compile = graphs records CUDA graphs, which a cpu has not: set compile to off"
    ):
        policy.compile("graphs")
    with pytest.raises(EtudeError, match="cannot record a network that the processes hold in parts"):
        check_graphs(torch.device("cuda"), in_parts=True)

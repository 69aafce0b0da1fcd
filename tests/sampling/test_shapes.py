"""A tensor without numbers goes through operations as one with numbers: the same layouts, dtypes and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from etude.sampling.shapes import META, NumbersNeededError, Shapes, ShapeTensor


def bare(tensor):
    """The shape of a tensor."""
    return ShapeTensor(tensor.detach().to(META))


X, W, K = torch.randn(2, 6, 8), torch.randn(4, 8), torch.randn(3, 2, 3, 3)
OPERATIONS = {
    "linear": lambda x, w: functional.linear(x, w),
    "views": lambda x, w: x.transpose(1, 2).reshape(2, 4, 12)[:, 1:],
    "in place": lambda x, w: x.clone().mul_(2).add_(x),
    "norm": lambda x, w: functional.layer_norm(x, (8,), w[0]),
    "attention": lambda x, w: functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
    "split": lambda x, w: x.chunk(2, dim=1)[1],
    "integers": lambda x, w: x.to(torch.int64) * 1,
    "integers times a float": lambda x, w: x.to(torch.int64) * 1.0,
    "maximum": lambda x, w: x.max(dim=1).values,
    "convolution": lambda x, w: functional.conv2d(x[None], K[:, :, :1]),
    "with numbers": lambda x, w: torch.cat([x, torch.ones(2, 1, 8)], dim=1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_the_layout_of_the_same_operation_on_numbers(name):
    for _ in range(2):  # computed, and remembered
        told, expected = OPERATIONS[name](bare(X), bare(W)), OPERATIONS[name](X, W)
        assert isinstance(told, ShapeTensor)
        assert (told.shape, told.stride(), told.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_autocast_and_gradients_are_those_of_numbers():
    def gradients(x, w, context):
        w = nn.Parameter(w)
        with context, torch.autocast("cpu", torch.bfloat16):
            y = functional.linear(x, w)
            return y, torch.autograd.grad(functional.gelu(y).float().square().mean(), w)[0]

    for told, expected in zip(gradients(bare(X), bare(W), Shapes()), gradients(X, W, torch.enable_grad()), strict=True):
        assert (told.shape, told.dtype, told.device) == (expected.shape, expected.dtype, expected.device)


def test_a_parameter_is_copied_cast_and_given_new_data_as_any_other():
    weight = nn.Parameter(bare(W))
    twin = copy.deepcopy(nn.ParameterList([weight]))[0]
    assert isinstance(twin, nn.Parameter)
    assert (twin.shape, twin.requires_grad) == (weight.shape, True)
    assert twin is not weight
    weight.data = weight.to(torch.float64)
    assert functional.linear(bare(X).double(), weight).dtype == torch.float64
    assert nn.init.normal_(weight) is weight


def test_what_asks_for_numbers_is_refused():
    for question in (
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
    ):
        with pytest.raises(NotImplementedError):
            question(bare(X))
    with pytest.raises(NumbersNeededError, match="needs numbers"):
        bare(X).sum().item()


def test_inside_the_mode_new_tensors_are_shapes_and_memory_is_told_once():
    told = []
    with Shapes(told.append):
        x = torch.zeros(4, 4)
        y = x.t().reshape(2, 8)
        z = x[:2].add_(1)
    assert all(isinstance(each, ShapeTensor) for each in (x, y, z))
    assert {storage._cdata: storage.nbytes() for storage in told} == {
        each.twin.untyped_storage()._cdata: 64 for each in (x, y)
    }

"""The activations that the compiled kernels compute by themselves, value by value."""

import math

import pytest
import torch

import sparsekern as sk
from sparsekern._load import _C

pytestmark = pytest.mark.skipif(_C is None, reason="the reference asks torch for activations")


def through_a_layer(x, activation):
    """The activation of each value: a layer of one weight, 1, over as many tokens as values."""
    dense = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    dense.weight.fill_(1.0)
    layer = sk.SparseLinear.from_dense(dense, activation=activation)
    with torch.inference_mode():
        return layer(x.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu_is_within_float_rounding_of_float64(activation, approximate, isa):
    x = torch.cat([torch.linspace(-9, 9, 200_001), torch.logspace(-30, 0, 4001)])
    x = torch.cat([x, -x])
    want = torch.nn.functional.gelu(x.double(), approximate=approximate)
    error = (through_a_layer(x, activation).double() - want).abs()
    assert error[x <= 0].max() < 4e-7
    assert error.max() < 6e-7  # half a unit in the last place of 9 is 4.8e-7
    near = x.abs() < 0.5
    assert (error[near] <= 1e-6 * want[near].abs()).all()


def test_gelu_far_out_and_at_zero(isa):
    x = torch.tensor([0.0, 5.5, 7.25, 1e4, 3e38, math.inf, -5.5, -7.25, -1e4, -3e38])
    y = through_a_layer(x.repeat(5), "gelu")
    assert torch.equal(y, x.clamp(min=0).repeat(5))
    assert through_a_layer(torch.full((40,), math.nan), "gelu").isnan().all()

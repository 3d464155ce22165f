"""Layers with int8 values, in every format that has them."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.measure.energy_model import count_operations

FORMATS = {
    "csr": (sk.Int8CSRWeight, {"sparsity": 0.8}),
    "block": (sk.Int8BlockWeight, {"sparsity": 0.5, "pattern": "block:16x16"}),
}
formats = pytest.mark.parametrize("format", FORMATS)


def layer(format, activation="none"):
    weight, options = FORMATS[format]
    made = sk.SparseLinear(64, 48, format=format, activation=activation, **options)
    sk.quantize(made)
    assert type(made.weight) is weight
    return made.eval()


# Not relu in bfloat16: an output next to zero may round to either side of it.
@pytest.mark.parametrize(
    ("act", "dtype"),
    [(a, torch.float32) for a in ("none", "relu", "relu6", "gelu")]
    + [(a, torch.bfloat16) for a in ("none", "gelu")],
    ids=str,
)
@formats
def test_frozen_weights_pass_gradients_on(format, act, dtype):
    made = layer(format, act).to(dtype)
    twin = made.to_dense()
    x = torch.randn(20, 64).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    made(a).sum().backward()
    twin(b).sum().backward()
    close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(a.grad, b.grad, **close)
    bias = (twin if act == "none" else twin[0]).bias
    torch.testing.assert_close(made.bias.grad, bias.grad, **close)


@formats
def test_training_is_refused(format):
    made, name = layer(format), FORMATS[format][0].__name__
    with pytest.raises(RuntimeError, match=f"{name}: expected a model in eval mode, got one in tr"):
        made.train()(torch.randn(3, 64))
    with pytest.raises(RuntimeError, match=f"{name}: expected inference, got a request to train"):
        made.prepare_training()
    with pytest.raises(RuntimeError, match=f"{name}: expected a linear layer, got a convolution"):
        made.weight.conv2d(torch.randn(1, 4, 4, 4), None, (1, 1), (0, 0), (1, 1), "none")


@formats
def test_energy_model_counts_float_products_and_int8_bytes(format):
    made = layer(format)
    stored, index = made.weight.values.numel(), made.weight.indices()
    (row,) = count_operations(made, torch.randn(9, 64)).layers
    assert row.dtype == torch.float32 and row.macs == 9 * stored
    assert row.index_reads == sum(t.numel() for t in index)
    assert row.index_bytes == 4 * row.index_reads
    assert row.weight_bytes == stored + 4 * 48 + 4 * 48


@formats
def test_back_to_dense_and_dtypes(format):
    made, x = layer(format, "gelu"), torch.randn(9, 64)
    want = made(x)
    assert made.weight.nnz == int(made.weight.mask().sum())
    torch.testing.assert_close(made.to_dense()(x), want, rtol=1e-4, atol=1e-5)
    model = nn.Sequential(copy.deepcopy(made))
    torch.testing.assert_close(sk.to_dense(model)(x), want, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.02)
    scales = made.weight.scales.clone()
    low = made.to(torch.bfloat16)
    assert torch.equal(low.weight.scales, scales) and low.weight.dtype == torch.int8
    torch.testing.assert_close(low(x.bfloat16()).float(), want, rtol=0.02, atol=0.02)
    twin = low.to_dense()
    torch.testing.assert_close(twin(x.bfloat16()), low(x.bfloat16()), rtol=0.02, atol=0.02)

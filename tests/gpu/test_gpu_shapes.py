"""Layers at the sizes people use, every number of tokens that a kernel may tell apart."""

import pytest
import torch
from gpu_common import DTYPES, check_close, poison
from torch import nn

import sparsekern as sk
from sparsekern.patterns import parse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS = (1, 2, 5, 8, 16, 31, 64, 100, 512)
PATTERNS = [
    ("unstructured", 0.5), ("unstructured", 0.7), ("unstructured", 0.9), ("unstructured", 0.98),
    ("2:4", 0.5), ("4:8", 0.5), ("block:16x16", 0.65), ("block:32x32", 0.5), ("block:64x64", 0.8),
    ("block:128x128", 0.9), ("vector:4x1", 0.9), ("vector:1x8", 0.8),
]  # fmt: skip


def pruned(module, pattern, sparsity):
    """A dense layer with zeros in a pattern."""
    with torch.no_grad():
        mask = parse(pattern).mask(module.weight.abs().float(), sparsity)
        module.weight.mul_(mask)
    return module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
@pytest.mark.parametrize("shape", [(768, 1024), (1000, 520)], ids=str)
def test_linear(shape, pattern, sparsity, dtype):
    rows, cols = shape
    dense = pruned(nn.Linear(cols, rows, device="cuda"), pattern, sparsity).to(dtype)
    layer = sk.SparseLinear.from_dense(dense)
    weight, bias = dense.weight.cpu().double(), dense.bias.cpu().double()
    with torch.inference_mode():
        for tokens in TOKENS:
            x = torch.randn(tokens, cols, device="cuda", dtype=dtype)
            poison((tokens, rows), dtype)
            want = torch.nn.functional.linear(x.cpu().double(), weight, bias)
            check_close(layer(x), want, f"{tokens} tokens", tf32=":" in pattern[:3])


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 16, 200])
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.7), ("2:4", 0.5), ("block:64x64", 0.5)]
)
def test_activations(pattern, sparsity, tokens, act):
    dense = pruned(nn.Linear(512, 256, device="cuda"), pattern, sparsity).bfloat16()
    layer = sk.SparseLinear.from_dense(dense)
    layer.activation = act
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    y = dense.cpu().double()(x.cpu().double())
    approximate = "tanh" if act == "gelu_tanh" else "none"
    want = y.relu() if act == "relu" else torch.nn.functional.gelu(y, approximate=approximate)
    check_close(layer(x), want.detach(), act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.9), ("2:4", 0.5), ("block:32x32", 0.7)]
)
def test_conv(pattern, sparsity, kernel, dtype):
    dense = nn.Conv2d(64, 96, kernel, padding=kernel // 2, device="cuda")
    dense = pruned(dense, pattern, sparsity).to(dtype)
    layer = sk.SparseConv2d.from_dense(dense)
    x = torch.randn(3, 64, 13, 17, device="cuda", dtype=dtype)
    exact = dense.cpu().double()(x.cpu().double()).detach()
    for layout in (torch.contiguous_format, torch.channels_last):
        poison(exact.shape, dtype)
        got = layer(x.contiguous(memory_format=layout))
        check_close(got, exact, str(layout), tf32=pattern == "2:4")


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.9), ("2:4", 0.5), ("block:64x64", 0.8)]
)
def test_a_training_step(pattern, sparsity):
    """Loss falls as it does with masked dense weights."""
    torch.manual_seed(1)
    dense = pruned(nn.Linear(256, 128, device="cuda"), pattern, sparsity)
    mask = (dense.weight != 0).float()
    layer = sk.SparseLinear.from_dense(dense).prepare_training()
    x, goal = torch.randn(64, 256, device="cuda"), torch.randn(64, 128, device="cuda")
    losses = []
    for model in (layer, dense):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            loss = torch.nn.functional.mse_loss(model(x), goal)
            optimizer.zero_grad()
            loss.backward()
            if model is dense:
                dense.weight.grad.mul_(mask)
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

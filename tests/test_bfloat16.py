"""bfloat16 products of pairs of columns (AVX512_BF16); test_ops.py runs its samples over them."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import csr_of, random_weight
from torch import nn

import sparsekern as sk
from sparsekern._load import _C
from sparsekern.ops.csr import csr_linear, csr_plan

HAS_PAIRS = "avx512bf16" in sk.available_isas()
needs_pairs = pytest.mark.skipif(
    not HAS_PAIRS, reason="this CPU has no AVX512_BF16 with AVX512_VBMI2"
)
# One rounding of the result; sums are float32.
ROUNDING = 2**-8


def bf16(*tensors):
    return tuple(t.bfloat16() for t in tensors)


def parts(rows, cols, sparsity, kind="uniform"):
    weight = random_weight(rows, cols, sparsity, kind).bfloat16()
    return weight, *csr_of(weight)


def pairs_plan(crow, col, cols):
    return csr_plan(crow, col, cols, 1, 1, False, True)


def check(y, want):
    assert y.dtype == torch.bfloat16
    scale = float(want.abs().max()) if want.numel() else 0.0
    assert torch.all((y.double() - want).abs() <= ROUNDING * want.abs() + 1e-5 * scale)


@needs_pairs
def test_a_plan_with_pairs_is_another_one_and_only_where_it_can_run():
    _, _, crow, col = parts(40, 64, 0.8)
    plain, pairs = csr_plan(crow, col, 64), pairs_plan(crow, col, 64)
    assert sk.cpu_isa() == "avx512bf16" and pairs.numel() > plain.numel()
    _C.set_cpu_isa("avx512")
    try:
        assert torch.equal(pairs_plan(crow, col, 64), plain)
    finally:
        _C.set_cpu_isa("avx512bf16")


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(0, 230),
    cols=st.integers(1, 400),
    rows=st.integers(1, 60),
    sparsity=st.sampled_from([0.0, 0.3, 0.8, 0.95, 1.0]),
    kind=st.sampled_from(["uniform", "skewed"]),
    bias=st.booleans(),
)
def test_rounds_once(tokens, cols, rows, sparsity, kind, bias):
    weight, values, crow, col = parts(rows, cols, sparsity, kind)
    x = torch.randn(tokens, cols).bfloat16()
    b = torch.randn(rows).bfloat16() if bias else None
    y = csr_linear(x, values, crow, col, b, pairs_plan(crow, col, cols))
    want = x.double() @ weight.double().t()
    check(y, want + b.double() if bias else want)


@pytest.mark.parametrize("block", [(4, 1), (4, 4), (1, 8)])
def test_blocks_of_rows_share_pairs(block):
    kept = torch.rand(64 // block[0], 96 // block[1]) < 0.3
    weight = torch.randn(64, 96) * kept.repeat_interleave(block[0], 0).repeat_interleave(
        block[1], 1
    )
    weight[5, 7] = 1.0
    values, crow, col = csr_of(weight.bfloat16())
    x = torch.randn(100, 96).bfloat16()
    y = csr_linear(x, values, crow, col, None, pairs_plan(crow, col, 96))
    check(y, x.double() @ weight.bfloat16().double().t())


def test_a_plan_of_the_best_isa_serves_every_other(isa):
    """A plan outlives the machine it was made on: unpickled elsewhere, it must still be right."""
    weight, values, crow, col = parts(33, 70, 0.7)
    _C.set_cpu_isa(sk.available_isas()[-1])
    plan = pairs_plan(crow, col, 70)
    _C.set_cpu_isa(isa)
    x = torch.randn(50, 70).bfloat16()
    check(csr_linear(x, values, crow, col, None, plan), x.double() @ weight.double().t())
    wide = csr_linear(x.double(), values.double(), crow, col, None, plan)
    torch.testing.assert_close(wide, x.double() @ weight.double().t())


def test_strided_and_misaligned_input():
    _, values, crow, col = parts(20, 30, 0.5)
    plan, x = pairs_plan(crow, col, 30), torch.randn(40, 30).bfloat16()
    want = csr_linear(x, values, crow, col, None, plan)
    odd_start = torch.randn(40 * 30 + 1).bfloat16()[1:].view(40, 30).copy_(x)
    strided = torch.randn(40, 60).bfloat16()[:, ::2].copy_(x)
    for other in (odd_start, strided, x.view(5, 8, 30)):
        y = csr_linear(other, values, crow, col, None, plan)
        assert torch.equal(y.reshape(40, 20), want)


def test_nan_and_inf(isa):
    """What is stored spreads; at most the neighbour in the pair of columns does so besides."""
    weight = torch.zeros(4, 40).bfloat16()
    weight[0, 4], weight[1, 7], weight[2, 9], weight[3, 5] = 2.0, 3.0, 1.0, 1.0
    values, crow, col = csr_of(weight)
    x = torch.ones(20, 40).bfloat16()
    x[0, 4], x[1, 7] = math.nan, math.inf
    y = csr_linear(x, values, crow, col, None, pairs_plan(crow, col, 40))
    assert math.isnan(y[0, 0]) and y[1, 1] == math.inf
    assert y[0, 1] == 3 and y[0, 2] == 1 and y[1, 0] == 2
    assert torch.equal(y[2:], torch.tensor([2.0, 3, 1, 1]).bfloat16().expand(18, 4))
    relu = csr_linear(x, values, crow, col, None, pairs_plan(crow, col, 40), None, "relu")
    assert math.isnan(relu[0, 0]) and relu[1, 1] == math.inf
    # Column 5 shares a pair with column 4: 0 * NaN where pairs are multiplied, as in a dense layer.
    assert math.isnan(y[0, 3]) if isa == "avx512bf16" else y[0, 3] == 1


def test_opcheck_and_compile():
    _, values, crow, col = parts(24, 33, 0.6)
    plan, x = pairs_plan(crow, col, 33), torch.randn(20, 33).bfloat16()
    bias = torch.randn(24).bfloat16()
    torch.library.opcheck(csr_linear, (x, values, crow, col, bias, plan, None, "gelu"))
    torch.library.opcheck(csr_plan, (crow, col, 33, 1, 1, False, True))
    layer = sk.SparseLinear(33, 24, sparsity=0.6).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (20, 5, 1):
        torch.testing.assert_close(compiled(x[:tokens]), layer(x[:tokens]))


def test_layers_take_pairs_along():
    """Made, converted, copied, pickled or loaded: the schedule follows the dtype of the values."""
    x = torch.randn(30, 64).bfloat16()
    plain = sk.SparseLinear(64, 48, sparsity=0.8)
    words = plain.weight.plan.numel()
    layer = copy.deepcopy(plain).to(torch.bfloat16)
    born = sk.SparseLinear.from_dense(layer.to_dense())
    loaded = sk.SparseLinear(64, 48, sparsity=0.5, dtype=torch.bfloat16)
    loaded.load_state_dict(layer.state_dict())
    twins = (born, loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)))
    for twin in (layer, *twins):
        assert (twin.weight.plan.numel() > words) == HAS_PAIRS
        assert torch.equal(twin(x), layer(x))
    want = nn.functional.linear(x.double(), layer.weight.to_dense().double(), layer.bias.double())
    check(layer(x).detach(), want.detach())
    assert layer.float().weight.plan.numel() == words
    conv = sk.SparseConv2d(8, 8, 3, sparsity=0.5)
    assert (
        conv.bfloat16().weight.plan.numel()
        == sk.SparseConv2d.from_dense(conv.float().to_dense()).weight.plan.numel()
    )  # pairs are for linear layers


def test_a_missing_pairs_plan_falls_back(isa):
    weight, values, crow, col = parts(40, 51, 0.7)
    x = torch.randn(70, 51).bfloat16()
    want = x.double() @ weight.double().t()
    for plan in (None, csr_plan(crow, col, 51), pairs_plan(crow, col, 51)):
        check(csr_linear(x, values, crow, col, None, plan), want)


def test_training_in_bfloat16():
    layer = sk.SparseLinear(64, 48, sparsity=0.8, activation="gelu").bfloat16()
    twin = layer.to_dense()
    x = torch.randn(40, 64).bfloat16()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(a).sum().backward()
    twin(b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=0.05, atol=0.05)
    torch.testing.assert_close(
        layer.weight.values.grad, twin[0].weight.grad[layer.weight.mask()], rtol=0.05, atol=0.1
    )


@pytest.mark.skipif(_C is None, reason="tests the messages of the compiled ops")
def test_messages():
    _, values, crow, col = parts(6, 8, 0.5)
    only = "csr_plan: expected pairs only for the forward plan of a linear layer, got transpose"
    with pytest.raises(RuntimeError, match=only):
        csr_plan(crow, col, 8, 1, 1, True, True)
    other = parts(6, 8, 0.2)
    foreign = pairs_plan(other[2], other[3], 8)
    with pytest.raises(RuntimeError, match="plan made by csr_plan for this pattern"):
        csr_linear(torch.randn(5, 8).bfloat16(), values, crow, col, None, foreign)
    plan = pairs_plan(crow, col, 8)
    wrong = r"expected x.size\(-1\) = in_features = 8, got 9"
    with pytest.raises(RuntimeError, match=wrong):
        csr_linear(torch.randn(5, 9).bfloat16(), values, crow, col, None, plan)

"""int8 blocks times int8 activations: the op against integers, and its bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import random_blocks

import sparsekern as sk
from sparsekern._load import _C
from sparsekern.ops.block import block_plan, blocks_to_dense
from sparsekern.ops.block_int8_dynamic import _reference, block_linear_int8_dynamic
from sparsekern.weights_int8 import quantize_blocks

native = pytest.mark.skipif(_C is None, reason="tests the compiled op")
# Rows that fill 16, 8 and 4 lanes, and others; 1 to 16 words of columns.
BLOCKS = [(16, 16), (32, 32), (4, 4), (8, 8), (1, 8), (5, 12), (7, 20), (24, 16), (16, 4), (48, 64)]


def parts(rows=40, cols=51, block=(4, 4), sparsity=0.5):
    """Quantized values, scales, crow, col of a random block matrix."""
    values, crow, col = random_blocks(rows, cols, block, sparsity)
    return *quantize_blocks(values.float(), crow, rows), crow, col


def dense_of(w, rows, cols):
    return blocks_to_dense("test", w[0].long(), *w[2:], rows, cols).squeeze(2)


def integers(x, w, rows):
    """The result without bias, sums in int64: what every kernel has to give bit for bit."""
    flat = x.float().reshape(-1, x.shape[-1])
    largest = flat.abs().amax(1, True) if flat.shape[1] else flat.new_zeros(len(flat), 1)
    scales = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
    q = (flat * (1 / scales)).round().long()
    assert q.numel() == 0 or int(q.abs().max()) <= 127
    sums = (q[:, None] * dense_of(w, rows, x.shape[-1])).sum(2)
    return (sums.float() * w[1] * scales).reshape(*x.shape[:-1], rows)


def fill(shape):
    """Tokens of different sizes, a zero one among them."""
    x = torch.randn(shape) * torch.logspace(-3, 3, math.prod(shape[:-1])).reshape(*shape[:-1], 1)
    return x.index_fill(-2, torch.tensor([0]), 0.0) if math.prod(shape[:-1]) > 3 else x


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 7, 15, 16, 17, 197, (2, 3, 5)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_matches_integers_exactly(tokens, block, isa):
    shape = tokens if isinstance(tokens, tuple) else (tokens,)
    rows, cols = 83, 70
    w, x = parts(rows, cols, block), fill((*shape, cols))
    want = integers(x, w, rows)
    for plan in (None, block_plan(w[2], w[3], rows, cols, *block)):
        y = block_linear_int8_dynamic(x, *w, None, plan, rows)
        assert y.dtype == torch.float32 and torch.equal(y, want)
    low = x.bfloat16()
    y = block_linear_int8_dynamic(low, *w, None, None, rows)
    assert torch.equal(y, integers(low, w, rows).bfloat16())
    assert torch.equal(_reference(x, *w, None, None, rows), want)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    cols=st.integers(1, 600),
    rows=st.integers(1, 120),
    block=st.sampled_from(BLOCKS),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_property(tokens, cols, rows, block, sparsity):
    w, x = parts(rows, cols, block, sparsity), torch.randn(tokens, cols)
    got = block_linear_int8_dynamic(x, *w, None, None, rows)
    assert torch.equal(got, integers(x, w, rows))


@pytest.mark.parametrize("tokens", [1, 300])
def test_several_panels_and_any_number_of_threads(tokens, isa):
    """9000 columns leave room for few tokens in a panel."""
    w, x = parts(200, 9000, (32, 32), 0.9), torch.randn(tokens, 9000)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(block_linear_int8_dynamic(x, *w, None, None, 200))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)
    assert torch.equal(results[0], _reference(x, *w, None, None, 200))


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_bias_and_activations(act, tokens, isa):
    w, x, bias = parts(), torch.randn(tokens, 51), torch.randn(40)
    got = block_linear_int8_dynamic(x, *w, bias, None, 40, act)
    torch.testing.assert_close(got, _reference(x, *w, bias, None, 40, act))
    low = block_linear_int8_dynamic(x.bfloat16(), *w, bias.bfloat16(), None, 40, act)
    want = _reference(x.bfloat16(), *w, bias.bfloat16(), None, 40, act)
    torch.testing.assert_close(low, want, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 33])
def test_error_is_bounded_by_half_a_step_of_each_activation(tokens, isa):
    w, x = parts(64, 96, (16, 16)), torch.randn(tokens, 96, dtype=torch.float64)
    dense = dense_of(w, 64, 96).double() * w[1].double()[:, None]
    error = (block_linear_int8_dynamic(x.float(), *w, None, None, 64) - x @ dense.t()).abs()
    step = x.abs().amax(1, True) / 127
    assert torch.all(error <= 0.5001 * step * dense.abs().sum(1) + 1e-5)
    assert float(error.max()) > 0  # it is a quantized product


@pytest.mark.parametrize("tokens", [1, 18])
@pytest.mark.parametrize("block", [(16, 16), (4, 4)], ids=str)
def test_largest_values_neither_saturate_nor_overflow(tokens, block, isa):
    """Also -128, which a file may hold; sums of neighbours leave 16 bits."""
    rows, cols = 48, 8192
    values, crow, col = random_blocks(rows, cols, block, 0.0)
    q = torch.full(values.shape, 127, dtype=torch.int8)
    q[1::2] = -128
    q[:, 1] = torch.where(torch.rand(q[:, 1].shape) < 0.5, -128, 127).to(torch.int8)
    x = torch.full((tokens, cols), 3.0)
    x[:, ::3] = -3.0
    for sample in (x, x.abs(), -x.abs()):
        got = block_linear_int8_dynamic(sample, q, torch.ones(rows), crow, col, None, None, rows)
        assert torch.equal(got, integers(sample, (q, torch.ones(rows), crow, col), rows))


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("block", [(16, 16), (7, 20)], ids=str)
def test_values_beyond_the_matrix_are_never_read(tokens, block, isa):
    rows, cols = 25, 50
    w, x = parts(rows, cols, block, 0.0), torch.randn(tokens, cols)
    want = block_linear_int8_dynamic(x, *w, None, None, rows)
    values = w[0].clone()
    per_row = -(-cols // block[1])
    values[per_row - 1 :: per_row, :, cols % block[1] :] = 101
    values[-per_row:, rows % block[0] :] = -77
    got = block_linear_int8_dynamic(x, values, *w[1:], None, None, rows)
    assert not torch.equal(values, w[0]) and torch.equal(got, want)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -math.nan])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_token_that_is_not_finite_gives_nan_everywhere_and_no_other_does(bad, tokens, isa):
    weight = torch.zeros(40, 80)
    weight[:16, 32:48] = 1.0
    made = sk.DynamicInt8BlockWeight.from_dense(weight, None, "block:16x16").eval()
    x = torch.ones(tokens, 80)
    want = made.linear(x, None, "relu")
    x[-1, 79] = bad  # a column that no weight reads
    for act in ("none", "relu", "gelu"):
        y = made.linear(x, None, act)
        assert bool(y[-1].isnan().all()) and bool(y[:-1].isfinite().all())
    assert torch.equal(made.linear(x, None, "relu")[:-1], want[:-1])
    args = (made.values, made.scales, made.block_crow, made.block_col, None, None, 40)
    torch.testing.assert_close(_reference(x, *args), y * 0 + _reference(x, *args), equal_nan=True)
    assert bool(_reference(x, *args)[-1].isnan().all())


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 3.4e38])
def test_tiny_and_huge_tokens(size, isa):
    w = parts(32, 64, (16, 16))
    w = (w[0], w[1] * 1e-3, *w[2:])
    x = torch.rand(17, 64) * size
    got = block_linear_int8_dynamic(x, *w, None, None, 32)
    assert bool(got.isfinite().all()) and torch.equal(got, integers(x, w, 32))


def test_empty_shapes(isa):
    w = parts(40, 51, (4, 4), 1.0)  # no block at all
    bias = torch.randn(40)
    got = block_linear_int8_dynamic(torch.randn(3, 51), *w, bias, None, 40)
    assert torch.equal(got, bias.expand(3, 40))
    none = torch.zeros(0, 4, 4, dtype=torch.int8), torch.ones(8), *[torch.zeros(3).int()] * 1
    empty = torch.zeros(0, dtype=torch.int32)
    got = block_linear_int8_dynamic(torch.randn(3, 0), *none, empty, None, None, 8)
    assert torch.equal(got, torch.zeros(3, 8))
    rows = torch.zeros(0, 4, 4, dtype=torch.int8), torch.ones(0), torch.zeros(1).int(), empty
    assert block_linear_int8_dynamic(torch.randn(3, 8), *rows, None, None, 0).shape == (3, 0)


def test_strided_and_misaligned_input(isa):
    w, x = parts(40, 52), torch.randn(20, 52)
    want = block_linear_int8_dynamic(x, *w, None, None, 40)
    odd_start = torch.randn(20 * 52 + 1)[1:].view(20, 52).copy_(x)
    strided = torch.randn(20, 104)[:, ::2].copy_(x)
    for other in (odd_start, strided, x.t().contiguous().t()):
        assert torch.equal(block_linear_int8_dynamic(other, *w, None, None, 40), want)


def test_opcheck():
    w, x = parts(), torch.randn(20, 51)
    plan = block_plan(w[2], w[3], 40, 51, 4, 4)
    op = block_linear_int8_dynamic
    torch.library.opcheck(op, (x, *w, torch.randn(40), plan, 40))
    torch.library.opcheck(op, (x.bfloat16(), *w, torch.randn(40), plan, 40, "relu"))
    torch.library.opcheck(op, (x.requires_grad_(), *w, None, None, 40, "gelu"))


def test_meta_device():
    w, x = [t.to("meta") for t in parts()], torch.randn(2, 20, 51, device="meta")
    y = block_linear_int8_dynamic(x, *w, None, None, 40)
    assert y.is_meta and y.shape == (2, 20, 40) and y.dtype == torch.float32


@native
def test_messages():
    values, scales, crow, col = w = parts(8, 6)
    x = torch.randn(3, 6)

    def refuses(message, *arguments):
        with pytest.raises(RuntimeError, match=f"block_linear_int8_dynamic: expected {message}"):
            block_linear_int8_dynamic(*arguments)

    none = (None, None, 8)
    refuses("x of dtype float32 or bfloat16, got float64", x.double(), *w, *none)
    refuses("values of dtype int8, got float32", x, values.float(), *w[1:], *none)
    refuses("values with 3 dimensions", x, values[0], *w[1:], *none)
    refuses("scales of dtype float32, got float64", x, values, scales.double(), crow, col, *none)
    refuses(r"bias.size\(0\) = out_features = 8, got 5", x, *w, torch.zeros(5), None, 8)
    refuses("plan made by block_plan", x, *w, None, block_plan(crow, col, 7, 6, 4, 4), 8)
    refuses("activation to be none", x, *w, *none, "swish")
    refuses("col to rise strictly", x[:, :1].contiguous(), values, scales, crow, col + 1, *none)
    narrow = parts(8, 6, (4, 3))
    refuses("blocks of a multiple of 4 columns, got 3", x, *narrow, *none)
    wide = torch.zeros(1, 132105)
    refuses("at most 132104 in_features, got 132105", wide, *w, *none)

"""The Triton kernel of N:M weights against float64 products, on the interpreter."""

import pytest
import torch

from sparsekern.ops.nm import nm_to_dense, pack_index
from sparsekern.ops.nm_triton import nm_decode

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def parts(rows, cols, n, m, dtype=torch.float32):
    """Values, index and the dense float64 weight."""
    sizes = [min(m, cols - first) for first in range(0, cols, m)]
    chosen = [torch.rand(rows, size).argsort(1)[:, :n].sort(1).values for size in sizes]
    index = pack_index(torch.cat(chosen, 1), m)
    values = torch.randn(rows, len(sizes) * n).to(dtype)
    return values, index, nm_to_dense("test", values.double(), index, cols, n, m)


def expect(got, x, dense, bias=None, activation="none"):
    want = x.double() @ dense.T + (0 if bias is None else bias.double())
    if activation == "relu":
        want = want.relu()
    elif activation != "none":
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        want = torch.nn.functional.gelu(want, approximate=approximate)
    assert got.dtype == x.dtype and got.is_contiguous()
    tolerance = TOLERANCE[x.dtype] * max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("tokens", [1, 7, 17, 64])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_2_of_4(tokens, dtype):
    values, index, dense = parts(70, 304, 2, 4, dtype)
    x, bias = torch.randn(tokens, 304).to(dtype), torch.randn(70).to(dtype)
    expect(nm_decode(x, values, index, (70, 304, 2, 4), bias), x, dense, bias)


def test_2_of_4_with_half_a_byte_at_the_end():
    values, index, dense = parts(5, 68, 2, 4, torch.float16)
    x = torch.randn(3, 68).half()
    expect(nm_decode(x, values, index, (5, 68, 2, 4)), x, dense)


@pytest.mark.parametrize("n, m", [(1, 2), (1, 4), (3, 4), (2, 3), (4, 8), (2, 7), (7, 16)])
@pytest.mark.parametrize("cols", [16, 144, 151])
def test_other_patterns(n, m, cols):
    if 0 < cols % m < n:
        cols -= cols % m  # a last group may be shorter than M, not than N
    values, index, dense = parts(9, cols, n, m)
    x = torch.randn(3, cols)
    expect(nm_decode(x, values, index, (9, cols, n, m)), x, dense)


@pytest.mark.parametrize("split", [1, 2, 3, 5])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
def test_parts_of_a_sum(split, activation):
    values, index, dense = parts(12, 520, 2, 4)
    x, bias = torch.randn(4, 520), torch.randn(12)
    got = nm_decode(x, values, index, (12, 520, 2, 4), bias, activation, split)
    expect(got, x, dense, bias, activation)


def test_nothing_to_do():
    values, index, _ = parts(4, 16, 2, 4)
    assert nm_decode(torch.randn(0, 16), values, index, (4, 16, 2, 4)).shape == (0, 4)

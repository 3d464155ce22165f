"""Convolutions as products of what they read, through the stand-ins of both libraries.

The kernels that unfold and fold have tests of their own (`tests/interpreted`); here torch does it.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import LT, SPARSE
from samples import csr_of, random_weight

from sparsekern.ops import conv, csr_conv_cuda, csr_cuda, nm_conv, nm_conv_cuda, nm_cuda
from sparsekern.patterns import parse
from sparsekern.weights import NMWeight

GEOMETRY = ((3, 3), (2, 1), (1, 1), (1, 1), 1)


def turned(columns, channels, taps):
    """Columns (n, channels * taps, pixels) with the kernel position first."""
    return columns.unflatten(1, (channels, taps)).transpose(1, 2).flatten(1, 2)


def unfold(x, geometry, tap_major):
    kernel, stride, padding, dilation = geometry
    columns = torch.nn.functional.unfold(x, kernel, dilation, padding, stride)
    columns = turned(columns, x.shape[1], kernel[0] * kernel[1]) if tap_major else columns
    return columns.transpose(1, 2).reshape(-1, columns.shape[1]).contiguous()


def fold(columns, size, geometry, tap_major):
    kernel, stride, padding, dilation = geometry
    parts = columns.unflatten(0, (size[0], -1)).transpose(1, 2)
    parts = turned(parts, kernel[0] * kernel[1], size[1]) if tap_major else parts
    return torch.nn.functional.fold(parts, size[2:], kernel, dilation, padding, stride)


@pytest.fixture
def take(monkeypatch):
    """`take("cusparselt")`: allows ways of this name, of which the first runs."""
    module = SimpleNamespace(unfold=unfold, fold=fold)
    monkeypatch.setitem(sys.modules, "sparsekern.ops.unfold_triton", module)
    for ours in (csr_conv_cuda, nm_conv_cuda):
        monkeypatch.setattr(ours, "_kernels", lambda op, x: True)

    def choose(start):
        def run(key, ways, like):
            return next(way for name, way in ways.items() if name.startswith(start))()

        for ours in (csr_conv_cuda, nm_conv_cuda):
            monkeypatch.setattr(ours, "run_fastest", run)

    return choose


def close(have, want, dtype):
    limit = (2e-2 if dtype == torch.bfloat16 else 1e-5) * float(want.abs().max())
    assert float((have.double() - want).abs().max()) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_csr_by_cusparse(dtype, take):
    values, crow, col = csr_of(random_weight(12, 6 * 9, 0.7))
    x, values, bias = torch.randn(2, 6, 7, 8).to(dtype), values.to(dtype), torch.randn(12).to(dtype)
    plans = [csr_cuda._plan(crow, col, 54, 1, 9, transpose=t) for t in (False, True)]
    take("unfolded cusparse")
    before = SPARSE.stub_count(b"spmm")
    got = csr_conv_cuda._conv(x, values, crow, col, bias, *plans, *GEOMETRY, "relu")
    exact = [x.double(), values.double(), crow, col, bias.double(), None, None]
    close(got, conv._conv_reference(*exact, *GEOMETRY, "relu"), dtype)
    grad = torch.randn(got.shape).to(dtype)
    got = csr_conv_cuda._grad_input(grad, values, crow, col, plans[1], 6, 7, 8, *GEOMETRY)
    exact = [grad.double(), values.double(), crow, col, None]
    close(got, conv._grad_input_reference(*exact, 6, 7, 8, *GEOMETRY), dtype)
    assert SPARSE.stub_count(b"spmm") >= before + 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_2_of_4_by_cusparselt(dtype, take):
    weight = torch.randn(32, 16, 3, 3)
    held = NMWeight.from_dense(weight, parse("2:4T").mask(weight.abs()), "2:4T")
    values, index = held.values.detach().to(dtype), held.index
    x, bias = torch.randn(2, 16, 7, 8).to(dtype), torch.randn(32).to(dtype)
    plans = [nm_cuda._plan(index, 32, 16, 2, 4, 1, 9, transpose=t) for t in (False, True)]
    take("cusparselt")
    before = LT.stub_lt_count(b"matmul")
    got = nm_conv_cuda._conv(x, values, index, bias, *plans, 2, 4, *GEOMETRY, "relu")
    exact = [x.double(), values.double(), index, bias.double(), None, None]
    close(got, nm_conv._conv_reference(*exact, 2, 4, *GEOMETRY, "relu"), torch.bfloat16)
    grad = torch.randn(got.shape).to(dtype)
    got = nm_conv_cuda._grad_input(grad, values, index, plans[1], 16, 7, 8, 2, 4, *GEOMETRY)
    exact = [grad.double(), values.double(), index, None]
    close(got, nm_conv._grad_input_reference(*exact, 16, 7, 8, 2, 4, *GEOMETRY), torch.bfloat16)
    assert LT.stub_lt_count(b"matmul") >= before + 2


def test_csr_without_a_plan_looks_at_every_index():
    values, crow, col = csr_of(random_weight(12, 6 * 9, 0.7))
    x, values = torch.randn(2, 6, 7, 8), values.float()
    size = conv.output_size(x.shape[2:], *GEOMETRY[:4])
    grad = torch.randn(2, 12, *size)
    with pytest.raises(RuntimeError, match=r"csr_conv2d: expected col to rise .* in \[0, 54\)"):
        csr_conv_cuda._conv(x, values, crow, col + 54, None, None, None, *GEOMETRY)
    with pytest.raises(RuntimeError, match="csr_conv2d_grad_input: expected col to rise"):
        csr_conv_cuda._grad_input(grad, values, crow, col + 54, None, 6, 7, 8, *GEOMETRY)
    with pytest.raises(RuntimeError, match="csr_conv2d_grad_values: expected col to rise"):
        csr_conv_cuda._grad_values(grad, x, crow, col + 54, None, *GEOMETRY)

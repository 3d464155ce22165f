"""The Triton kernels of CSR weights against float64 products, on the interpreter."""

import pytest
import torch

from sparsekern.ops import csr_triton
from sparsekern.ops.csr_decode_plan import csr_decode_pack, layout_of
from sparsekern.ops.csr_triton import csr_decode, csr_sddmm, csr_spmm

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-12}


def pattern(rows, cols, sparsity, dtype=torch.float32):
    """Values, crow, col and the dense float64 weight; an empty and a full row among many."""
    kept = torch.rand(rows, cols) >= sparsity
    if 0 < sparsity < 1 and rows > 2:
        kept[0], kept[1] = False, True
    dense = torch.randn(rows, cols).to(dtype) * kept
    dense = torch.where(kept & (dense == 0), 1.0, dense).to(dtype)
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = kept.sum(1).cumsum(0)
    return dense[kept], crow, kept.nonzero()[:, 1].to(torch.int32), dense.double()


def expect(got, x, dense, bias=None, activation="none"):
    want = x.double() @ dense.T + (0 if bias is None else bias.double())
    if activation == "relu":
        want = want.relu()
    elif activation != "none":
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        want = torch.nn.functional.gelu(want, approximate=approximate)
    assert got.dtype == x.dtype and got.is_contiguous()
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    tolerance = TOLERANCE[x.dtype] * scale
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0)


SIZES = [(9, 300, 0.5), (7, 70, 0.9), (5, 33, 0.0), (4, 1000, 0.995), (4, 40, 1.0), (1, 1, 0.0)]


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 64])
@pytest.mark.parametrize("rows, cols, sparsity", SIZES)
def test_decode(rows, cols, sparsity, tokens):
    values, crow, col, dense = pattern(rows, cols, sparsity)
    x, bias = torch.randn(tokens, cols), torch.randn(rows)
    plan = csr_decode_pack(crow, col, cols)
    expect(csr_decode(x, values, crow, col, plan, bias), x, dense, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 7, 17])
def test_decode_in_16_bits(dtype, tokens):
    values, crow, col, dense = pattern(70, 200, 0.6, dtype)
    x = torch.randn(tokens, 200).to(dtype)
    plan = csr_decode_pack(crow, col, 200)
    expect(csr_decode(x, values, crow, col, plan), x, dense)


@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_activations(tokens, activation):
    values, crow, col, dense = pattern(6, 64, 0.5)
    x, bias = torch.randn(tokens, 64), torch.randn(6)
    plan = csr_decode_pack(crow, col, 64)
    got = csr_decode(x, values, crow, col, plan, bias, activation)
    expect(got, x, dense, bias, activation)
    expect(csr_spmm(x, values, crow, col, bias, activation), x, dense, bias, activation)


@pytest.mark.parametrize("kernel", ["_narrow", "_wide", "_bitmap"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_each_kernel_on_the_same_pattern(kernel, sparsity):
    values, crow, col, dense = pattern(67, 130, sparsity)
    plan = csr_decode_pack(crow, col, 130)
    layout = layout_of(plan, 67, 130, values.numel())
    x, bias = torch.randn(2, 130), torch.randn(67)
    run = getattr(csr_triton, kernel)
    expect(run(x, values, crow, plan, layout, bias, "relu"), x, dense, bias, "relu")


@pytest.mark.parametrize("split", [1, 2, 3])
def test_parts_of_a_sum(split):
    values, crow, col, dense = pattern(20, 500, 0.5)
    plan = csr_decode_pack(crow, col, 500)
    layout = layout_of(plan, 20, 500, values.numel())
    x, bias = torch.randn(20, 500), torch.randn(20)
    got = csr_triton._bitmap(x, values, crow, plan, layout, bias, "gelu", split)
    expect(got, x, dense, bias, "gelu")


def test_a_gap_too_wide_for_a_byte():
    """One run of eight that spans more than 255 columns makes the plan hold 16-bit columns."""
    kept = torch.zeros(3, 70_000 // 2, dtype=torch.bool)
    kept[0, [0, 1, 34_999]], kept[2, [5, 300, 33_000]] = True, True
    crow = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    col = kept.nonzero()[:, 1].to(torch.int32)
    values = torch.randn(6)
    plan = csr_decode_pack(crow, col, kept.shape[1])
    assert not layout_of(plan, 3, kept.shape[1], 6).bytes
    dense = torch.zeros(kept.shape, dtype=torch.float64)
    dense[kept] = values.double()
    for tokens in (1, 4, 10):
        x = torch.randn(tokens, kept.shape[1])
        expect(csr_decode(x, values, crow, col, plan), x, dense)


def test_what_is_not_stored_touches_nothing():
    values, crow, col, dense = pattern(8, 64, 0.7)
    dead = (dense == 0).nonzero()[0]
    for tokens in (1, 2, 4, 6):
        x = torch.randn(tokens, 64)
        x[:, dead[1]] = float("inf")
        plan = csr_decode_pack(crow, col, 64)
        for kernel in ("_narrow", "_wide") if tokens <= 2 else ("_wide",):
            layout = layout_of(plan, 8, 64, values.numel())
            y = getattr(csr_triton, kernel)(x, values, crow, plan, layout, None, "none")
            assert y[:, dead[0]].isfinite().all()


def test_nothing_to_do():
    values, crow, col, _ = pattern(4, 16, 0.5)
    plan = csr_decode_pack(crow, col, 16)
    assert csr_decode(torch.randn(0, 16), values, crow, col, plan).shape == (0, 4)
    none = torch.zeros(1, dtype=torch.int32)
    empty = torch.empty(0, dtype=torch.int32)
    y = csr_decode(
        torch.randn(3, 16), torch.empty(0), none, empty, csr_decode_pack(none, empty, 16)
    )
    assert y.shape == (3, 0)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_spmm(dtype, tokens):
    values, crow, col, dense = pattern(5, 60, 0.6, dtype)
    x, bias = torch.randn(tokens, 60).to(dtype), torch.randn(5).to(dtype)
    expect(csr_spmm(x, values, crow, col, bias), x, dense, bias)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [0, 1, 6, 150])
def test_sddmm(dtype, tokens):
    _, crow, col, dense = pattern(5, 60, 0.6)
    grad, x = torch.randn(tokens, 5).to(dtype), torch.randn(tokens, 60).to(dtype)
    want = (grad.double().T @ x.double())[dense != 0]
    got = csr_sddmm(grad, x, crow, col)
    assert got.dtype == dtype
    scale = max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype] * scale, rtol=0)

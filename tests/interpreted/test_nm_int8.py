"""8-bit N:M products on CUDA: kernels and every way, on the interpreter."""

import pytest
import torch
from samples import random_nm

from sparsekern.ops import nm_cuda, nm_int8_cuda
from sparsekern.ops.nm import nm_to_dense
from sparsekern.ops.nm_int8 import dequantize_rows, quantize_tokens, rounded_tokens
from sparsekern.ops.nm_int8_triton import finish, quantize
from sparsekern.ops.nm_triton import nm_decode
from sparsekern.weights_int8 import Float8NMWeight, Int8NMWeight

KINDS = {"int8": Int8NMWeight, "float8": Float8NMWeight}


def parts(rows, cols, n, m, kind="int8"):
    """Values, scales, index, and the dense float64 weight they stand for."""
    values, index = random_nm(rows, cols, n, m)
    values, scales = KINDS[kind].quantized(values.float(), (index,), (rows, cols))
    wide = dequantize_rows(values, scales).double()
    return values, scales, index, nm_to_dense("test", wide, index, cols, n, m)


@pytest.mark.parametrize(("n", "m", "cols"), [(2, 4, 304), (2, 4, 68), (4, 8, 40), (2, 7, 30)])
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_reads_8_bits(dtype, tokens, n, m, cols):
    values, scales, index, dense = parts(70, cols, n, m)
    x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(70).to(dtype)
    for split in (1, 3) if dtype == torch.float32 else (1,):
        got = nm_decode(x, values, index, (70, cols, n, m), bias, "relu", split, scales)
        want = (x.double() @ dense.T + bias.double()).relu()
        limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=limit * float(want.max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cols", [1, 40, 1500])
def test_tokens_are_rounded_as_elsewhere(cols, dtype):
    x = torch.randn(5, cols).to(dtype)
    x[1], x[2, 0], x[3] = 0, torch.inf, torch.arange(cols) - 3.5
    for source in (x, torch.randn(5, 2 * cols).to(dtype)[:, :cols].copy_(x)):
        got, scales = quantize(source, torch.int8)
        want, exact = quantize_tokens(x, torch.int8)
        torch.testing.assert_close(scales, exact)
        here = [0, 1, 3, 4]  # what an infinity leaves of its token has no meaning
        assert int((got[here].int() - want[here].int()).abs().max()) <= 1
        assert float((got[here] != want[here]).float().mean()) < 0.01
    x[4, -1] = torch.nan
    assert quantize(x, torch.int8)[1][4].isnan() and quantize_tokens(x, torch.int8)[1][4].isnan()


def test_scales_bias_and_activation_behind_a_product():
    product, bias = torch.randn(3, 1100).bfloat16(), torch.randn(1100)
    tokens, rows = torch.rand(3, 1), torch.rand(1100)
    for act, f in (("none", lambda y: y), ("relu", torch.relu)):
        got = finish(product, tokens, rows, bias, act, torch.float32)
        torch.testing.assert_close(got, f(product.float() * tokens * rows + bias))
    assert finish(product, tokens, rows, None, "none", torch.float16).dtype == torch.float16


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize(
    ("tokens", "dynamic"), [(0, False), (3, False), (66, False), (0, True), (3, True)]
)
def test_every_way(tokens, dynamic, kind, monkeypatch):
    found = {}

    def run_all(key, ways, like):
        found.update({name: way() for name, way in ways.items()})
        return ways["dense"]()

    def product(x, packed, bias, rows, activation):
        assert bias is None and activation == "none" and x.element_size() == 1
        return (x.float() @ packed.float().t()).bfloat16()

    # Neither float8 nor its conversions are to be had on the interpreter: torch does those.
    no_kernels = kind == "float8"
    monkeypatch.setattr(nm_int8_cuda, "run_fastest", run_all)
    monkeypatch.setattr(nm_cuda, "_kernels", lambda x: not no_kernels)
    monkeypatch.setattr(nm_int8_cuda, "_has_float8", lambda x: True)
    monkeypatch.setattr(nm_int8_cuda, "packed_way", lambda *a, **k: lambda values, make: make())
    monkeypatch.setattr(nm_int8_cuda.cslt, "linear", product)
    values, scales, index, dense = parts(20, 36, 2, 4, kind)
    x, bias = torch.randn(tokens, 36), torch.randn(20)
    got = nm_int8_cuda._linear(x, values, scales, index, bias, None, 2, 4, dynamic, "gelu")
    seen = rounded_tokens(x, values.dtype) if dynamic else x
    want = torch.nn.functional.gelu(seen.double() @ dense.T + bias.double())
    assert got.shape == (tokens, 20) and got.dtype == torch.float32
    if not tokens:
        return
    names = {"dense", "cusparselt"} if dynamic else {"dense"}
    if not (dynamic or no_kernels or tokens > 64):
        names.add("decode")
    assert set(found) == names
    limit = 2**-8 if dynamic else 1e-5  # products of 8 bits come out in bfloat16
    for y in found.values():
        torch.testing.assert_close(y.double(), want, atol=limit * float(want.max()), rtol=0)

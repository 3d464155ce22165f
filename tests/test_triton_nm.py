"""The Triton kernel of N:M weights, compiled for GPUs that need not be there; and its refusals.

What it computes is tested in `tests/interpreted/test_nm_triton.py`.
"""

import pytest
import torch
from triton_common import compile_for

pytest.importorskip("triton")
from sparsekern.ops import decode_triton, nm_int8_triton, nm_triton

END = {"HAS_BIAS": True, "ACTIVATION": "gelu", "UPCAST": False}


def build(dtype, tokens, cap, n=2, m=4, split=1, fixed=None, stored=None):
    packed = dtype == "bf16" and (n, m) == (2, 4) and not stored
    constants = {
        **nm_triton.settings(tokens, n, m, packed),
        **END,
        "SPLIT": split,
        "SCALED": bool(stored),
        "FLOAT8": stored == "fp8",
        **({} if stored else {"scales": None}),
        **(fixed or {}),
    }
    options = {"num_warps": constants.pop("num_warps")}
    types = {"index": "*u8", "y": "*fp32" if split > 1 else f"*{dtype}"}
    if stored:
        types |= {"values": "*i8", "scales": "*fp32"}
    for name in nm_triton.decode_kernel.arg_names:
        if name not in constants and name not in types:
            types[name] = f"*{dtype}" if name in ("x", "values", "bias") else "i32"
    return compile_for(nm_triton.decode_kernel, types, constants, cap, **options).check()


@pytest.mark.parametrize(
    "dtype, tokens, cap",
    [("bf16", 64, 80), ("bf16", 1, 90), ("bf16", 64, 90), ("fp32", 16, 90), ("bf16", 64, 100)],
)
def test_kernel_compiles(dtype, tokens, cap):
    built = build(dtype, tokens, cap)
    if cap == 90:
        assert "wgmma" in built.ptx


@pytest.mark.parametrize("n, m", [(1, 4), (4, 8), (2, 7)])
def test_kernel_compiles_for_other_patterns(n, m):
    build("bf16", 32, 90, n, m, split=4)


def test_kernel_compiles_for_sizes_of_one():
    """A launch makes constants of every size of 1, and of a bias that is None."""
    ones = dict.fromkeys(("rows", "tokens", "row_bytes", "steps"), 1)
    build("bf16", 1, 90, fixed={**ones, "bias": None, "HAS_BIAS": False})


@pytest.mark.parametrize(
    "stored, dtype, cap",
    [("i8", "bf16", 80), ("i8", "fp16", 90), ("i8", "fp32", 90), ("fp8", "bf16", 90)],
)
def test_kernel_compiles_for_values_of_8_bits(stored, dtype, cap):
    build(dtype, 16, cap, stored=stored)


@pytest.mark.parametrize("cap", [80, 90])
def test_kernels_around_8_bit_products_compile(cap):
    for kind in ("i8", "fp8e4nv") if cap == 90 else ("i8",):
        types = {"x": "*bf16", "out": f"*{kind}", "scales": "*fp32", "cols": "i32"}
        constants = {"LARGEST": 127.0, "FLOAT": kind != "i8", "COLUMNS": nm_int8_triton.COLUMNS}
        kernel = nm_int8_triton.quantize_kernel
        compile_for(kernel, {**types, "by_token": "i32"}, constants, cap).check()
    types = dict.fromkeys(("product", "bias", "y"), "*bf16")
    types |= dict.fromkeys(("token_scales", "row_scales"), "*fp32")
    constants = {"HAS_BIAS": True, "ACTIVATION": "gelu", "COLUMNS": nm_int8_triton.COLUMNS}
    types |= dict.fromkeys(("rows", "by_token"), "i32")
    compile_for(nm_int8_triton.finish_kernel, types, constants, cap).check()


def test_sum_of_parts_compiles():
    types = {"parts": "*fp32", "bias": "*bf16", "y": "*bf16", "rows": "i32", "size": "i32"}
    constants = {"SPLIT": 8, "BLOCK": 1024, "HAS_BIAS": True, "ACTIVATION": "gelu_tanh"}
    compile_for(decode_triton.finish_kernel, types, constants, 90).check()


def test_parts_fill_the_device():
    cpu = torch.device("cpu")
    assert decode_triton.split_for(64, 100, cpu) == 1
    assert decode_triton.split_for(1, 100, cpu) == decode_triton.PROGRAMS_PER_SM
    assert decode_triton.split_for(1, 2, cpu) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(65, 16)}, "expected x with at most 64 rows, got 65"),
        ({"shape": (4, 12, 2, 4)}, r"expected values of shape \(4, 6\), index of 4 rows and x"),
        ({"x": torch.zeros(1, 16).double()}, "expected values of the dtype of x"),
    ],
)
def test_refusals(change, message):
    arguments = {"x": torch.zeros(1, 16), "values": torch.zeros(4, 8), "shape": (4, 16, 2, 4)}
    arguments["index"] = torch.zeros(4, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="nm_decode: " + message):
        nm_triton.nm_decode(**{**arguments, **change})


def test_float64_is_refused():
    x, values = torch.zeros(1, 16).double(), torch.zeros(4, 8).double()
    index = torch.zeros(4, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="nm_decode: expected x of 16 or 32 bits, got"):
        nm_triton.nm_decode(x, values, index, (4, 16, 2, 4))

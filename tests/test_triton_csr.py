"""The Triton kernels of CSR weights, compiled for GPUs that need not be there; and their refusals.

What they compute is tested in `tests/interpreted/test_csr_triton.py`.
"""

import pytest
import torch
from triton_common import compile_for

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from sparsekern.ops import csr_triton  # noqa: E402
from sparsekern.ops.csr_decode_plan import csr_decode_pack, decode_layout, layout_of  # noqa: E402

FLOATS = ("x", "x_t", "values", "bias", "y", "grad_t", "grad_values")
POINTERS = {"crow": "*i32", "col": "*i32", "plan": "*i32"}
END = {"HAS_BIAS": True, "ACTIVATION": "gelu"}
CASES = {
    "narrow 1": ("narrow_kernel", {"TOKENS": 1, "RUNS": 32, "BYTES": True, **END}, 1),
    "narrow 2": ("narrow_kernel", {"TOKENS": 2, "RUNS": 128, "BYTES": True, **END}, 4),
    "narrow, 16-bit": ("narrow_kernel", {"TOKENS": 1, "RUNS": 32, "BYTES": False, **END}, 1),
    "wide 4": ("wide_kernel", {"TOKENS": 4, "ITEMS": 128, "BYTES": True, **END}, 1),
    "wide 8": ("wide_kernel", {"TOKENS": 8, "ITEMS": 128, "BYTES": False, **END}, 2),
    "spmm": ("spmm_kernel", {"TOKENS": 128, "ITEMS": 8, "SUM": tl.float32, **END}, 1),
    "sddmm": ("sddmm_kernel", {"TOKENS": 128, "ITEMS": 8, "SUM": tl.float32}, 1),
}


def build(name, constants, dtype, cap, warps):
    kernel = getattr(csr_triton, name)
    types = {}
    for argument in kernel.arg_names:
        if argument not in constants:
            float_type = f"*{dtype}" if argument in FLOATS else "i32"
            types[argument] = POINTERS.get(argument, float_type)
    return compile_for(kernel, types, constants, cap, num_warps=warps).check()


@pytest.mark.parametrize("case", list(CASES))
def test_kernels_compile(case):
    name, constants, warps = CASES[case]
    built = build(name, constants, "bf16", 90, warps)
    if case == "narrow 1":  # eight values and eight distances in one load each
        assert "LDG.E.128" in built.sass and "LDG.E.64" in built.sass


@pytest.mark.parametrize("case", ["narrow 2", "wide 4", "bitmap", "spmm", "sddmm"])
def test_kernels_compile_for_sizes_of_one(case):
    """A launch makes constants of every size of 1, and of a bias that is None."""
    bitmap = {**csr_triton.bitmap_settings(1, 2), "SPLIT": 2, "UPCAST": False, **END}
    bitmap.pop("num_warps")
    name, constants, warps = {**CASES, "bitmap": ("bitmap_kernel", bitmap, 4)}[case]
    arguments = getattr(csr_triton, name).arg_names
    ones = ("rows", "cols", "tokens", "steps", "columns_at", "words_at", "prefix_at")
    constants = {**constants, **{size: 1 for size in ones if size in arguments}}
    if "bias" in arguments:
        constants |= {"bias": None, "HAS_BIAS": False}
    build(name, constants, "bf16", 90, warps)


@pytest.mark.parametrize("cap", [80, 100])
@pytest.mark.parametrize("case", ["narrow 1", "wide 8"])
def test_kernels_compile_for_other_gpus(case, cap):
    name, constants, warps = CASES[case]
    build(name, constants, "fp16", cap, warps)


BLACKWELL = pytest.mark.xfail(
    triton.__version__ < "3.7",
    reason="Triton 3.6 fails with 'Illegal shared layout'; at run time the way is then left out",
    raises=RuntimeError,
    strict=True,
)


@pytest.mark.parametrize(
    "dtype, tokens, cap",
    [
        ("bf16", 64, 80),
        ("bf16", 64, 90),
        ("fp32", 16, 90),
        pytest.param("bf16", 16, 100, marks=BLACKWELL),
    ],
)
def test_bitmap_kernel_compiles(dtype, tokens, cap):
    constants = csr_triton.bitmap_settings(tokens, {"bf16": 2, "fp32": 4}[dtype])
    warps = constants.pop("num_warps")
    constants |= {"SPLIT": 1, "UPCAST": False, **END}
    built = build("bitmap_kernel", constants, dtype, cap, warps)
    assert "popc" in built.ptx  # LLVM saw what the shifts and masks are
    if cap == 90:
        assert "wgmma" in built.ptx


def pattern():
    crow = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    return crow, torch.tensor([0, 5, 39], dtype=torch.int32)


def test_plans_of_other_patterns_are_refused():
    crow, col = pattern()
    plan = csr_decode_pack(crow, col, 40)
    assert layout_of(plan, 3, 40, 3) == decode_layout(3, 40, 3, True, False)
    with pytest.raises(
        RuntimeError, match="csr_decode: expected plan of 9 words for 3 x 40 with 3"
    ):
        layout_of(plan[:5], 3, 40, 3)
    assert csr_decode_pack(crow, col, 70_000).numel() == 0


def test_bitmap_of_a_plan():
    crow = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    col = torch.tensor([0, 1, 31, 32, 1, 2, 33], dtype=torch.int32)
    plan = csr_decode_pack(crow, col, 34)
    layout = layout_of(plan, 3, 34, 7)
    words = plan[layout.words :][:6].tolist()
    assert words == [3 - 2**31, 1, 0, 0, 6, 2]
    assert plan[layout.prefix :].view(torch.int16)[:6].tolist() == [0, 3, 0, 0, 0, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(40)}, r"expected x with 2 dimensions, got shape \(40,\)"),
        ({"x": torch.zeros(65, 40)}, "expected x with at most 64 rows, got 65"),
        ({"x": torch.zeros(1, 40).int()}, "expected x of a floating dtype of 16 to 64 bits, got"),
        ({"values": torch.zeros(3).half()}, "expected values of the dtype of x"),
        ({"values": torch.zeros(3, device="meta")}, "expected values on the device of x"),
        ({"bias": torch.zeros(2)}, r"expected bias of shape \(3,\), got \(2,\)"),
        ({"activation": "tanh"}, "expected activation to be none, relu, .*, got"),
    ],
)
def test_refusals(change, message):
    crow, col = pattern()
    arguments = {"x": torch.zeros(1, 40), "values": torch.zeros(3), "crow": crow, "col": col}
    arguments["plan"] = csr_decode_pack(crow, col, 40)
    with pytest.raises(RuntimeError, match="csr_decode: " + message):
        csr_triton.csr_decode(**{**arguments, **change})


def test_sddmm_refuses_other_shapes():
    crow, col = pattern()
    with pytest.raises(RuntimeError, match=r"csr_sddmm: expected grad of shape \(2, 3\), got"):
        csr_triton.csr_sddmm(torch.zeros(2, 4), torch.zeros(2, 40), crow, col)

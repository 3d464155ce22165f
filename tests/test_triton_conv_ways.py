"""The kernels of csr and N:M convolutions compile for GPUs that need not be there, without spills.

What they compute is tested in `tests/interpreted/test_conv_ways.py`.
"""

import pytest
import torch
from triton_common import compile_for

pytest.importorskip("triton")
from sparsekern.ops import conv_triton, csr_conv_triton, nm_conv_triton, unfold_triton
from sparsekern.ops.block_tuning import GradConfig
from sparsekern.ops.conv_triton import Geometry

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
THREE = ((3, 3), (1, 1), (1, 1), (1, 1))
CAPS = [("bf16", 80), ("bf16", 90), ("fp32", 90), ("fp16", 100)]


def build(kernel, dtype, constants, cap, **types):
    """Compile with every argument that is not named a 32-bit size."""
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    named = {k: t for k, t in types.items() if k not in constants}
    sizes = {n: "i32" for n in kernel.arg_names if n not in constants and n not in named}
    return compile_for(kernel, {**named, **sizes}, constants, cap, **options).check()


@pytest.mark.parametrize(("dtype", "cap"), CAPS)
def test_direct_kernels(dtype, cap):
    x, kind, index = torch.empty(0, dtype=DTYPES[dtype]), f"*{dtype}", "*i32"
    fixed = csr_conv_triton.constants(x, (3, 3), (1, 1), (1, 1), 6272)
    end = {"HAS_BIAS": True, "ACTIVATION": "gelu"}
    tensors = {"x": kind, "values": kind, "crow": index, "col": index, "bias": kind, "y": kind}
    build(csr_conv_triton.conv_kernel, dtype, {**fixed, **end}, cap, **tensors)
    tensors = {"grad": kind, "x": kind, "row_of": "*i64", "col": index, "out": kind}
    build(csr_conv_triton.sddmm_kernel, dtype, dict(fixed), cap, **tensors)


@pytest.mark.parametrize(("dtype", "cap"), CAPS)
def test_unfold_and_fold(dtype, cap):
    kind = f"*{dtype}"
    fixed = {**unfold_triton.constants(THREE, True), "PIXELS": unfold_triton.PIXELS}
    fixed["DEPTH"] = unfold_triton.DEPTH
    build(unfold_triton.unfold_kernel, dtype, dict(fixed), cap, x=kind, out=kind)
    fixed |= {"SUM": unfold_triton.sum_type(torch.empty(0)), "DEPTH": unfold_triton.FOLDED}
    build(unfold_triton.fold_kernel, dtype, fixed, cap, columns=kind, y=kind)


@pytest.mark.parametrize(
    ("dtype", "cap", "n", "m"), [*((*case, 2, 4) for case in CAPS), ("bf16", 80, 4, 8)]
)
def test_implicit_kernel(dtype, cap, n, m):
    kind = f"*{dtype}"
    fixed = nm_conv_triton.constants(THREE, n, m, 6272, DTYPES[dtype])
    fixed |= {"SPLIT": 1, "HAS_BIAS": True, "ACTIVATION": "relu", "num_warps": 4, "num_stages": 3}
    tensors = {"x": kind, "values": kind, "index": "*u8", "bias": kind, "y": kind}
    built = build(nm_conv_triton.conv_kernel, dtype, fixed, cap, **tensors)
    if (dtype, cap) == ("bf16", 90):
        assert "wgmma.mma_async" in built.ptx


@pytest.mark.parametrize(
    ("dtype", "cap", "side"),
    [("bf16", 80, 16), ("bf16", 90, 128), ("fp32", 90, 128), ("fp16", 100, 16)],
)
def test_weight_gradient_of_blocks(dtype, cap, side):
    kind, index = f"*{dtype}", "*i32"
    step = 128 // DTYPES[dtype].itemsize
    config = conv_triton.with_places(GradConfig(side, 128, step))
    geometry = Geometry(*THREE, 1)
    fixed = conv_triton.sddmm_constants(config, (side, side), geometry, DTYPES[dtype])
    tensors = {"grad": kind, "x": kind, "out": kind}
    tensors |= dict.fromkeys(("crow", "col", "row_of", "chunks"), index)
    fixed |= {"num_warps": config.warps, "num_stages": config.stages}
    build(conv_triton.sddmm_kernel, dtype, fixed, cap, **tensors)

"""The kernels of blocks compile for three generations of GPUs: memory, spills, instructions.

pytest compiles a part of the table; `python tests/test_triton_block.py` all of it (ten minutes).
"""

import itertools
from dataclasses import replace

import pytest
import torch
from triton_common import compile_for

from sparsekern.ops import block_triton
from sparsekern.ops.block_tuning import (
    HOPPER,
    GradConfig,
    SpmmConfig,
    default_config,
    grad_config,
    table_config,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIDES, TOKENS = (16, 32, 64, 128), (16, 64, 4096)


def spmm(dtype, block, config, cap=90, transposed=False, inner=4096, precision=None, spills=0):
    """`spmm_kernel` as a launch would compile it."""
    pointer = f"*{dtype}"
    types = dict.fromkeys(("x", "values", "bias", "y"), pointer)
    types |= dict.fromkeys(("crow", "col", "order"), "*i32")
    types |= dict.fromkeys(("tokens", "outer", "rows"), "i32")
    height, depth = block[::-1] if transposed else block
    constants = block_triton.spmm_constants(
        replace(config, split=config.split or 1),
        height,
        depth,
        transposed,
        inner % depth != 0,
        DTYPES[dtype],
    )
    # The launch passes sizes that are divisible by 16 with that hint; here they are constants.
    constants |= {"x_stride": inner, "inner": inner, "HAS_BIAS": True, "ACTIVATION": "gelu"}
    constants |= {"PRECISION": precision} if precision else {}
    if config.tma:
        tile = (config.depth, config.height) if transposed else (config.height, config.depth)
        types["x"] = f"tensordesc<{dtype}[{config.tokens}, {config.depth}]>"
        types["values"] = f"tensordesc<{dtype}[{tile[0]}, {tile[1]}]>"
    if transposed:
        types["slot"] = "*i32"
    else:
        constants["slot"] = None
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return compile_for(block_triton.spmm_kernel, types, constants, cap, **options).check(spills)


def sddmm(dtype, block, config, cap=90):
    """`sddmm_kernel` as a launch would compile it."""
    types = dict.fromkeys(("grad", "x", "out"), f"*{dtype}")
    types |= dict.fromkeys(("crow", "col", "row_of", "chunks"), "*i32")
    types |= dict.fromkeys(("tokens", "inner", "outer", "count"), "i32")
    constants = block_triton.sddmm_constants(config, *block, (4096, 4096), DTYPES[dtype])
    constants |= {"grad_stride": 4096, "x_stride": 4096}
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return compile_for(block_triton.sddmm_kernel, types, constants, cap, **options).check()


def table(dtype, side, tokens):
    return table_config(2 if dtype != "fp32" else 4, tokens, side, side)


def grad_table(dtype, side) -> GradConfig:
    x = torch.empty(4096, 0, dtype=DTYPES[dtype])
    return grad_config(x, 1000, (side, side), 132)


@pytest.mark.parametrize("tokens", [16, 4096])
@pytest.mark.parametrize("side", SIDES)
def test_forward_on_hopper(side, tokens):
    built = spmm("bf16", (side, side), table("bf16", side, tokens))
    assert ("wgmma.mma_async" in built.ptx) == (tokens >= 64)  # fewer tokens than a warpgroup takes
    assert "cp.async.cg.shared.global" in built.ptx  # 16 bytes a thread, past the registers
    assert "cp.async.wait_group" in built.ptx


@pytest.mark.parametrize("side", SIDES)
def test_input_gradient_on_hopper(side):
    built = spmm("fp16", (side, side), table("fp16", side, 4096), transposed=True)
    assert "wgmma.mma_async" in built.ptx and "cp.async.cg.shared.global" in built.ptx


@pytest.mark.parametrize("side", SIDES)
def test_weight_gradient_on_hopper(side):
    built = sddmm("bf16", (side, side), grad_table("bf16", side))
    assert "cp.async.cg.shared.global" in built.ptx
    assert ("wgmma.mma_async" in built.ptx) == (side >= 64)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_float32_on_hopper(precision):
    built = spmm("fp32", (64, 64), table("fp32", 64, 4096), precision=precision)
    assert "wgmma.mma_async" in built.ptx and ".tf32.tf32" in built.ptx
    sddmm("fp32", (64, 64), grad_table("fp32", 64))


@pytest.mark.parametrize(
    ("side", "dtype"), [(16, "bf16"), (64, "fp16"), (128, "bf16"), (64, "fp32")]
)
@pytest.mark.parametrize("cap", [80, 100])
def test_other_generations(cap, side, dtype):
    built = spmm(dtype, (side, side), table(dtype, side, 4096), cap)
    assert ("tcgen05.mma" if cap == 100 else "mma.sync") in built.ptx


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_the_copy_engine(transposed):
    config = SpmmConfig(256, 128, 64, 8, 4, tma=True)
    # Triton 3.9 puts numbers of the epilogue on the stack while the loop runs, and not in the loop.
    built = spmm("bf16", (128, 128), config, transposed=transposed, spills=128)
    loop = built.sass[built.sass.index("HGMMA") : built.sass.rindex("HGMMA")]
    assert "STL" not in loop and "LDL" not in loop
    assert "cp.async.bulk.tensor" in built.ptx and "cp.async.cg" not in built.ptx


def test_a_ragged_edge_keeps_wide_loads():
    built = spmm("bf16", (64, 64), table("bf16", 64, 4096), inner=4000 + 16)
    assert "cp.async.cg.shared.global" in built.ptx


@pytest.mark.parametrize("side", SIDES)
def test_the_default_fits_the_smallest_cards(side):
    spmm("bf16", (side, side), default_config(2, 4096, side, side), 89)


def all_cases():
    """Every entry of the table, every dtype, both directions, three generations."""
    assert {most for _, _, most in HOPPER} >= {64}
    for cap, dtype, side, tokens in itertools.product((80, 90, 100), DTYPES, SIDES, TOKENS):
        for transposed in (False, True):
            yield cap, dtype, side, tokens, transposed


if __name__ == "__main__":
    for cap, dtype, side, tokens, transposed in all_cases():
        config = table(dtype, side, tokens)
        try:
            built = spmm(dtype, (side, side), config, cap, transposed)
            said = f"{built.shared // 1024} KB, {built.registers} registers"
        except AssertionError as error:
            said = f"FAILED {error}"
        print(f"sm_{cap} {dtype} {side} T={tokens} transposed={transposed}: {said}", flush=True)

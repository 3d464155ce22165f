"""The convolution kernel compiles for three generations of GPUs: memory, spills, instructions."""

from dataclasses import replace

import pytest
import torch
from triton_common import compile_for

from sparsekern.ops import conv_triton
from sparsekern.ops.block_tuning import table_config
from sparsekern.ops.conv_triton import Geometry

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
THREE = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
ONE = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)


def conv(dtype, block, geometry, cap=90, pixels=25_088, split=1, channels=256, turned=False):
    """`conv_kernel` as a launch would compile it; `turned` for the gradient of the input."""
    itemsize = 4 if dtype == "fp32" else 2
    config = conv_triton.tile_of_pixels(table_config(itemsize, pixels, *block))
    config = replace(config, split=split)
    types = dict.fromkeys(("x", "values"), f"*{dtype}")
    types |= dict.fromkeys(("crow", "col", "order"), "*i32")
    types["y"] = f"*{dtype}" if split == 1 else "*fp32"
    sizes = ("pixels", "outputs", "rows", "per_group", "height", "width")
    types |= dict.fromkeys((*sizes, "out_height", "out_width"), "i32")
    ragged = channels % block[1] != 0
    constants = conv_triton.conv_constants(config, block, geometry, ragged, DTYPES[dtype], turned)
    if turned:
        types["slot"] = "*i32"
    else:
        constants["slot"] = None
    constants |= {"channels": channels, "HAS_BIAS": split == 1}
    constants["ACTIVATION"] = "gelu" if split == 1 else "none"
    if split == 1:
        types["bias"] = f"*{dtype}"
    else:
        constants["bias"] = None
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return compile_for(conv_triton.conv_kernel, types, constants, cap, **options).check()


@pytest.mark.parametrize("geometry", [THREE, ONE], ids=["3x3", "1x1"])
@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_on_hopper(side, geometry):
    built = conv("bf16", (side, side), geometry)
    assert "wgmma.mma_async" in built.ptx
    assert "cp.async.cg.shared.global" in built.ptx  # 16 bytes a thread, past the registers


@pytest.mark.parametrize("cap", [80, 100])
@pytest.mark.parametrize(("side", "dtype"), [(16, "fp16"), (64, "bf16"), (32, "fp32")])
def test_other_generations(side, dtype, cap):
    assert "cp.async" in conv(dtype, (side, side), THREE, cap).ptx


def test_parts_of_rows_and_ragged_channels():
    conv("bf16", (64, 64), THREE, split=4, pixels=49)
    conv("bf16", (64, 64), THREE, channels=272)
    conv("bf16", (32, 8), THREE._replace(groups=4))


@pytest.mark.parametrize("side", [16, 64])
def test_the_gradient_of_the_input(side):
    assert "wgmma.mma_async" in conv("bf16", (side, side), THREE, turned=True).ptx

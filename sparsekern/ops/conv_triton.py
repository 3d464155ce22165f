"""Triton kernel of a convolution with a weight of dense blocks, as an implicit matrix product.

Output pixels take the place of tokens. A block has one kernel position, so the loop over a row of
blocks reads, for each, a tile of input pixels that lie next to each other in channels_last; no
column matrix is made. The result is stored as contiguous (n, out, oh, ow), whatever the input.

This module imports Triton; nothing but a call with CUDA tensors imports this module.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .block_triton import (
    Index,
    padded,
    place_of,
    reduce_parts,
    upcast,
)
from .block_tuning import SpmmConfig, precision, with_split
from .decode_triton import activate, multiprocessors


class Geometry(NamedTuple):
    """Of a convolution, as the op takes it."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@triton.jit(do_not_specialize=["pixels", "rows", "height", "width", "out_height", "out_width"])
def conv_kernel(
    x, values, crow, col, order, bias, y, pixels, channels, outputs, rows, per_group, height, width,
    out_height, out_width,
    HEIGHT: tl.constexpr, DEPTH: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
    TAPS: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    RAGGED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_T pixels x BLOCK_N outputs of a row of blocks; see `spmm_kernel`.

    x is (n, height, width, GROUPS * channels), y (SPLIT, n, GROUPS * outputs, oh, ow), float32 if
    SPLIT > 1; channels and outputs are those of one group, per_group its rows of blocks.
    """
    pixel_tiles = tl.cdiv(pixels, BLOCK_T)
    parts: tl.constexpr = SPLIT * ((HEIGHT + BLOCK_N - 1) // BLOCK_N)
    tile = tl.program_id(0)
    part = (tile // pixel_tiles) % parts
    row = tl.load(order + tile // pixel_tiles // parts)
    group = row // per_group
    start, end = tl.load(crow + row), tl.load(crow + row + 1)
    if BLOCK_K > PADDED:
        steps = tl.cdiv(end - start, BLOCK_K // PADDED)
    else:
        steps = (end - start) * (PADDED // BLOCK_K)
    first, last = 0, steps
    if SPLIT > 1:
        share = tl.cdiv(steps, SPLIT)
        first = (part % SPLIT) * share
        last = tl.minimum(first + share, steps)
    pixel = (tile % pixel_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = tl.minimum(pixel, pixels - 1)  # those past the last read it again and are not stored
    image, at = at // (out_height * out_width), at % (out_height * out_width)
    top = (at // out_width) * STRIDE_H - PAD_H
    left = (at % out_width) * STRIDE_W - PAD_W
    corner = (image.to(tl.int64) * height + top) * width + left
    x_pixels = x + corner[:, None] * (GROUPS * channels) + group * channels
    row_height = (part // SPLIT) * BLOCK_N + tl.arange(0, BLOCK_N)
    deep = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    column, place = place_of(col, None, start, end, first, PADDED, BLOCK_K, False)
    for step in range(first, last):
        next_column, next_place = place_of(col, None, start, end, step + 1, PADDED, BLOCK_K, False)
        tap = column % TAPS
        down, right = (tap // KERNEL_W) * DILATION_H, (tap % KERNEL_W) * DILATION_W
        if BLOCK_K > PADDED:
            depth = deep % PADDED
            stored = start + step * (BLOCK_K // PADDED) + deep // PADDED < end
            row_in = top[:, None] + down[None, :]
            col_in = left[:, None] + right[None, :]
        else:
            depth = (step % (PADDED // BLOCK_K)) * BLOCK_K + deep
            stored = depth < DEPTH
            row_in, col_in = (top + down)[:, None], (left + right)[:, None]
        channel = (column // TAPS) * DEPTH + depth
        if RAGGED or PADDED != DEPTH:
            stored = stored & (depth < DEPTH) & (channel < channels)
        offset = (down * width + right) * (GROUPS * channels) + channel
        if BLOCK_K > PADDED and PADDED == DEPTH and not RAGGED:
            offset = tl.max_contiguous(tl.multiple_of(offset, DEPTH), DEPTH)
        seen = (row_in >= 0) & (row_in < height) & (col_in >= 0) & (col_in < width)
        a = tl.load(x_pixels + offset[None, :], mask=seen & stored[None, :], other=0.0)
        block = values + place.to(tl.int64) * (HEIGHT * DEPTH) + depth
        mask = stored[:, None] & (row_height[None, :] < HEIGHT)
        b = tl.load(block[:, None] + row_height[None, :] * DEPTH, mask=mask, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        column, place = next_column, next_place
    local = (row % per_group) * HEIGHT + row_height
    inside = (row_height < HEIGHT) & (local < outputs)
    output = group * outputs + local
    if HAS_BIAS:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.trans(activate(total, ACTIVATION))  # pixels lie next to each other in y
    images = pixels // (out_height * out_width)
    first_output = ((part % SPLIT).to(tl.int64) * images + image) * (GROUPS * outputs)
    y_tile = y + (first_output[None, :] + output[:, None]) * (out_height * out_width) + at[None, :]
    mask = inside[:, None] & (pixel < pixels)[None, :]
    tl.store(y_tile, total.to(y.dtype.element_ty), mask=mask)


def conv_constants(config: SpmmConfig, block, geometry: Geometry, ragged: bool, dtype) -> dict:
    """The constants of `conv_kernel` that follow from a config, a block and a geometry."""
    names = ("STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DILATION_H", "DILATION_W")
    sizes = (*geometry.stride, *geometry.padding, *geometry.dilation)
    return dict(
        zip(names, sizes),
        HEIGHT=block[0],
        DEPTH=block[1],
        PADDED=padded(block[1]),
        GROUPS=geometry.groups,
        TAPS=geometry.kernel_size[0] * geometry.kernel_size[1],
        KERNEL_W=geometry.kernel_size[1],
        BLOCK_T=config.tokens,
        BLOCK_N=config.height,
        BLOCK_K=config.depth,
        SPLIT=config.split,
        RAGGED=ragged,
        PRECISION=precision(dtype),
        UPCAST=upcast(dtype),
    )


def block_conv(x, values, index: Index, bias, y, geometry, activation: str, config: SpmmConfig):
    """Y (n, out, oh, ow) = act(conv2d(x, W) + b), written to the contiguous y; returns y.

    Args:
        x: `(n, in, h, w)`, channels_last, float16, bfloat16 or float32.
        values: `(n_blocks, R, C)`, contiguous, of the same dtype.
        index: Of the blocks, with columns that count (block of channels, kernel position).
        bias: `(out,)` or None.
        y: Output, contiguous.
        geometry: Of the convolution.
        activation: none, relu, relu6, gelu or gelu_tanh.
        config: See `block_tuning.candidates`; persistent and tma do not count here.
    """
    images, outputs, out_height, out_width = y.shape
    pixels, rows, block = images * out_height * out_width, index.order.numel(), values.shape[1:]
    if y.numel() == 0:
        return y
    channels, outputs = x.shape[1] // geometry.groups, outputs // geometry.groups
    processors = multiprocessors(x.device)
    config = with_split(config, pixels, values.shape[0], rows, tuple(block), processors)
    split = config.split
    to = x.new_empty(split, *y.shape, dtype=torch.float32) if split > 1 else y
    now = (bias, activation) if split == 1 else (None, "none")
    tiles = triton.cdiv(pixels, config.tokens) * rows * triton.cdiv(block[0], config.height)
    conv_kernel[(tiles * split,)](
        x, values, index.crow, index.col, index.order, now[0], to, pixels, channels, outputs,
        rows, rows // geometry.groups, *x.shape[2:], out_height, out_width,
        **conv_constants(config, block, geometry, channels % block[1] != 0, x.dtype),
        HAS_BIAS=now[0] is not None, ACTIVATION=now[1],
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split > 1:
        reduce_parts(to, y, bias, activation, out_height * out_width)
    return y

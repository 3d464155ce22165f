"""Triton kernels of convolutions with a weight of dense blocks, as implicit matrix products.

Output pixels take the place of tokens. A block has one kernel position, so the loop over a row of
blocks reads, for each, a tile of input pixels that lie next to each other in channels_last; no
column matrix is made. The result is stored as contiguous (n, out, oh, ow), whatever the input.
The input gradient of a stride of 1 is the same product with the transposed index; the weight
gradient is a product of pixels only where blocks are.

This module imports Triton; nothing but a call with CUDA tensors imports this module.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .block_triton import (
    Index,
    place_of,
    reduce_parts,
    upcast,
)
from .block_tuning import GradConfig, SpmmConfig, grad_config, precision, with_split
from .cuda_support import ceil_div, power_of_two
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
    x, values, crow, col, slot, order, bias, y, pixels, channels, outputs, rows, per_group, height,
    width, out_height, out_width,
    HEIGHT: tl.constexpr, DEPTH: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr,
    PADDED: tl.constexpr, GROUPS: tl.constexpr, HAS_SLOT: tl.constexpr,
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
    column, place = place_of(col, slot, start, end, first, PADDED, BLOCK_K, HAS_SLOT)
    for step in range(first, last):
        next_column, next_place = place_of(
            col, slot, start, end, step + 1, PADDED, BLOCK_K, HAS_SLOT
        )
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
        block = values + place.to(tl.int64) * (HEIGHT * DEPTH) + depth * STRIDE_K
        mask = stored[:, None] & (row_height[None, :] < HEIGHT)
        b = tl.load(block[:, None] + row_height[None, :] * STRIDE_N, mask=mask, other=0.0)
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
    # Counted from the tile's first image in 32 bits, which takes half the registers of pointers.
    plane = out_height * out_width
    first_image = tl.minimum((tile % pixel_tiles) * BLOCK_T, pixels - 1) // plane
    ahead = (part % SPLIT).to(tl.int64) * (pixels // plane) + first_image
    offset = (image - first_image) * (GROUPS * outputs * plane) + at
    y_tile = y + ahead * (GROUPS * outputs * plane) + (output * plane)[:, None] + offset[None, :]
    mask = inside[:, None] & (pixel < pixels)[None, :]
    tl.store(y_tile, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "count", "height", "width", "out_plane", "out_width"])
def sddmm_kernel(
    grad, x, crow, col, row_of, chunks, out, pixels, count, channels, outputs, per_group, height,
    width, out_plane, out_width,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
    TAPS: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows x BLOCK_C columns of a chunk of blocks: grad^T x over all output pixels.

    As `sddmm_kernel` of `block_triton`, but each block meets the image at its kernel position.
    grad is (pixels, GROUPS * outputs), x (n, height, width, GROUPS * channels).
    """
    split, row_part = tl.program_id(1) % SPLIT, tl.program_id(1) // SPLIT
    first = tl.load(chunks + tl.program_id(0))
    row = tl.load(row_of + first)
    group = row // per_group
    wide = tl.arange(0, BLOCK_C)
    block = first + wide // PADDED
    depth = wide % PADDED
    if BLOCK_C < PADDED:
        depth = tl.program_id(2) * BLOCK_C + wide
    stored = (block < tl.load(crow + row + 1)) & (depth < WIDTH)
    column = tl.load(col + block, mask=stored, other=0)
    channel = (column // TAPS) * WIDTH + depth
    tap = column % TAPS
    down, right = (tap // KERNEL_W) * DILATION_H, (tap % KERNEL_W) * DILATION_W
    local = row_part * BLOCK_R + tl.arange(0, BLOCK_R)
    output = (row % per_group) * HEIGHT + local
    in_rows = (local < HEIGHT) & (output < outputs)
    in_cols = stored & (channel < channels)
    offset = (down * width + right) * (GROUPS * channels) + group * channels + channel
    share = tl.cdiv(tl.cdiv(pixels, SPLIT), BLOCK_T) * BLOCK_T
    end = tl.minimum((split + 1) * share, pixels)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for begin in range(split * share, end, BLOCK_T):
        pixel = begin + tl.arange(0, BLOCK_T)
        here = (pixel < end)[:, None]
        image, at = (pixel // out_plane).to(tl.int64), pixel % out_plane
        top, left = (at // out_width) * STRIDE_H - PAD_H, (at % out_width) * STRIDE_W - PAD_W
        corner = ((image * height + top) * width + left) * (GROUPS * channels)
        a = grad + pixel.to(tl.int64)[:, None] * (GROUPS * outputs)
        a = tl.load(a + group * outputs + output[None, :], mask=here & in_rows[None, :], other=0.0)
        row_in, col_in = top[:, None] + down[None, :], left[:, None] + right[None, :]
        seen = (row_in >= 0) & (row_in < height) & (col_in >= 0) & (col_in < width) & here
        b = tl.load(x + corner[:, None] + offset[None, :], mask=seen & in_cols[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    total = tl.where(in_rows[:, None] & in_cols[None, :], total, 0.0)  # NaN * 0 beyond the edge
    to = split.to(tl.int64) * count + block.to(tl.int64) * (HEIGHT * WIDTH) + depth
    mask = (local < HEIGHT)[:, None] & stored[None, :]
    tl.store(out + to[None, :] + local[:, None] * WIDTH, total.to(out.dtype.element_ty), mask=mask)


def geometry_constants(geometry: Geometry) -> dict:
    """What all kernels want to know of a geometry."""
    names = ("STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DILATION_H", "DILATION_W")
    return dict(
        zip(names, (*geometry.stride, *geometry.padding, *geometry.dilation)),
        GROUPS=geometry.groups,
        TAPS=geometry.kernel_size[0] * geometry.kernel_size[1],
        KERNEL_W=geometry.kernel_size[1],
    )


def conv_constants(
    config: SpmmConfig, block, geometry: Geometry, ragged: bool, dtype, transposed: bool = False
) -> dict:
    """The constants of `conv_kernel` that follow from a config, a block and a geometry.

    `block` is (outputs, inputs) of the product; `transposed` if values hold it the other way.
    """
    return dict(
        geometry_constants(geometry),
        HEIGHT=block[0],
        DEPTH=block[1],
        STRIDE_N=1 if transposed else block[1],
        STRIDE_K=block[0] if transposed else 1,
        HAS_SLOT=transposed,
        PADDED=power_of_two(block[1]),
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
        index: Of the blocks, with columns that count (block of channels, kernel position); with
            `slot` it is that of the transposed weight and values are read turned.
        bias: `(out,)` or None.
        y: Output, contiguous.
        geometry: Of the convolution.
        activation: none, relu, relu6, gelu or gelu_tanh.
        config: See `block_tuning.candidates`; persistent and tma do not count here.
    """
    images, outputs, out_height, out_width = y.shape
    pixels, rows, block = images * out_height * out_width, index.order.numel(), values.shape[1:]
    transposed = index.slot is not None
    block = tuple(block[::-1]) if transposed else tuple(block)
    if y.numel() == 0:
        return y
    channels, outputs = x.shape[1] // geometry.groups, outputs // geometry.groups
    processors = multiprocessors(x.device)
    config = with_split(config, pixels, values.shape[0], rows, block, processors)
    split = config.split
    to = x.new_empty(split, *y.shape, dtype=torch.float32) if split > 1 else y
    now = (bias, activation) if split == 1 else (None, "none")
    tiles = ceil_div(pixels, config.tokens) * rows * ceil_div(block[0], config.height)
    conv_kernel[(tiles * split,)](
        x, values, *index, now[0], to, pixels, channels, outputs, rows, rows // geometry.groups,
        *x.shape[2:], out_height, out_width,
        **conv_constants(config, block, geometry, channels % block[1] != 0, x.dtype, transposed),
        HAS_BIAS=now[0] is not None, ACTIVATION=now[1],
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split > 1:
        reduce_parts(to, y, bias, activation, out_height * out_width)
    return y


def tile_of_pixels(config: SpmmConfig) -> SpmmConfig:
    """A config of the matrix kernel with room for the place of every pixel: at most 128 of them.

    Sums and places of 256 x 64 do not fit into the registers with Triton 3.6.
    """
    return replace(config, tokens=min(config.tokens, 128))


def with_places(config: GradConfig) -> GradConfig:
    """A config of the matrix kernel with room for the place of every element of the image."""
    return replace(config, tokens=config.tokens // 2, warps=8)


def sddmm_constants(config: GradConfig, block, geometry: Geometry, dtype) -> dict:
    """The constants of `sddmm_kernel` for blocks (outputs, inputs) and a geometry."""
    return dict(
        geometry_constants(geometry),
        HEIGHT=block[0],
        WIDTH=block[1],
        PADDED=power_of_two(block[1]),
        BLOCK_R=config.rows,
        BLOCK_C=config.cols,
        BLOCK_T=config.tokens,
        SPLIT=config.split,
        PRECISION=precision(dtype),
        UPCAST=upcast(dtype),
    )


def block_conv_sddmm(grad, x, index, block, geometry: Geometry, config: GradConfig | None = None):
    """The gradient (n_blocks, R, C) of the values, from grad (n, out, oh, ow) and x (n, in, h, w).

    Both channels_last. `index` is (crow, col, row of each block, first block of each chunk), as for
    `sddmm` of `block_triton`. Runs on the current device.
    """
    crow, col, row_of, chunks = index
    images, outputs, out_height, out_width = grad.shape
    pixels = images * out_height * out_width
    out = x.new_empty(col.numel(), *block)
    if out.numel() == 0 or pixels == 0:
        return out.zero_()
    if config is None:
        config = grad_config(x, chunks.numel(), block, multiprocessors(x.device), pixels)
        config = with_places(config)
    split, groups = config.split, geometry.groups
    to = x.new_empty(split, *out.shape, dtype=torch.float32) if split > 1 else out
    parts = split * ceil_div(block[0], config.rows)
    sddmm_kernel[(chunks.numel(), parts, ceil_div(block[1], config.cols))](
        grad, x, crow, col, row_of, chunks, to, pixels, out.numel(), x.shape[1] // groups,
        outputs // groups, (crow.numel() - 1) // groups, *x.shape[2:], out_height * out_width,
        out_width, **sddmm_constants(config, block, geometry, x.dtype),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split > 1:
        reduce_parts(to, out, None, "none")
    return out

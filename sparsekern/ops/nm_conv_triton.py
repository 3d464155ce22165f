"""Triton kernel of a convolution with an N:M weight, as an implicit matrix product.

The weight is read as it is stored, spread to its M channels in registers and multiplied by the
tensor cores with a tile of pixels that lie next to each other in channels_last. It moves the bytes
of the N:M weight and does the arithmetic of the dense one, so it can win where reading the weight
counts: many channels, few pixels. As in a dense layer, an infinite or NaN input also reaches
outputs that do not store its weight.

This module imports Triton; nothing but a call with CUDA tensors imports this module.
"""

import torch
import triton
import triton.language as tl

from .block_triton import reduce_parts, upcast
from .block_tuning import precision
from .cuda_support import ceil_div, power_of_two
from .decode_triton import activate, on_device, split_for
from .nm import slot_bits
from .nm_triton import _group_tile

ROWS, DEPTH = 64, 32  # outputs and inputs of a step


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv_kernel(
    x, values, index, bias, y, pixels, channels, rows, height, width, out_height, out_width,
    slots, row_bytes, chunks,
    N: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr, TAPS: tl.constexpr,
    KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ROWS: tl.constexpr,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ROWS outputs x PIXELS pixels; x (n, h, w, channels), y (SPLIT, n, rows, oh, ow).

    A step takes GROUPS groups of M channels at one kernel position; chunks steps make a position.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    part = tl.program_id(2)
    out_plane = out_height * out_width
    image, at = (pixel // out_plane).to(tl.int64), pixel % out_plane
    top = (at // out_width) * STRIDE_H - PAD_H
    left = (at % out_width) * STRIDE_W - PAD_W
    corner = ((image * height + top) * width + left) * channels
    place = tl.arange(0, GROUPS * WIDE)
    share = (TAPS * chunks + SPLIT - 1) // SPLIT
    total = tl.zeros((ROWS, PIXELS), tl.float32)
    for step in range(part * share, tl.minimum(part * share + share, TAPS * chunks)):
        tap, chunk = step // chunks, step % chunks
        group = chunk * GROUPS + tl.arange(0, GROUPS)
        known = (row < rows)[:, None] & (group * M < channels)[None, :]
        tile = _group_tile(
            values, index, row.to(tl.int64), group * TAPS + tap, known, slots, row_bytes,
            N, M, WIDE, BITS,
        )  # fmt: skip
        weight = tl.reshape(tile, (ROWS, GROUPS * WIDE))
        if WIDE == M:  # runs that 16-byte loads may take
            channel = chunk * (GROUPS * M) + place
            real = channel < channels
        else:
            channel = (chunk * GROUPS + place // WIDE) * M + place % WIDE
            real = (channel < channels) & (place % WIDE < M)
        down, right = (tap // KERNEL_W) * DILATION_H, (tap % KERNEL_W) * DILATION_W
        seen = (top + down >= 0) & (top + down < height) & (left + right >= 0)
        seen = seen & (left + right < width) & (pixel < pixels)
        source = x + corner[None, :] + ((down * width + right) * channels + channel)[:, None]
        image_tile = tl.load(source, mask=seen[None, :] & real[:, None], other=0)
        if UPCAST:
            weight, image_tile = weight.to(tl.float32), image_tile.to(tl.float32)
        total = tl.dot(weight, image_tile, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    total = activate(total, ACTIVATION)
    images = pixels // out_plane
    to = ((part * images + image) * rows)[None, :] + row[:, None]
    mask = (row < rows)[:, None] & (pixel < pixels)[None, :]
    tl.store(y + to * out_plane + at[None, :], total.to(y.dtype.element_ty), mask=mask)


def constants(geometry, n: int, m: int, pixels: int, dtype) -> dict:
    """The constants for (kernel_size, stride, padding, dilation) that keep values in registers."""
    kernel_size, *pairs = geometry
    names = ("STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DILATION_H", "DILATION_W")
    wide = power_of_two(m)
    return dict(
        zip(names, (size for pair in pairs for size in pair)),
        N=n,
        M=m,
        WIDE=wide,
        BITS=slot_bits(m),
        TAPS=kernel_size[0] * kernel_size[1],
        KERNEL_W=kernel_size[1],
        ROWS=ROWS,
        PIXELS=max(16, min(64 if n <= 2 else 32, power_of_two(pixels))),
        GROUPS=DEPTH // wide,
        PRECISION=precision(dtype),
        UPCAST=upcast(dtype),
    )


def nm_conv(x, values, index, bias, y, geometry, n: int, m: int, activation="none", split=None):
    """Y (n, out, oh, ow) = act(conv2d(x, W) + b), written to the contiguous y; returns y.

    Args:
        x: `(n, in, h, w)`, channels_last, float16, bfloat16 or float32.
        values: `(out, slots)`, contiguous, of the same dtype; see `nm_conv2d`.
        index: `(out, bytes)` uint8, contiguous, checked before.
        bias: `(out,)` or None.
        y: Output, contiguous.
        geometry: kernel_size, stride, padding, dilation, in pairs; one group.
        n: Kept of every m channels.
        m: At most 16.
        activation: none, relu, relu6, gelu or gelu_tanh.
        split: Parts of each sum; by default what fills the device.
    """
    images, rows, *out = y.shape
    if y.numel() == 0:
        return y
    pixels, channels = images * out[0] * out[1], x.shape[1]
    fixed = constants(geometry, n, m, pixels, x.dtype)
    chunks = ceil_div(ceil_div(channels, m), fixed["GROUPS"])
    tiles = (ceil_div(rows, ROWS), ceil_div(pixels, fixed["PIXELS"]))
    split = split or split_for(tiles[0] * tiles[1], fixed["TAPS"] * chunks, x.device)
    to = y if split == 1 else x.new_empty(split, *y.shape, dtype=torch.float32)
    now = (bias, activation) if split == 1 else (None, "none")
    with on_device(x):
        conv_kernel[(*tiles, split)](
            x, values, index, now[0], to, pixels, channels, rows, *x.shape[2:],
            *out, values.shape[1], index.shape[1], chunks, **fixed, SPLIT=split,
            HAS_BIAS=now[0] is not None, ACTIVATION=now[1], num_warps=4, num_stages=3,
        )  # fmt: skip
        if split > 1:
            reduce_parts(to, y, bias, activation, out[0] * out[1])
    return y

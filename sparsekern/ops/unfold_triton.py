"""Images to the rows of a matrix and back, for products that know matrices only.

`unfold` gives a row to each output pixel and a column to each (kernel position, channel) that it
reads, `fold` adds such columns up again, which is the gradient of the former. Both take any strides
and read or write each element once; sums are float32, in a fixed order.

This module imports Triton; nothing but a call with CUDA tensors imports this module.
"""

import torch
import triton
import triton.language as tl

from .conv import output_size
from .cuda_support import ceil_div, power_of_two
from .decode_triton import on_device, sum_type

PIXELS, DEPTH = 32, 128  # of a tile; fewer channels where columns are added up, to hold them
FOLDED = 32


@triton.jit
def _split(column, channels, TAPS: tl.constexpr, TAP_MAJOR: tl.constexpr):
    """Kernel position and channel of a column."""
    if TAP_MAJOR:
        tap, channel = column // channels, column % channels
    else:
        tap, channel = column % TAPS, column // TAPS
    return tap, channel


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_plane", "out_width"])
def unfold_kernel(
    x, out, pixels, channels, height, width, out_plane, out_width, by_image, by_channel, by_row,
    by_pixel,
    TAPS: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    TAP_MAJOR: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """PIXELS x DEPTH of out (pixels, TAPS * channels)."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    column = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    image, at = (pixel // out_plane).to(tl.int64), pixel % out_plane
    tap, channel = _split(column, channels, TAPS, TAP_MAJOR)
    top = (at // out_width) * STRIDE_H - PAD_H
    left = (at % out_width) * STRIDE_W - PAD_W
    row = top[:, None] + ((tap // KERNEL_W) * DILATION_H)[None, :]
    col = left[:, None] + ((tap % KERNEL_W) * DILATION_W)[None, :]
    inside = (pixel < pixels)[:, None] & (column < TAPS * channels)[None, :]
    seen = inside & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    start = (image * by_image)[:, None] + (channel.to(tl.int64) * by_channel)[None, :]
    value = tl.load(x + start + row * by_row + col * by_pixel, mask=seen, other=0)
    to = out + (pixel.to(tl.int64) * (TAPS * channels))[:, None] + column[None, :]
    tl.store(to, value, mask=inside)


@triton.jit(do_not_specialize=["pixels", "plane", "width", "out_height", "out_width"])
def fold_kernel(
    columns, y, pixels, channels, plane, width, out_height, out_width,
    TAPS: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    TAP_MAJOR: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """PIXELS x DEPTH channels of y (n, channels, plane) from columns as `unfold_kernel` makes."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    image, at = (pixel // plane).to(tl.int64), pixel % plane
    top, left = at // width + PAD_H, at % width + PAD_W
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    total = tl.zeros((PIXELS, DEPTH), SUM)
    for tap in range(TAPS):
        down = top - (tap // KERNEL_W) * DILATION_H
        right = left - (tap % KERNEL_W) * DILATION_W
        meets = (down >= 0) & (right >= 0) & (down % STRIDE_H == 0) & (right % STRIDE_W == 0)
        row, col = down // STRIDE_H, right // STRIDE_W
        meets = meets & (row < out_height) & (col < out_width)
        source = (image * out_height + row) * out_width + col
        if TAP_MAJOR:
            column = tap * channels + channel
        else:
            column = channel * TAPS + tap
        place = columns + (source * (TAPS * channels))[:, None] + column[None, :]
        total += tl.load(place, mask=inside & meets[:, None], other=0).to(SUM)
    to = y + (image * channels * plane + at)[:, None] + (channel.to(tl.int64) * plane)[None, :]
    tl.store(to, total, mask=inside)


def constants(geometry, tap_major: bool) -> dict:
    """The constants of both kernels for (kernel_size, stride, padding, dilation)."""
    kernel_size, *pairs = geometry
    names = ("STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DILATION_H", "DILATION_W")
    return dict(
        zip(names, (size for pair in pairs for size in pair)),
        TAPS=kernel_size[0] * kernel_size[1],
        KERNEL_W=kernel_size[1],
        TAP_MAJOR=tap_major,
    )


def unfold(x: torch.Tensor, geometry, tap_major: bool) -> torch.Tensor:
    """What a convolution reads, `(n * oh * ow, kh * kw * channels)`.

    Args:
        x: `(n, channels, h, w)`, any strides.
        geometry: kernel_size, stride, padding, dilation, in pairs.
        tap_major: Columns count (kernel position, channel), else (channel, kernel position).
    """
    images, channels, height, width = x.shape
    out = output_size((height, width), *geometry)
    pixels, depth = images * out[0] * out[1], channels * geometry[0][0] * geometry[0][1]
    rows = x.new_empty(pixels, depth)
    if rows.numel():
        with on_device(x):
            unfold_kernel[(ceil_div(pixels, PIXELS), ceil_div(depth, DEPTH))](
                x, rows, pixels, channels, height, width, out[0] * out[1], out[1], *x.stride(),
                **constants(geometry, tap_major), PIXELS=PIXELS, DEPTH=DEPTH,
            )  # fmt: skip
    return rows


def fold(columns: torch.Tensor, size, geometry, tap_major: bool) -> torch.Tensor:
    """The contiguous image `size = (n, channels, h, w)` whose `unfold` has these gradients."""
    images, channels, height, width = size
    out = output_size((height, width), *geometry)
    y = columns.new_empty(size)
    pixels, depth = images * height * width, min(FOLDED, power_of_two(channels))
    if y.numel():
        with on_device(columns):
            fold_kernel[(ceil_div(pixels, PIXELS), ceil_div(channels, depth))](
                columns, y, pixels, channels, height * width, width, *out,
                **constants(geometry, tap_major), PIXELS=PIXELS, DEPTH=depth,
                SUM=sum_type(columns),
            )  # fmt: skip
    return y

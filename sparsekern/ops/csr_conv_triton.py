"""Triton kernels of direct convolutions with CSR weights: no column matrix is made.

Each stored weight meets the image shifted by its kernel position (Park et al. 2017, "Faster CNNs
with Direct Sparse Convolutions and Guided Pruning", section 2.1). Images are contiguous
(n, channels, h, w) and padded before, so that nothing has to be tested inside of the loops: pixels
that lie next to each other are read next to each other. The input gradient is the same product on
the transposed pattern with turned kernel positions. Sums are float32 (float64 for float64), always
in the same order.

This module imports Triton; nothing but a call with CUDA tensors imports this module.
"""

import torch
import triton
import triton.language as tl

from .cuda_support import ceil_div, power_of_two
from .decode_triton import activate, on_device, sum_type

ITEMS = 8  # stored weights of a step


@triton.jit(do_not_specialize=["pixels", "plane", "width", "out_plane", "out_width"])
def conv_kernel(
    x, values, crow, col, bias, y, pixels, rows, per_group, channels, in_group, plane, width,
    out_plane, out_width,
    TAPS: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PIXELS: tl.constexpr, ITEMS: tl.constexpr,
    SUM: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One output channel of the weight times PIXELS output pixels.

    x is (n, channels, plane), plane = h * width after padding; y (n, rows, out_plane). Columns
    count (channel of the group, kernel position); a group has per_group rows, in_group channels.
    """
    row = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    image, at = (pixel // out_plane).to(tl.int64), pixel % out_plane
    corner = (at // out_width) * (STRIDE_H * width) + (at % out_width) * STRIDE_W
    first = (image * channels + (row // per_group) * in_group) * plane + corner
    begin, end = tl.load(crow + row), tl.load(crow + row + 1)
    total = tl.zeros((PIXELS,), SUM)
    for step in range(begin, end, ITEMS):
        item = step + tl.arange(0, ITEMS)
        kept = item < end
        value = tl.load(values + item, mask=kept, other=0).to(SUM)
        column = tl.load(col + item, mask=kept, other=0)
        tap = column % TAPS
        shift = (tap // KERNEL_W) * (DILATION_H * width) + (tap % KERNEL_W) * DILATION_W
        shift += (column // TAPS) * plane
        here = kept[:, None] & (pixel < pixels)[None, :]
        seen = tl.load(x + shift[:, None] + first[None, :], mask=here, other=0)
        total += tl.sum(value[:, None] * seen.to(SUM), 0)
    if HAS_BIAS:
        total += tl.load(bias + row).to(SUM)
    to = y + (image * rows + row) * out_plane + at
    tl.store(to, activate(total, ACTIVATION), mask=pixel < pixels)


@triton.jit(do_not_specialize=["pixels", "plane", "width", "out_plane", "out_width"])
def sddmm_kernel(
    grad, x, row_of, col, out, nnz, pixels, rows, per_group, channels, in_group, plane, width,
    out_plane, out_width,
    TAPS: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PIXELS: tl.constexpr, ITEMS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """The gradient of ITEMS stored weights: grad (n, rows, out_plane) times the shifted image."""
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    kept = item < nnz
    row = tl.load(row_of + item, mask=kept, other=0).to(tl.int64)
    column = tl.load(col + item, mask=kept, other=0)
    tap = column % TAPS
    shift = (tap // KERNEL_W) * (DILATION_H * width) + (tap % KERNEL_W) * DILATION_W
    shift += ((row // per_group) * in_group + column // TAPS) * plane
    total = tl.zeros((ITEMS, PIXELS), SUM)
    for begin in range(0, pixels, PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        image, at = (pixel // out_plane).to(tl.int64), pixel % out_plane
        corner = (at // out_width) * (STRIDE_H * width) + (at % out_width) * STRIDE_W
        here = kept[:, None] & (pixel < pixels)[None, :]
        left = grad + (row * out_plane)[:, None] + (image * rows * out_plane + at)[None, :]
        right = x + shift[:, None] + (image * channels * plane + corner)[None, :]
        left, right = tl.load(left, mask=here, other=0), tl.load(right, mask=here, other=0)
        total += left.to(SUM) * right.to(SUM)
    tl.store(out + item, tl.sum(total, 1), mask=kept)


def constants(x, kernel_size, stride, dilation, pixels: int) -> dict:
    """The constants that both kernels share."""
    return {
        "TAPS": kernel_size[0] * kernel_size[1],
        "KERNEL_W": kernel_size[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "PIXELS": min(128, power_of_two(pixels)),
        "ITEMS": ITEMS,
        "SUM": sum_type(x),
        "num_warps": 1,
    }


def _sizes(x, y_channels: int, out_size, groups: int) -> tuple[int, ...]:
    """The sizes both kernels take, from `pixels` on."""
    images, channels, height, width = x.shape
    out_plane = out_size[0] * out_size[1]
    shares = (y_channels, y_channels // groups, channels, channels // groups)
    return (images * out_plane, *shares, height * width, width, out_plane, out_size[1])


def csr_conv(x, values, index, bias, y, kernel_size, stride, dilation, groups, activation="none"):
    """Y = act(conv2d(x, W) + b) without padding, written to the contiguous y; returns y.

    Args:
        x: `(n, channels, h, w)`, contiguous, padded before; 16 to 64 bits.
        values: `(nnz,)` of the same dtype.
        index: crow `(rows + 1,)` and col `(nnz,)`, int32, columns as `conv_kernel` takes them.
        bias: `(rows,)` or None.
        y: `(n, rows, oh, ow)`, contiguous.
        kernel_size: And stride, dilation, groups: as `torch.nn.Conv2d` takes them, in pairs.
        stride: See there.
        dilation: See there.
        groups: See there.
        activation: none, relu, relu6, gelu or gelu_tanh.
    """
    sizes = _sizes(x, y.shape[1], y.shape[2:], groups)
    fixed = constants(x, kernel_size, stride, dilation, sizes[0])
    if y.numel():
        with on_device(x):
            conv_kernel[(y.shape[1], ceil_div(sizes[0], fixed["PIXELS"]))](
                x, values, *index, bias, y, *sizes, **fixed,
                HAS_BIAS=bias is not None, ACTIVATION=activation,
            )  # fmt: skip
    return y


def csr_conv_sddmm(grad, x, index, kernel_size, stride, dilation, groups) -> torch.Tensor:
    """The gradient (nnz,) of the values: grad (n, rows, oh, ow), x padded as for `csr_conv`.

    `index` is the row of each value, `(nnz,)`, and col, `(nnz,)` int32.
    """
    sizes = _sizes(x, grad.shape[1], grad.shape[2:], groups)
    row, col = index
    values = x.new_empty(col.numel()) if sizes[0] else x.new_zeros(col.numel())
    if values.numel() and sizes[0]:
        fixed = constants(x, kernel_size, stride, dilation, sizes[0])
        with on_device(x):
            sddmm_kernel[(ceil_div(values.numel(), ITEMS),)](
                grad, x, row, col, values, values.numel(), *sizes, **fixed
            )
    return values

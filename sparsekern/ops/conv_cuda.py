"""Convolutions on CUDA: what the formats share, and those with weights of blocks.

- block_conv2d: the implicit product of `conv_triton` on blocks that fit it (see `misfit` in
  `block_cuda`); its input gradient is the same product on the transposed index, its weight gradient
  a product of pixels where blocks are.
- csr_conv2d and nm_conv2d: see `csr_conv_cuda` and `nm_conv_cuda`.

Beside each stands the dense weight, put together on the device without waiting for it, and the
convolution of torch; the fastest is kept. Results are contiguous (n, out, oh, ow), as on the CPU.
"""

import functools
from functools import partial

import torch
from torch.nn.functional import conv2d

from . import block_conv
from ._library import CUDA, check_activation
from .block import block_grid
from .block_cuda import (
    backward_parts,
    blocks_of,
    check_pattern,
    check_values,
    choice_key,
    dense_weight,
    forward_parts,
    takes_kernel,
)
from .block_tuning import candidates, precision, worth_timing
from .conv import dense_grad_input, output_size
from .cuda_choice import run_fastest, shape_key, token_bucket
from .cuda_support import check, check_bias, check_operand, finish, refuse, state_once

# The kernel counts from the first image of a tile in 32 bits; a tile may begin in one image and
# end in the next.
MOST_OUTPUTS = 2**29


def check_image(op: str, x) -> None:
    """Refuse what is no batch of images."""
    if x.dim() != 4:
        refuse(op, "x with 4 dimensions", f"shape {tuple(x.shape)}")


def empty_output(op, x, outputs, kernel_size, stride, padding, dilation, groups):
    """The uninitialised result of a convolution, after checks of its geometry."""
    check_image(op, x)
    divides = groups >= 1 and x.shape[1] % groups == 0 and outputs % groups == 0
    wanted = f"groups that divide in_channels = {x.shape[1]} and out_channels = {outputs}"
    check(divides, op, wanted, groups)
    size = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    wanted = "an input at least as large as the kernel"
    check(min(size) >= 1, op, wanted, f"input size {tuple(x.shape[2:])}")
    return x.new_empty(x.shape[0], outputs, *size)


def _block_conv(
    x, values, crow, col, bias, plan, plan_t, out_channels,
    kernel_size, stride, padding, dilation, groups, activation="none",
):  # fmt: skip
    op, geometry = block_conv.CONV, (kernel_size, stride, padding, dilation, groups)
    y = empty_output(op, x, out_channels, *geometry)
    check_values(op, x, values, col)
    channels, taps = x.shape[1] // groups, kernel_size[0] * kernel_size[1]
    rows = block_grid(out_channels, channels, values.shape[1:], groups)[0]
    check_pattern(op, x, crow, col, rows)
    check_bias(op, bias, x, out_channels)
    check_activation(op, activation)
    order, row, _ = forward_parts(op, plan, crow, col, channels, values.shape[2], taps)

    def dense():
        weight = dense_weight(values, row, col, out_channels, channels, groups, taps)
        y = conv2d(x, weight.unflatten(2, kernel_size), bias, *geometry[1:])
        return finish(y, None, activation, op).contiguous()

    with torch.cuda.device_of(x):
        ways = _block_ways(op, x, values, (crow, col, None, order), bias, y, geometry, activation)
        key = choice_key(op, x, values, out_channels, channels, y.numel() // out_channels)
        key = (*key, *conv_key(x, y, geometry))
        return run_fastest(key, {**ways, "dense": dense}, x)


def _block_ways(op, x, values, index, bias, y, geometry, activation, source=None) -> dict:
    """The configs worth timing, by name, as calls of the kernel; none where it does not fit.

    `source` makes the input of the product where that is not x.
    """
    block = tuple(values.shape[1:]) if index[2] is None else tuple(values.shape[:0:-1])
    if not takes_kernel(op, values, block[0]) or 0 in (y.numel(), values.numel(), x.numel()):
        return {}
    if y[0].numel() >= MOST_OUTPUTS:
        wanted = f"expected fewer than {MOST_OUTPUTS} outputs of an image, got {y[0].numel()}"
        state_once(f"{op} is computed with the dense weight: {wanted}")
        return {}
    from .block_triton import Index
    from .conv_triton import Geometry, block_conv

    pixels = token_bucket(y.numel() // y.shape[1])  # which are the tokens
    geometry = Geometry(*geometry)

    def run(config):
        last = (source() if source else x).contiguous(memory_format=torch.channels_last)
        arguments = (values.contiguous(), Index(*index), bias, y, geometry, activation, config)
        return block_conv(last, *arguments)

    found = _configs(x.device, x.element_size(), pixels, block)
    found = worth_timing(found, pixels, values.numel())
    return {name: partial(run, config) for name, config in found.items()}


@functools.lru_cache(maxsize=1024)
def _configs(device, itemsize: int, pixels: int, block: tuple[int, int]) -> dict:
    """Those of the matrix product that the kernel can use, cut to its tiles."""
    from .conv_triton import tile_of_pixels

    found = candidates(device, itemsize, pixels, block).values()
    found = [tile_of_pixels(c) for c in found if not (c.persistent or c.tma)]
    return {str(c): c for c in found}


def _block_conv_grad_input(
    grad, values, crow, col, plan_t, channels, height, width,
    kernel_size, stride, padding, dilation, groups,
):  # fmt: skip
    op, taps = "block_conv2d_grad_input", kernel_size[0] * kernel_size[1]
    check_values(op, grad, values, col)
    outputs, per_group = grad.shape[1], channels // groups
    rows = block_grid(outputs, per_group, values.shape[1:], groups)[0]
    check_pattern(op, grad, crow, col, rows)
    sizes = (per_group, values.shape[2], taps, groups)
    index = backward_parts(op, plan_t, crow, col, *sizes)
    y = grad.new_empty(grad.shape[0], channels, height, width)
    geometry = (kernel_size, stride, padding, dilation, groups)

    def dense():
        weight = dense_weight(values, rows_of(crow, col), col, outputs, per_group, groups, taps)
        return dense_grad_input(
            grad, weight.unflatten(2, kernel_size), y.shape[1:], geometry[1:]
        )  # fmt: skip

    with torch.cuda.device_of(grad):
        turned = turned_geometry(geometry)
        spread = lambda: insert_zeros(grad, stride)  # noqa: E731
        ways = _block_ways(op, grad, values, index, None, y, turned, "none", spread)
        key = choice_key(op, grad, values, outputs, channels, y.numel() // channels)
        key = (*key, *conv_key(grad, y, geometry))
        return run_fastest(key, {**ways, "dense": dense}, grad)


def _block_conv_grad_values(
    grad, x, crow, col, plan, block_rows, block_cols,
    kernel_size, stride, padding, dilation, groups,
):  # fmt: skip
    op, taps = "block_conv2d_grad_values", kernel_size[0] * kernel_size[1]
    block, geometry = (block_rows, block_cols), (kernel_size, stride, padding, dilation, groups)
    check_operand(op, "grad", grad, x, x.dtype)
    channels = x.shape[1] // groups
    check_pattern(op, x, crow, col, block_grid(grad.shape[1], channels, block, groups)[0])
    _, row, chunks = forward_parts(op, plan, crow, col, channels, block_cols, taps)

    def dense():
        shape = (grad.shape[1], channels, *kernel_size)
        full = torch.nn.grad.conv2d_weight(x, shape, grad, stride, padding, dilation, groups)
        return blocks_of(full.flatten(2), row, col, block, groups)

    def kernel():
        from .conv_triton import Geometry, block_conv_sddmm

        last = [t.contiguous(memory_format=torch.channels_last) for t in (grad, x)]
        return block_conv_sddmm(*last, (crow, col, row, chunks), block, Geometry(*geometry))

    ways = {"kernel": kernel} if takes_kernel(op, x, block_rows) else {}
    with torch.cuda.device_of(x):
        pixels = grad.numel() // max(1, grad.shape[1])
        key = shape_key(op, x, grad.shape[1], x.shape[1], col.numel(), pixels)
        key = (*key, block, precision(x.dtype), *conv_key(x, grad, geometry))
        return run_fastest(key, {**ways, "dense": dense}, x)


def conv_key(x, y, geometry) -> tuple:
    """What the choice of a way depends on besides the shape of the product."""
    layout = x.is_contiguous(memory_format=torch.channels_last)
    return (*map(tuple, geometry[:4]), geometry[4], tuple(x.shape[2:]), tuple(y.shape[2:]), layout)


def turned_geometry(geometry) -> tuple:
    """The geometry of the convolution that gives the gradient of the input.

    Its input is the gradient of the output with zeros between its pixels (`insert_zeros`), its
    weight has kernel positions from the last to the first; padding may be negative.
    """
    kernel_size, _, padding, dilation, groups = geometry
    padding = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel_size, padding))
    return (kernel_size, (1, 1), padding, dilation, groups)


def insert_zeros(grad, stride):
    """A gradient `(n, c, oh, ow)` at the stride of its convolution: the rest is 0."""
    if tuple(stride) == (1, 1):
        return grad
    size = [(n - 1) * s + 1 for n, s in zip(grad.shape[2:], stride)]
    last = not grad.is_contiguous()
    spread = grad.new_zeros(*grad.shape[:2], *size)
    if last:
        spread = spread.contiguous(memory_format=torch.channels_last)
    spread[:, :, :: stride[0], :: stride[1]] = grad
    return spread


def rows_of(crow, col):
    """Row of each value or block, without reading the counts back."""
    at = torch.arange(col.numel(), device=col.device, dtype=crow.dtype)
    return torch.searchsorted(crow, at, right=True) - 1


def is_pointwise(kernel_size, stride, padding, groups) -> bool:
    """Whether a convolution is a linear layer over the pixels."""
    return (*kernel_size, *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1)


def pixels_linear(linear, x):
    """Run `linear` on (pixels, channels); no copy of a channels_last x, one of the result."""
    return linear(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2).contiguous()


CUDA.impl("block_conv2d", _block_conv)
CUDA.impl("block_conv2d_grad_input", _block_conv_grad_input)
CUDA.impl("block_conv2d_grad_values", _block_conv_grad_values)

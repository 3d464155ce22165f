"""Convolutions on CUDA: what the formats share, and those with weights of blocks.

- block_conv2d: the implicit product of `conv_triton` on blocks that fit it (see `misfit` in
  `block_cuda`); its input gradient is the same product on the transposed index, its weight gradient
  a product of pixels where blocks are.
- csr_conv2d and nm_conv2d: see `csr_conv_cuda` and `nm_conv_cuda`.

Beside each stands the dense weight, put together on the device without waiting for it, and the
convolution of torch; the fastest is kept. Results are contiguous (n, out, oh, ow), as on the CPU.
"""

import functools
import math
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
from .cuda_quick import conv_call_key, keep_call, quick_call
from .cuda_support import check, check_bias, check_operand, finish, refuse, state_once

# The kernel counts from the first image of a tile in 32 bits; a tile may begin in one image and
# end in the next.
MOST_OUTPUTS = 2**29


def check_image(op: str, x) -> None:
    """Refuse what is no batch of images."""
    if x.dim() != 4:
        refuse(op, "x with 4 dimensions", f"shape {tuple(x.shape)}")


def output_shape(op, x, outputs, kernel_size, stride, padding, dilation, groups) -> tuple:
    """The shape of the result of a convolution, after checks of its geometry."""
    check_image(op, x)
    divides = groups >= 1 and x.shape[1] % groups == 0 and outputs % groups == 0
    wanted = f"groups that divide in_channels = {x.shape[1]} and out_channels = {outputs}"
    check(divides, op, wanted, groups)
    size = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    wanted = "an input at least as large as the kernel"
    check(min(size) >= 1, op, wanted, f"input size {tuple(x.shape[2:])}")
    return (x.shape[0], outputs, *size)


def whole_geometry(kernel_size, stride, padding, dilation, groups) -> tuple:
    """A geometry in the order of the ops, which can be a key."""
    return (tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups)


def _block_conv(
    x, values, crow, col, bias, plan, plan_t, out_channels,
    kernel_size, stride, padding, dilation, groups, activation="none",
):  # fmt: skip
    check_image(block_conv.CONV, x)
    geometry = whole_geometry(kernel_size, stride, padding, dilation, groups)
    call = conv_call_key(x, values, bias, geometry, crow, col, out_channels, activation)
    arguments = (x, values, crow, col, bias, plan, out_channels, geometry, activation)
    anew = partial(_timed_block_conv, call, *arguments)
    return quick_call(block_conv.CONV, plan, call, (x, values, bias), anew, images=True)


def _timed_block_conv(call, x, values, crow, col, bias, plan, outputs, geometry, activation):
    """The convolution by the fastest way, which is remembered for the next such call."""
    op, (kernel_size, *_, groups) = block_conv.CONV, geometry
    shape = output_shape(op, x, outputs, *geometry)
    check_values(op, x, values, col)
    channels, taps = x.shape[1] // groups, kernel_size[0] * kernel_size[1]
    rows = block_grid(outputs, channels, values.shape[1:], groups)[0]
    check_pattern(op, x, crow, col, rows)
    check_bias(op, bias, x, outputs)
    check_activation(op, activation)
    order, row, _ = forward_parts(op, plan, crow, col, channels, values.shape[2], taps)

    def dense(x, values, bias, plan):
        row = plan.narrow(0, rows, col.numel())
        weight = dense_weight(values, row, col, outputs, channels, groups, taps)
        y = conv2d(x, weight.unflatten(2, kernel_size), bias, *geometry[1:])
        return finish(y, None, activation, op).contiguous()

    with torch.cuda.device_of(x):
        whole = plan if plan is not None and plan.numel() else torch.cat((order, row))
        ways = _block_ways(op, values, (crow, col, None, order), shape, x, geometry, activation)
        ways["dense"] = dense
        ways = {name: partial(way, x, values, bias, whole) for name, way in ways.items()}
        key = choice_key(op, x, values, outputs, channels, math.prod(shape) // outputs)
        key = (*key, *conv_key(x, shape, geometry))
        y = run_fastest(key, ways, x)
        keep_call(plan, call, key, ways)
        return y


def _block_ways(op, values, index, shape, x, geometry, activation, source=None) -> dict:
    """The configs worth timing, by name; none where the kernel does not fit.

    Ways are functions of (x, values, bias, plan), where the plan begins with the order of the rows.
    `source` makes the input of the product where that is not x.
    """
    crow, col, slot, order = index
    block = tuple(values.shape[1:]) if slot is None else tuple(values.shape[:0:-1])
    rows = len(order)
    if not takes_kernel(op, values, block[0]) or 0 in (*shape, values.numel(), x.numel()):
        return {}
    image = math.prod(shape[1:])
    if image >= MOST_OUTPUTS:
        wanted = f"expected fewer than {MOST_OUTPUTS} outputs of an image, got {image}"
        state_once(f"{op} is computed with the dense weight: {wanted}")
        return {}
    from .block_triton import Index
    from .conv_triton import Geometry, block_conv

    pixels = token_bucket(math.prod(shape) // shape[1])  # which are the tokens
    geometry = Geometry(*geometry)

    def way(config):
        def run(x, values, bias, plan):
            last = (source(x) if source else x).contiguous(memory_format=torch.channels_last)
            index = Index(crow, col, slot, plan.narrow(0, 0, rows))
            arguments = (values.contiguous(), index, bias, x.new_empty(shape), geometry)
            return block_conv(last, *arguments, activation, config)

        return run

    found = _configs(x.device, x.element_size(), pixels, block)
    found = worth_timing(found, pixels, values.numel())
    return {name: way(config) for name, config in found.items()}


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
    shape = (grad.shape[0], channels, height, width)
    geometry = (kernel_size, stride, padding, dilation, groups)

    def dense():
        weight = dense_weight(values, rows_of(crow, col), col, outputs, per_group, groups, taps)
        return dense_grad_input(
            grad, weight.unflatten(2, kernel_size), shape[1:], geometry[1:]
        )  # fmt: skip

    with torch.cuda.device_of(grad):
        spread = partial(insert_zeros, stride=stride)
        turned = turned_geometry(geometry)
        ways = _block_ways(op, values, index, shape, grad, turned, "none", spread)
        ways = {name: partial(way, grad, values, None, index[3]) for name, way in ways.items()}
        key = choice_key(op, grad, values, outputs, channels, math.prod(shape) // channels)
        key = (*key, *conv_key(grad, shape, geometry))
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
        key = (*key, block, precision(x.dtype), *conv_key(x, grad.shape, geometry))
        return run_fastest(key, {**ways, "dense": dense}, x)


def conv_key(x, shape, geometry) -> tuple:
    """What the choice of a way depends on besides the shape of the product."""
    layout = x.is_contiguous(memory_format=torch.channels_last)
    return (*whole_geometry(*geometry), tuple(x.shape[2:]), tuple(shape[2:]), layout)


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

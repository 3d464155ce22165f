"""Convolutions on CUDA: which run sparse, and the dense path of those that do not.

- block_conv2d: the implicit product of `conv_triton` on blocks that fit it (see `misfit` in
  `block_cuda`), or the dense weight, whichever is faster.
- csr_conv2d and nm_conv2d with a 1x1 kernel, stride 1 and no padding or groups: the linear op on
  the pixels, without a copy of a channels_last input.
- Everything else, and all gradients: the dense weight, put together on the device without waiting
  for it (N:M in one pass of a kernel), and the convolution of torch. The reason is said once.

Results are contiguous (n, out, oh, ow), as on the CPU.
"""

from functools import partial

import torch
from torch.nn.functional import conv2d

from . import block_conv, conv, nm_conv
from ._library import CUDA, check_activation, check_indices
from .block import block_grid
from .block_cuda import (
    KERNEL_DTYPES,
    backward_parts,
    blocks_of,
    check_pattern,
    check_values,
    choice_key,
    dense_weight,
    forward_parts,
    kernel_fault,
    takes_kernel,
    unturned,
)
from .block_tuning import candidates, worth_timing
from .conv import output_size
from .csr import csr_linear
from .cuda_choice import run_fastest, token_bucket
from .cuda_support import check, check_bias, finish, state_once
from .nm import nm_linear, slot_channels, slot_columns

_NO_GRADIENT = "gradients of convolutions have no sparse kernel on CUDA"
_POINTWISE = "only 1x1 kernels with stride 1 and without padding or groups run sparse on CUDA"


def _empty_output(op, x, outputs, kernel_size, stride, padding, dilation, groups):
    """The uninitialised result of a convolution, after checks of its geometry."""
    check(x.dim() == 4, op, "x with 4 dimensions", f"shape {tuple(x.shape)}")
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
    y = _empty_output(op, x, out_channels, *geometry)
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
        layout = x.is_contiguous(memory_format=torch.channels_last)
        key = (*key, *map(tuple, geometry[:4]), groups, tuple(y.shape[2:]), layout)
        return run_fastest(key, {**ways, "dense": dense}, x)


def _block_ways(op, x, values, index, bias, y, geometry, activation) -> dict:
    """The configs worth timing, by name, as calls of the kernel; none where it does not fit."""
    if not takes_kernel(op, values, values.shape[1]) or 0 in (y.numel(), values.numel()):
        return {}
    from .block_triton import Index
    from .conv_triton import Geometry, block_conv

    pixels = token_bucket(y.numel() // y.shape[1])  # which are the tokens
    geometry = Geometry(*geometry)

    def run(config):
        last = x.contiguous(memory_format=torch.channels_last)
        arguments = (values.contiguous(), Index(*index), bias, y, geometry, activation, config)
        return block_conv(last, *arguments)

    found = candidates(x.device, x.element_size(), pixels, tuple(values.shape[1:]))
    found = worth_timing(found, pixels, values.numel()).items()
    return {name: partial(run, config) for name, config in found if not config.persistent}


def _block_conv_grad_input(
    grad, values, crow, col, plan_t, channels, height, width,
    kernel_size, stride, padding, dilation, groups,
):  # fmt: skip
    op, taps = "block_conv2d_grad_input", kernel_size[0] * kernel_size[1]
    check_values(op, grad, values, col)
    state_once(f"{op} is computed with the dense weight: {_NO_GRADIENT}")
    per_group = channels // groups
    _, row, slot, _ = backward_parts(op, plan_t, crow, col, per_group, values.shape[2], taps)
    row = unturned(row, slot)
    weight = dense_weight(values, row, col, grad.shape[1], per_group, groups, taps)
    size = (grad.shape[0], channels, height, width)
    return torch.nn.grad.conv2d_input(
        size, weight.unflatten(2, kernel_size), grad, stride, padding, dilation, groups
    ).contiguous()


def _block_conv_grad_values(
    grad, x, crow, col, plan, block_rows, block_cols,
    kernel_size, stride, padding, dilation, groups,
):  # fmt: skip
    op, taps = "block_conv2d_grad_values", kernel_size[0] * kernel_size[1]
    state_once(f"{op} is computed with the dense weight: {_NO_GRADIENT}")
    channels = x.shape[1] // groups
    _, row, _ = forward_parts(op, plan, crow, col, channels, block_cols, taps)
    shape = (grad.shape[1], channels, *kernel_size)
    dense = torch.nn.grad.conv2d_weight(x, shape, grad, stride, padding, dilation, groups)
    return blocks_of(dense.flatten(2), row, col, (block_rows, block_cols), groups)


def is_pointwise(kernel_size, stride, padding, groups) -> bool:
    """Whether a convolution is a linear layer over the pixels."""
    return (*kernel_size, *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1)


def _pixels_linear(linear, x):
    """Run `linear` on (pixels, channels); no copy of a channels_last x, one of the result."""
    return linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def _csr_conv(
    x, values, crow, col, bias, plan, plan_t,
    kernel_size, stride, padding, dilation, groups, activation="none",
):  # fmt: skip
    op, geometry = conv.CONV, (kernel_size, stride, padding, dilation, groups)
    _empty_output(op, x, crow.numel() - 1, *geometry)
    if is_pointwise(kernel_size, stride, padding, groups):
        # The plan of a 1x1 convolution is that of its (out, in) matrix.
        return _pixels_linear(
            lambda flat: csr_linear(flat, values, crow, col, bias, plan, plan_t, activation), x
        )
    state_once(f"{op} is computed with the dense weight: {_POINTWISE}")
    shape = (crow.numel() - 1, x.shape[1] // groups, *kernel_size)
    cols = shape[1] * shape[2] * shape[3]
    if plan is None or plan.numel() == 0:
        check_indices(op, crow, col, cols)
    weight = values.new_zeros(shape[0], cols)
    weight.index_put_((_rows(crow, col), col.long()), values)
    y = conv2d(x, weight.view(shape), bias, *geometry[1:])
    return finish(y, None, activation, op).contiguous()


def _csr_conv_residual(*args):
    """csr_conv2d as it is called: activation and residual may be there or not."""
    parts, (activation, residual) = (
        args[:12],
        (*args[12:], None)[:2] if args[12:] else ("none", None),
    )
    if residual is None:
        return _csr_conv(*parts, activation)
    return conv.add_residual(conv.CONV, _csr_conv(*parts), residual, activation)


def _rows(crow, col):
    """Row of each value, without reading the counts back."""
    at = torch.arange(col.numel(), device=col.device, dtype=crow.dtype)
    return torch.searchsorted(crow, at, right=True) - 1


def _nm_conv(
    x, values, index, bias, plan, plan_t, n, m,
    kernel_size, stride, padding, dilation, groups, activation="none",
):  # fmt: skip
    op, geometry = nm_conv.CONV, (kernel_size, stride, padding, dilation, groups)
    _empty_output(op, x, index.shape[0], *geometry)
    if is_pointwise(kernel_size, stride, padding, groups):
        return _pixels_linear(
            lambda flat: nm_linear(flat, values, index, bias, plan, plan_t, n, m, activation), x
        )
    state_once(f"{op} is computed with the dense weight: {_POINTWISE}")
    channels, taps = x.shape[1] // groups, kernel_size[0] * kernel_size[1]
    if plan is None or plan.numel() == 0:
        slot_columns(op, index, channels, n, m, taps)  # checks every position
    weight = _expanded(values, index, channels, n, m, taps)
    weight = weight.unflatten(1, (*kernel_size, channels)).permute(0, 3, 1, 2)  # channels_last
    y = conv2d(x, weight, bias, *geometry[1:])
    return finish(y, None, activation, op).contiguous()


def _expanded(values, index, channels, n, m, taps):
    """The dense weight (rows, taps * channels) of an N:M weight, without a wait."""
    if not kernel_fault(values.device) and values.dtype in KERNEL_DTYPES:
        from .nm_expand_triton import nm_expand

        return nm_expand(values.contiguous(), index.contiguous(), channels, n, m, taps)
    channel = slot_channels(index, channels, n, m, taps)
    column = (channel + torch.arange(taps, device=index.device)[:, None] * channels).flatten(1)
    return values.new_zeros(values.shape[0], taps * channels).scatter_(1, column, values)


CUDA.impl("block_conv2d", _block_conv)
CUDA.impl("block_conv2d_grad_input", _block_conv_grad_input)
CUDA.impl("block_conv2d_grad_values", _block_conv_grad_values)
CUDA.impl("csr_conv2d", _csr_conv_residual)
CUDA.impl("nm_conv2d", _nm_conv)

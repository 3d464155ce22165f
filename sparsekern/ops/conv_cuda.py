"""Convolutions on CUDA: which run sparse, and the dense path of those that do not.

- block_conv2d: the implicit product of `conv_triton` on blocks that fit it (`block_cuda.misfit`).
- csr_conv2d and nm_conv2d with a 1x1 kernel, stride 1 and no padding or groups: the linear op on
  the pixels, without a copy of a channels_last input.
- Everything else, and all gradients: the dense weight, put together on the device without waiting
  for it, and the convolution of torch. The reason is warned of once.

Results are contiguous (n, out, oh, ow), as on the CPU.
"""

import torch
from torch.nn.functional import conv2d

from . import block_conv, conv, nm_conv
from ._library import activate, check_indices
from .block import block_grid
from .block_cuda import (
    backward_parts,
    blocks_of,
    check_bias,
    check_pattern,
    check_values,
    dense_weight,
    expect,
    forward_parts,
    say_dense,
    takes_kernel,
    unturned,
)
from .conv import output_size
from .csr import csr_linear
from .nm import nm_linear, slot_channels

_IMPL = torch.library.Library("sparsekern", "IMPL", "CUDA")


def _empty_output(op, x, outputs, kernel_size, stride, padding, dilation, groups):
    """The uninitialised result of a convolution, after checks of its geometry."""
    expect(op, x.dim() == 4, "x with 4 dimensions", f"shape {tuple(x.shape)}")
    divides = groups >= 1 and x.shape[1] % groups == 0 and outputs % groups == 0
    wanted = f"groups that divide in_channels = {x.shape[1]} and out_channels = {outputs}"
    expect(op, divides, wanted, groups)
    size = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    wanted = "an input at least as large as the kernel"
    expect(op, min(size) >= 1, wanted, f"input size {tuple(x.shape[2:])}")
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
    check_bias(op, x, bias, out_channels, "out_channels")
    activate(x.new_empty(0), activation, op)  # refuses unknown names
    order, row, _ = forward_parts(op, plan, crow, col, channels, values.shape[2], taps)
    if not takes_kernel(op, values, values.shape[1]):
        weight = dense_weight(values, row, col, out_channels, channels, groups, taps)
        y = conv2d(x, weight.unflatten(2, kernel_size), bias, *geometry[1:])
        return activate(y, activation, op).contiguous()
    from .block_triton import Index
    from .conv_triton import Geometry
    from .conv_triton import block_conv as run

    index = Index(crow, col, None, order)
    return run(x, values.contiguous(), index, bias, y, Geometry(*geometry), activation)


def _block_conv_grad_input(
    grad, values, crow, col, plan_t, channels, height, width,
    kernel_size, stride, padding, dilation, groups,
):  # fmt: skip
    op, taps = "block_conv2d_grad_input", kernel_size[0] * kernel_size[1]
    check_values(op, grad, values, col)
    say_dense(op, "gradients of convolutions have no sparse kernel on CUDA")
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
    say_dense(op, "gradients of convolutions have no sparse kernel on CUDA")
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


_POINTWISE = "only 1x1 kernels with stride 1 and without padding or groups run sparse on CUDA"


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
    say_dense(op, _POINTWISE)
    shape = (crow.numel() - 1, x.shape[1] // groups, *kernel_size)
    cols = shape[1] * shape[2] * shape[3]
    if plan is None or plan.numel() == 0:
        check_indices(op, crow, col, cols)
    weight = values.new_zeros(shape[0], cols)
    weight.index_put_((_rows(crow, col), col.long()), values)
    return activate(conv2d(x, weight.view(shape), bias, *geometry[1:]), activation, op).contiguous()


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
    say_dense(op, _POINTWISE)
    channels, taps = x.shape[1] // groups, kernel_size[0] * kernel_size[1]
    if plan is None or plan.numel() == 0:
        weight = nm_conv._dense_weight(op, values, index, x.shape[1], n, m, kernel_size, groups)
    else:
        column = slot_channels(index, channels, n, m, taps) * taps
        column = (column + torch.arange(taps, device=x.device)[:, None]).flatten(1)
        weight = values.new_zeros(values.shape[0], channels * taps).scatter_(1, column, values)
        weight = weight.view(-1, channels, *kernel_size)
    return activate(conv2d(x, weight, bias, *geometry[1:]), activation, op).contiguous()


_IMPL.impl("block_conv2d", _block_conv)
_IMPL.impl("block_conv2d_grad_input", _block_conv_grad_input)
_IMPL.impl("block_conv2d_grad_values", _block_conv_grad_values)
_IMPL.impl("csr_conv2d", _csr_conv)
_IMPL.impl("nm_conv2d", _nm_conv)

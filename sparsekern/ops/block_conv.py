"""block_conv2d: convolution with a weight of dense blocks, and its two gradients.

Shapes: x (n, in, h, w), the weight (out, in / groups, kh, kw) in blocks of R outputs x C inputs,
each at one kernel position: values (n_blocks, R, C), crow (rows of blocks + 1,) int32, col
(n_blocks,) int32, counting (block of inputs, kernel position); bias (out,). Rows of blocks start
anew in each group. The result is contiguous (n, out, oh, ow). Geometry as nn.Conv2d defines it.
"""

import torch

from ._library import check_indices, define
from .block import blocks_to_dense, dense_to_blocks
from .conv import GEOMETRY, dense_conv, dense_grad_input, empty_conv
from .gradients import Format, register_format

CONV = "block_conv2d"


def _dense_weight(op, values, crow, col, out_channels, in_channels, kernel_size, groups):
    taps, channels = kernel_size[0] * kernel_size[1], in_channels // groups
    dense = blocks_to_dense(op, values, crow, col, out_channels, channels, groups, taps)
    return dense.view(out_channels, channels, *kernel_size)


def _conv_reference(
    x, values, crow, col, bias, plan, plan_t, out_channels,
    kernel_size, stride, padding, dilation, groups, activation="none",
):  # fmt: skip
    weight = _dense_weight(CONV, values, crow, col, out_channels, x.shape[1], kernel_size, groups)
    return dense_conv(CONV, x, weight, bias, (stride, padding, dilation, groups), activation)


def _conv_fake(
    x, values, crow, col, bias, plan, plan_t, out_channels,
    kernel_size, stride, padding, dilation, groups, activation="none",
):  # fmt: skip
    geometry = (kernel_size, stride, padding, dilation)
    return empty_conv(x, out_channels, geometry)


block_conv2d = define(
    "block_conv2d(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias, Tensor? plan, "
    f'Tensor? plan_t, SymInt out_channels, {GEOMETRY}, str activation="none") -> Tensor',
    _conv_reference,
    _conv_fake,
)


def _grad_input_reference(
    grad, values, crow, col, plan_t, channels, height, width,
    kernel_size, stride, padding, dilation, groups,
):  # fmt: skip
    op = "block_conv2d_grad_input"
    weight = _dense_weight(op, values, crow, col, grad.shape[1], channels, kernel_size, groups)
    geometry = (stride, padding, dilation, groups)
    return dense_grad_input(grad, weight, (channels, height, width), geometry)


block_conv2d_grad_input = define(
    "block_conv2d_grad_input(Tensor grad, Tensor values, Tensor crow, Tensor col, Tensor? plan_t, "
    f"SymInt channels, SymInt height, SymInt width, {GEOMETRY}) -> Tensor",
    _grad_input_reference,
    lambda grad, values, crow, col, plan_t, channels, height, width, *geometry: grad.new_empty(
        (grad.shape[0], channels, height, width)
    ),
)


def _grad_values_reference(
    grad, x, crow, col, plan, block_rows, block_cols,
    kernel_size, stride, padding, dilation, groups,
):  # fmt: skip
    channels, taps = x.shape[1] // groups, kernel_size[0] * kernel_size[1]
    check_indices("block_conv2d_grad_values", crow, col, -(-channels // block_cols) * taps)
    shape = (grad.shape[1], channels, *kernel_size)
    dense = torch.nn.grad.conv2d_weight(x, shape, grad, stride, padding, dilation, groups)
    return dense_to_blocks(dense.flatten(2), crow, col, (block_rows, block_cols), groups)


block_conv2d_grad_values = define(
    "block_conv2d_grad_values(Tensor grad, Tensor x, Tensor crow, Tensor col, Tensor? plan, "
    f"SymInt block_rows, SymInt block_cols, {GEOMETRY}) -> Tensor",
    _grad_values_reference,
    lambda grad, x, crow, col, plan, block_rows, block_cols, *geometry: x.new_empty(
        (col.shape[0], block_rows, block_cols)
    ),
)


call_block_conv2d = register_format(
    Format(
        block_conv2d, block_conv2d_grad_input, block_conv2d_grad_values,
        conv=True, blocks=True, values_plan="plan",
    )
)  # fmt: skip

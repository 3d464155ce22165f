"""nm_conv2d: convolution whose weight keeps n of every m input channels at each kernel position.

Shapes: x (n, in, h, w), the weight (out, in / groups, kh, kw) as values (out, slots), where slots
count (group of m input channels, kernel position, n), and index as in nm_linear; bias (out,). The
result is contiguous (n, out, oh, ow). Geometry as nn.Conv2d defines it.
"""

import torch

from ._library import define
from .conv import GEOMETRY, dense_conv, dense_grad_input, empty_conv
from .gradients import Format, register_format
from .nm import nm_to_dense, slot_columns, slot_count

CONV = "nm_conv2d"


def _dense_weight(op, values, index, in_channels, n, m, kernel_size, groups):
    taps, channels = kernel_size[0] * kernel_size[1], in_channels // groups
    dense = nm_to_dense(op, values, index, channels, n, m, taps)
    return dense.view(values.shape[0], channels, *kernel_size)


def _conv_reference(
    x, values, index, bias, plan, plan_t, n, m,
    kernel_size, stride, padding, dilation, groups, activation="none",
):  # fmt: skip
    weight = _dense_weight(CONV, values, index, x.shape[1], n, m, kernel_size, groups)
    return dense_conv(CONV, x, weight, bias, (stride, padding, dilation, groups), activation)


def _conv_fake(
    x, values, index, bias, plan, plan_t, n, m,
    kernel_size, stride, padding, dilation, groups, activation="none",
):  # fmt: skip
    geometry = (kernel_size, stride, padding, dilation)
    return empty_conv(x, index.shape[0], geometry)


nm_conv2d = define(
    "nm_conv2d(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? plan, Tensor? plan_t, "
    f'int n, int m, {GEOMETRY}, str activation="none") -> Tensor',
    _conv_reference,
    _conv_fake,
)


def _grad_input_reference(
    grad, values, index, plan_t, channels, height, width, n, m,
    kernel_size, stride, padding, dilation, groups,
):  # fmt: skip
    op = "nm_conv2d_grad_input"
    weight = _dense_weight(op, values, index, channels, n, m, kernel_size, groups)
    geometry = (stride, padding, dilation, groups)
    return dense_grad_input(grad, weight, (channels, height, width), geometry)


nm_conv2d_grad_input = define(
    "nm_conv2d_grad_input(Tensor grad, Tensor values, Tensor index, Tensor? plan_t, "
    f"SymInt channels, SymInt height, SymInt width, int n, int m, {GEOMETRY}) -> Tensor",
    _grad_input_reference,
    lambda grad, values, index, plan_t, channels, height, width, n, m, *geometry: grad.new_empty(
        (grad.shape[0], channels, height, width)
    ),
)


def _grad_values_reference(
    grad, x, index, plan_t, n, m, kernel_size, stride, padding, dilation, groups
):
    taps, channels = kernel_size[0] * kernel_size[1], x.shape[1] // groups
    columns = slot_columns("nm_conv2d_grad_values", index, channels, n, m, taps)
    shape = (index.shape[0], channels, *kernel_size)
    dense = torch.nn.grad.conv2d_weight(x, shape, grad, stride, padding, dilation, groups)
    return dense.flatten(1).gather(1, columns)


def _grad_values_fake(grad, x, index, plan_t, n, m, kernel_size, stride, padding, dilation, groups):
    taps = kernel_size[0] * kernel_size[1]
    return x.new_empty((index.shape[0], slot_count(x.shape[1] // groups, n, m, taps)))


nm_conv2d_grad_values = define(
    "nm_conv2d_grad_values(Tensor grad, Tensor x, Tensor index, Tensor? plan_t, int n, int m, "
    f"{GEOMETRY}) -> Tensor",
    _grad_values_reference,
    _grad_values_fake,
)


call_nm_conv2d = register_format(
    Format(nm_conv2d, nm_conv2d_grad_input, nm_conv2d_grad_values, indices=1, conv=True)
)

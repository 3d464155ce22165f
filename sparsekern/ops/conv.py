"""csr_conv2d: direct sparse convolution, and its two gradients.

Shapes: x (n, in, h, w), the weight (out, in / groups, kh, kw) as the CSR of its (out, in / groups *
kh * kw) matrix: values (nnz,), crow (out + 1,) int32, col (nnz,) int32; bias (out,). The result is
contiguous (n, out, oh, ow). Stride, padding, dilation and groups as nn.Conv2d defines them. A
residual of the shape of the result is added before the activation.
"""

import torch

from ._geometry import need, output_size
from ._library import (
    activate,
    check_indices,
    csr_to_dense,
    define,
    row_of_each,
)
from .gradients import Format, register_format

CONV = "csr_conv2d"
GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"


def add_residual(op, y, residual, activation):
    """act(y + residual): what formats do whose kernels do not add it themselves."""
    wanted = f"residual of the shape of the result, {tuple(y.shape)}"
    need(op, residual.shape == y.shape, wanted, tuple(residual.shape))
    return activate(y + residual, activation, op)


def dense_conv(op, x, weight, bias, geometry, activation, residual=None):
    """The reference of every format: geometry is (stride, padding, dilation, groups)."""
    y = torch.nn.functional.conv2d(x, weight, bias, *geometry)
    if residual is not None:
        return add_residual(op, y, residual, activation).contiguous()
    return activate(y, activation, op).contiguous()


def empty_conv(x, out_channels, geometry):
    """The fake of every format: geometry is (kernel_size, stride, padding, dilation)."""
    return x.new_empty((x.shape[0], out_channels, *output_size(x.shape[2:], *geometry)))


def _dense_weight(op, values, crow, col, in_channels, kernel_size, groups):
    shape = (crow.shape[0] - 1, in_channels // groups, *kernel_size)
    return csr_to_dense(op, values, crow, col, shape[1] * shape[2] * shape[3]).view(shape)


def _conv_reference(
    x, values, crow, col, bias, plan, plan_t,
    kernel_size, stride, padding, dilation, groups, activation="none", residual=None,
):  # fmt: skip
    weight = _dense_weight(CONV, values, crow, col, x.shape[1], kernel_size, groups)
    geometry = (stride, padding, dilation, groups)
    return dense_conv(CONV, x, weight, bias, geometry, activation, residual)


def _conv_fake(
    x, values, crow, col, bias, plan, plan_t,
    kernel_size, stride, padding, dilation, groups, activation="none", residual=None,
):  # fmt: skip
    geometry = (kernel_size, stride, padding, dilation)
    return empty_conv(x, crow.shape[0] - 1, geometry)


csr_conv2d = define(
    "csr_conv2d(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias, Tensor? plan, "
    f'Tensor? plan_t, {GEOMETRY}, str activation="none", Tensor? residual=None) -> Tensor',
    _conv_reference,
    _conv_fake,
)


def dense_grad_input(grad, weight, input_size, geometry):
    """The gradient `(n, *input_size)` of the input; geometry as for `dense_conv`."""
    size = (grad.shape[0], *input_size)
    return torch.nn.grad.conv2d_input(size, weight, grad, *geometry).contiguous()


def _grad_input_reference(
    grad, values, crow, col, plan_t, channels, height, width,
    kernel_size, stride, padding, dilation, groups,
):  # fmt: skip
    op = "csr_conv2d_grad_input"
    weight = _dense_weight(op, values, crow, col, channels, kernel_size, groups)
    geometry = (stride, padding, dilation, groups)
    return dense_grad_input(grad, weight, (channels, height, width), geometry)


csr_conv2d_grad_input = define(
    "csr_conv2d_grad_input(Tensor grad, Tensor values, Tensor crow, Tensor col, Tensor? plan_t, "
    f"SymInt channels, SymInt height, SymInt width, {GEOMETRY}) -> Tensor",
    _grad_input_reference,
    lambda grad, values, crow, col, plan_t, channels, height, width, *geometry: grad.new_empty(
        (grad.shape[0], channels, height, width)
    ),
)


def _grad_values_reference(
    grad, x, crow, col, plan_t, kernel_size, stride, padding, dilation, groups
):
    shape = torch.Size((crow.shape[0] - 1, x.shape[1] // groups, *kernel_size))
    check_indices("csr_conv2d_grad_values", crow, col, shape[1:].numel())
    dense = torch.nn.grad.conv2d_weight(x, shape, grad, stride, padding, dilation, groups)
    return dense.flatten(1)[row_of_each(crow), col.long()]


csr_conv2d_grad_values = define(
    "csr_conv2d_grad_values(Tensor grad, Tensor x, Tensor crow, Tensor col, Tensor? plan_t, "
    f"{GEOMETRY}) -> Tensor",
    _grad_values_reference,
    lambda grad, x, crow, col, plan_t, *geometry: x.new_empty((col.shape[0],)),
)


call_csr_conv2d = register_format(
    Format(
        csr_conv2d, csr_conv2d_grad_input, csr_conv2d_grad_values,
        conv=True, values_plan="either", residual=True,
    )
)  # fmt: skip

"""csr_conv2d: direct sparse convolution, and its two gradients.

Shapes: x (n, in, h, w), the weight (out, in / groups, kh, kw) as the CSR of its (out, in / groups *
kh * kw) matrix: values (nnz,), crow (out + 1,) int32, col (nnz,) int32; bias (out,). The result is
contiguous (n, out, oh, ow). Stride, padding, dilation and groups as nn.Conv2d defines them.
"""

import torch

from ._library import (
    activate,
    activation_backward,
    csr_to_dense,
    define,
    gradient_plan,
    save_for_gradients,
)

CONV = "csr_conv2d"
GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"


def output_size(size, kernel_size, stride, padding, dilation):
    """Height and width after a convolution (nn.Conv2d's formula)."""
    return tuple(
        (size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )


def _dense_weight(op, values, crow, col, in_channels, kernel_size, groups):
    shape = (crow.shape[0] - 1, in_channels // groups, *kernel_size)
    return csr_to_dense(op, values, crow, col, shape[1] * shape[2] * shape[3]).view(shape)


def _conv_reference(
    x,
    values,
    crow,
    col,
    bias,
    plan,
    plan_t,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    activation="none",
):
    weight = _dense_weight(CONV, values, crow, col, x.shape[1], kernel_size, groups)
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return activate(y, activation, CONV).contiguous()


def _conv_fake(
    x,
    values,
    crow,
    col,
    bias,
    plan,
    plan_t,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    activation="none",
):
    torch._check(
        x.dtype == values.dtype,
        lambda: f"{CONV}: expected values of the dtype of x ({x.dtype}), got {values.dtype}",
    )
    torch._check(x.dim() == 4, lambda: f"{CONV}: expected x with 4 dimensions, got {x.dim()}")
    out = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    return x.new_empty((x.shape[0], crow.shape[0] - 1, *out))


csr_conv2d = define(
    "csr_conv2d(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias, Tensor? plan, "
    f'Tensor? plan_t, {GEOMETRY}, str activation="none") -> Tensor',
    _conv_reference,
    _conv_fake,
)


def _grad_input_reference(
    grad,
    values,
    crow,
    col,
    plan_t,
    channels,
    height,
    width,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
):
    op = "csr_conv2d_grad_input"
    weight = _dense_weight(op, values, crow, col, channels, kernel_size, groups)
    size = (grad.shape[0], channels, height, width)
    return torch.nn.grad.conv2d_input(
        size, weight, grad, stride, padding, dilation, groups
    ).contiguous()


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
    shape = (crow.shape[0] - 1, x.shape[1] // groups, *kernel_size)
    dense = torch.nn.grad.conv2d_weight(x, shape, grad, stride, padding, dilation, groups)
    row = torch.repeat_interleave(
        torch.arange(crow.numel() - 1, device=crow.device), crow.diff().long()
    )
    return dense.flatten(1)[row, col.long()]


csr_conv2d_grad_values = define(
    "csr_conv2d_grad_values(Tensor grad, Tensor x, Tensor crow, Tensor col, Tensor? plan_t, "
    f"{GEOMETRY}) -> Tensor",
    _grad_values_reference,
    lambda grad, x, crow, col, plan_t, *geometry: x.new_empty((col.shape[0],)),
)


def _setup_context(ctx, inputs, output):
    x, *rest = inputs[:7]
    *ctx.geometry, ctx.activation = inputs[7:]
    ctx.input_size = x.shape[1:]
    save_for_gradients(ctx, x, *rest, output)


def _backward(ctx, grad):
    x, values, crow, col, bias, plan, plan_t, output = ctx.saved_tensors

    def pre_activation():
        return csr_conv2d(x, values, crow, col, bias, plan, None, *ctx.geometry, "none")

    grad = activation_backward(grad, ctx.activation, output, pre_activation)
    needs = ctx.needs_input_grad
    grad_x = grad_values = grad_bias = None
    if needs[0]:
        grad_x = csr_conv2d_grad_input(
            grad, values, crow, col, plan_t, *ctx.input_size, *ctx.geometry
        )
    if needs[1]:
        plans = gradient_plan(plan, plan_t)
        grad_values = csr_conv2d_grad_values(grad, x, crow, col, plans, *ctx.geometry)
    if needs[4]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_values, None, None, grad_bias, *[None] * 8


torch.library.register_autograd("sparsekern::csr_conv2d", _backward, setup_context=_setup_context)

"""nm_conv2d and its gradients on CUDA: cuSPARSELt, our kernel, or dense, by timing.

A 1x1 kernel with stride 1 and no padding or groups is the linear op on the pixels, without a copy
of a channels_last input. Every other convolution has, beside the dense weight:

- `cusparselt`: what the convolution reads as the rows of a matrix, columns (kernel position,
  channel), times the packed 2:4 weight; the gradient of the input likewise where the transposed
  weight is 2:4 (pattern 2:4T), and its columns are added up again;
- `implicit`: the Triton kernel of `nm_conv_triton`, which reads the weight as it is stored.

The weight gradient is dense, and the kept positions are collected: at half of the weights no kernel
that skips the others can win. Without timing (see `cuda_choice`) the dense weight is taken.
"""

import math
from functools import partial

import torch
from torch.nn.functional import conv2d

from . import cslt, nm_conv, nm_cuda
from ._library import CUDA, check_activation
from .block_cuda import KERNEL_DTYPES
from .conv import dense_grad_input
from .conv_cuda import (
    check_image,
    conv_key,
    is_pointwise,
    output_shape,
    pixels_linear,
    whole_geometry,
)
from .csr_conv_cuda import MAX_UNFOLDED
from .cuda_choice import run_fastest, shape_key
from .cuda_quick import conv_call_key, keep_call, quick_call
from .cuda_support import aligned, check, check_bias, check_operand, finish, state_once
from .nm import slot_count
from .nm_library import packed_way


def _dense(values, index, channels, n, m, kernel_size):
    """The dense weight, channels_last."""
    taps = kernel_size[0] * kernel_size[1]
    weight = nm_cuda.expand(values.contiguous(), index.contiguous(), channels, n, m, taps)
    return weight.unflatten(1, (*kernel_size, channels)).permute(0, 3, 1, 2)


def _conv(
    x, values, index, bias, plan, plan_t, n, m,
    kernel_size, stride, padding, dilation, groups, activation="none",
):  # fmt: skip
    check_image(nm_conv.CONV, x)
    if is_pointwise(kernel_size, stride, padding, groups):
        arguments = (values, index, bias, plan, plan_t, n, m, activation)
        return pixels_linear(lambda flat: nm_cuda._linear(flat, *arguments), x)
    geometry = whole_geometry(kernel_size, stride, padding, dilation, groups)
    call = conv_call_key(x, values, bias, geometry, index, n, m, activation)
    anew = partial(_timed_conv, call, x, values, index, bias, plan, n, m, geometry, activation)
    return quick_call(nm_conv.CONV, plan, call, (x, values, bias), anew, images=True)


def _timed_conv(call, x, values, index, bias, plan, n, m, geometry, activation):
    """The convolution by the fastest way, which is remembered for the next such call."""
    op, rows, (kernel_size, *_, groups) = nm_conv.CONV, index.shape[0], geometry
    channels, taps = x.shape[1] // groups, kernel_size[0] * kernel_size[1]
    shape = output_shape(op, x, rows, *geometry)
    nm_cuda.check_weight(op, x, values, index, channels, n, m, taps)
    check_activation(op, activation)
    check_bias(op, bias, x, rows)
    nm_cuda.check_index(op, plan, index, channels, n, m, taps)

    def dense(x, values, bias, plan):
        weight = _dense(values, index, channels, n, m, kernel_size)
        return finish(conv2d(x, weight, bias, *geometry[1:]), None, activation, op).contiguous()

    with torch.cuda.device_of(x):
        ways = {"dense": dense}
        if groups == 1 and 0 not in (*shape, values.numel()) and _kernels(op, x):
            arguments = (values, index.contiguous(), plan, n, m, shape, geometry, activation)
            ways |= _forward_ways(x.shape[1], *arguments)
        ways = {name: partial(way, x, values, bias, plan) for name, way in ways.items()}
        pixels = math.prod(shape) // max(1, rows)
        key = shape_key(op, x, rows, channels * taps, values.numel(), pixels)
        key = (*key, n, m, *conv_key(x, shape, geometry))
        y = run_fastest(key, ways, x)
        if index.is_contiguous():
            keep_call(plan, call, key, ways)
        return y


def _kernels(op: str, x) -> bool:
    """Whether our kernels run, which all ways but the dense one need; if not, it is said once."""
    fault = nm_cuda.kernel_fault(nm_cuda.device_facts(x.device.index))
    if x.dtype not in KERNEL_DTYPES:
        fault = f"expected float16, bfloat16 or float32, got {x.dtype}"
    if fault:
        state_once(f"{op} is computed with the dense weight: {fault}")
    return not fault


def _forward_ways(channels, values, index, plan, n, m, shape, geometry, activation) -> dict:
    """Our kernel and the library, as functions of (x, values, bias, plan)."""
    kernel_size, rows = geometry[0], shape[1]
    taps = kernel_size[0] * kernel_size[1]

    def implicit(x, values, bias, plan):
        from .nm_conv_triton import nm_conv as run

        last, to = x.contiguous(memory_format=torch.channels_last), x.new_empty(shape)
        return run(last, values.contiguous(), index, bias, to, geometry[:4], n, m, activation)

    ways, sizes = {"implicit": implicit}, (rows, taps * channels, n, m)
    packed = _packed(plan, values, sizes, channels, math.prod(shape) // rows, "forward")
    if packed is None:
        return ways

    def library(x, values, bias, plan):
        from .unfold_triton import unfold

        values = values.contiguous()
        weight = packed(values, lambda: nm_cuda.expand(values, index, channels, n, m, taps))
        b = aligned(bias) if bias is not None else None
        flat = unfold(x, geometry[:4], tap_major=True)
        product = cslt.linear(flat, weight, b, rows, activation)
        return product.view(shape[0], *shape[2:], rows).permute(0, 3, 1, 2).contiguous()

    return {"cusparselt": library, **ways}


def _packed(plan, values, sizes, channels, pixels, kind):
    """`packed_way` of the flattened weight of sizes (rows, columns, n, m), or None.

    Where groups of m channels would straddle kernel positions, and where what the convolution reads
    at all pixels would be too large a matrix.
    """
    if channels % sizes[3] or pixels * max(sizes[:2]) > MAX_UNFOLDED:
        return None
    return packed_way(nm_conv.CONV, plan, values, sizes, kind)


def _grad_input(
    grad, values, index, plan_t, channels, height, width, n, m,
    kernel_size, stride, padding, dilation, groups,
):  # fmt: skip
    op, geometry = "nm_conv2d_grad_input", (kernel_size, stride, padding, dilation, groups)
    rows, per_group, taps = index.shape[0], channels // groups, kernel_size[0] * kernel_size[1]
    check(grad.dim() == 4 and grad.shape[1] == rows, op, f"grad with {rows} channels", grad.shape)
    check_operand(op, "values", values, grad, grad.dtype)
    if is_pointwise(kernel_size, stride, padding, groups):
        arguments = (values, index, plan_t, channels, n, m)
        return pixels_linear(lambda flat: nm_cuda._grad_input(flat, *arguments), grad)
    nm_cuda.check_index(op, plan_t, index, per_group, n, m, taps)
    shape = (grad.shape[0], channels, height, width)

    def dense():
        weight = _dense(values, index, per_group, n, m, kernel_size)
        return dense_grad_input(grad, weight, shape[1:], geometry[1:])

    with torch.cuda.device_of(grad):
        ways = {}
        fits = groups == 1 and 0 not in (grad.numel(), *shape) and _kernels(op, grad)
        if fits and nm_cuda.transposable(plan_t, grad, index, channels, n, m, taps):
            ways = _grad_input_ways(grad, values, index, plan_t, n, m, shape, geometry)
        key = shape_key(
            op, grad, rows, channels * taps, values.numel(), grad.numel() // max(1, rows)
        )
        key = (*key, n, m, len(ways), *conv_key(grad, shape, geometry))
        return run_fastest(key, {"dense": dense, **ways}, grad)


def _grad_input_ways(grad, values, index, plan_t, n, m, shape, geometry) -> dict:
    rows, channels = grad.shape[1], shape[1]
    taps = geometry[0][0] * geometry[0][1]
    values, cols = values.contiguous(), taps * channels
    pixels = grad.numel() // rows
    packed = _packed(plan_t, values, (cols, rows, n, m), channels, pixels, "transposed")
    if packed is None:
        return {}

    def library():
        from .unfold_triton import fold

        weight = packed(
            values, lambda: nm_cuda.expand(values, index, channels, n, m, taps).t().contiguous()
        )
        flat = aligned(grad.permute(0, 2, 3, 1).reshape(-1, rows))
        columns = cslt.linear(flat, weight, None, cols, "none")
        return fold(columns, shape, geometry[:4], tap_major=True)

    return {"cusparselt": library}


def _grad_values(grad, x, index, plan_t, n, m, kernel_size, stride, padding, dilation, groups):
    op, rows = "nm_conv2d_grad_values", index.shape[0]
    taps, channels = kernel_size[0] * kernel_size[1], x.shape[1] // groups
    check_operand(op, "grad", grad, x, x.dtype)
    check_operand(op, "index", index, x, torch.uint8)
    nm_cuda.check_index(op, plan_t, index, channels, n, m, taps)
    with torch.cuda.device_of(x):
        shape = (rows, channels, *kernel_size)
        dense = torch.nn.grad.conv2d_weight(x, shape, grad, stride, padding, dilation, groups)
        dense = dense.contiguous().flatten(1)
        return nm_cuda.collect(
            dense, index.contiguous(), slot_count(channels, n, m, taps), n, m, taps
        )


CUDA.impl("nm_conv2d", _conv)
CUDA.impl("nm_conv2d_grad_input", _grad_input)
CUDA.impl("nm_conv2d_grad_values", _grad_values)

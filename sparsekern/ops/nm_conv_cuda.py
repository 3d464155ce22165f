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

import torch
from torch.nn.functional import conv2d

from . import cslt, nm_conv, nm_cuda
from ._library import CUDA, check_activation
from .block_cuda import KERNEL_DTYPES
from .conv import dense_grad_input
from .conv_cuda import check_image, conv_key, empty_output, is_pointwise, pixels_linear
from .csr_conv_cuda import MAX_UNFOLDED
from .cuda_choice import run_fastest, shape_key
from .cuda_support import aligned, check, check_bias, check_operand, finish, state_once
from .nm import slot_columns, slot_count
from .nm_library import packed_way


def _dense(values, index, channels, n, m, kernel_size):
    """The dense weight, channels_last."""
    taps = kernel_size[0] * kernel_size[1]
    weight = nm_cuda.expand(values.contiguous(), index.contiguous(), channels, n, m, taps)
    return weight.unflatten(1, (*kernel_size, channels)).permute(0, 3, 1, 2)


def _check_index(op, plan, index, channels, n, m, taps) -> None:
    """Without a plan that vouches for it, check every position; waits for the device."""
    if plan is None or plan.numel() == 0:
        slot_columns(op, index, channels, n, m, taps)


def _conv(
    x, values, index, bias, plan, plan_t, n, m,
    kernel_size, stride, padding, dilation, groups, activation="none",
):  # fmt: skip
    op, geometry = nm_conv.CONV, (kernel_size, stride, padding, dilation, groups)
    rows, channels, taps = index.shape[0], x.shape[1] // groups, kernel_size[0] * kernel_size[1]
    check_image(op, x)
    if is_pointwise(kernel_size, stride, padding, groups):
        arguments = (values, index, bias, plan, plan_t, n, m, activation)
        return pixels_linear(lambda flat: nm_cuda._linear(flat, *arguments), x)
    y = empty_output(op, x, rows, *geometry)
    check_operand(op, "values", values, x, x.dtype)
    check_activation(op, activation)
    check_bias(op, bias, x, rows)
    _check_index(op, plan, index, channels, n, m, taps)

    def dense():
        weight = _dense(values, index, channels, n, m, kernel_size)
        return finish(conv2d(x, weight, bias, *geometry[1:]), None, activation, op).contiguous()

    with torch.cuda.device_of(x):
        ways = {}
        if groups == 1 and 0 not in (y.numel(), values.numel()) and _kernels(op, x):
            arguments = (x, values, index, bias, plan, n, m, y, geometry, activation)
            ways = _forward_ways(*arguments)
        key = shape_key(op, x, rows, channels * taps, values.numel(), y.numel() // max(1, rows))
        return run_fastest((*key, n, m, *conv_key(x, y, geometry)), {"dense": dense, **ways}, x)


def _kernels(op: str, x) -> bool:
    """Whether our kernels run, which all ways but the dense one need; if not, it is said once."""
    fault = nm_cuda.kernel_fault(nm_cuda.device_facts(x.device.index))
    if x.dtype not in KERNEL_DTYPES:
        fault = f"expected float16, bfloat16 or float32, got {x.dtype}"
    if fault:
        state_once(f"{op} is computed with the dense weight: {fault}")
    return not fault


def _forward_ways(x, values, index, bias, plan, n, m, y, geometry, activation) -> dict:
    kernel_size, channels, rows = geometry[0], x.shape[1], y.shape[1]
    taps = kernel_size[0] * kernel_size[1]
    values, index = values.contiguous(), index.contiguous()

    def implicit():
        from .nm_conv_triton import nm_conv as run

        last, to = x.contiguous(memory_format=torch.channels_last), torch.empty_like(y)
        return run(last, values, index, bias, to, geometry[:4], n, m, activation)

    ways = {"implicit": implicit}
    sizes = (rows, taps * channels, n, m)
    packed = _packed(plan, values, sizes, channels, y.numel() // rows, "forward")
    if packed is None:
        return ways

    def library():
        from .unfold_triton import unfold

        weight = packed(lambda: nm_cuda.expand(values, index, channels, n, m, taps))
        b = aligned(bias) if bias is not None else None
        flat = unfold(x, geometry[:4], tap_major=True)
        product = cslt.linear(flat, weight, b, rows, activation)
        return product.view(y.shape[0], *y.shape[2:], rows).permute(0, 3, 1, 2).contiguous()

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
    _check_index(op, plan_t, index, per_group, n, m, taps)
    y = grad.new_empty(grad.shape[0], channels, height, width)

    def dense():
        weight = _dense(values, index, per_group, n, m, kernel_size)
        return dense_grad_input(grad, weight, y.shape[1:], geometry[1:])

    with torch.cuda.device_of(grad):
        ways = {}
        fits = groups == 1 and 0 not in (grad.numel(), y.numel()) and _kernels(op, grad)
        if fits and nm_cuda.transposable(plan_t, grad, index, channels, n, m, taps):
            ways = _grad_input_ways(grad, values, index, plan_t, n, m, y, geometry)
        key = shape_key(
            op, grad, rows, channels * taps, values.numel(), grad.numel() // max(1, rows)
        )
        key = (*key, n, m, len(ways), *conv_key(grad, y, geometry))
        return run_fastest(key, {"dense": dense, **ways}, grad)


def _grad_input_ways(grad, values, index, plan_t, n, m, y, geometry) -> dict:
    rows, channels = grad.shape[1], y.shape[1]
    taps = geometry[0][0] * geometry[0][1]
    values, cols = values.contiguous(), taps * channels
    pixels = grad.numel() // rows
    packed = _packed(plan_t, values, (cols, rows, n, m), channels, pixels, "transposed")
    if packed is None:
        return {}

    def library():
        from .unfold_triton import fold

        weight = packed(
            lambda: nm_cuda.expand(values, index, channels, n, m, taps).t().contiguous()
        )
        flat = aligned(grad.permute(0, 2, 3, 1).reshape(-1, rows))
        columns = cslt.linear(flat, weight, None, cols, "none")
        return fold(columns, y.shape, geometry[:4], tap_major=True)

    return {"cusparselt": library}


def _grad_values(grad, x, index, plan_t, n, m, kernel_size, stride, padding, dilation, groups):
    op, rows = "nm_conv2d_grad_values", index.shape[0]
    taps, channels = kernel_size[0] * kernel_size[1], x.shape[1] // groups
    check_operand(op, "grad", grad, x, x.dtype)
    check_operand(op, "index", index, x, torch.uint8)
    _check_index(op, plan_t, index, channels, n, m, taps)
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

"""csr_conv2d and its gradients on CUDA: the direct kernels, matrices, or dense, by timing.

A 1x1 kernel with stride 1 and no padding or groups is the linear op on the pixels, without a copy
of a channels_last input. Every other convolution has, beside the dense weight:

- `direct`: the Triton kernels of `csr_conv_triton`, which read the image as it is (padded);
- without groups, `unfolded ...`: what the convolution reads as the rows of a matrix, and the
  products of csr_linear with it: cuSPARSE, the kernel of few tokens.

The gradient of the input is the same on the transposed pattern, see `csr_cuda._make_transposed`.
Without timing (see `cuda_choice`) the dense weight is taken.
"""

import math
from functools import partial

import torch
from torch.nn.functional import conv2d, pad

from . import conv, csr_cuda
from ._library import CUDA, check_activation
from .conv_cuda import (
    check_image,
    conv_key,
    insert_zeros,
    is_pointwise,
    output_shape,
    pixels_linear,
    rows_of,
    turned_geometry,
    whole_geometry,
)
from .cuda_choice import run_fastest, shape_key
from .cuda_quick import conv_call_key, keep_call, quick_call
from .cuda_support import aligned, check, check_bias, check_operand, finish, state_once

MAX_UNFOLDED = 2**30  # elements of a matrix of what a convolution reads


def _conv(
    x, values, crow, col, bias, plan, plan_t,
    kernel_size, stride, padding, dilation, groups, activation="none",
):  # fmt: skip
    check_image(conv.CONV, x)
    if is_pointwise(kernel_size, stride, padding, groups):
        # The plan of a 1x1 convolution is that of its (out, in) matrix.
        arguments = (values, crow, col, bias, plan, plan_t, activation)
        return pixels_linear(lambda flat: csr_cuda._linear(flat, *arguments), x)
    geometry = whole_geometry(kernel_size, stride, padding, dilation, groups)
    call = conv_call_key(x, values, bias, geometry, crow, col, activation)
    anew = partial(_timed_conv, call, x, values, crow, col, bias, plan, geometry, activation)
    return quick_call(conv.CONV, plan, call, (x, values, bias), anew, images=True)


def _timed_conv(call, x, values, crow, col, bias, plan, geometry, activation):
    """The convolution by the fastest way, which is remembered for the next such call."""
    op, rows = conv.CONV, crow.numel() - 1
    shape = output_shape(op, x, rows, *geometry)
    size = (rows, x.shape[1] // geometry[4], *geometry[0])
    cols = math.prod(size[1:])
    csr_cuda._check_csr(op, x, values, crow, col)
    check_activation(op, activation)
    check_bias(op, bias, x, rows)
    csr_cuda._check_pattern(op, plan, crow, col, cols)

    def dense(x, values, bias, plan):
        weight = csr_cuda.dense_weight(values, crow, col, cols)
        full = conv2d(x, weight.view(size), bias, *geometry[1:])
        return finish(full, None, activation, op).contiguous()

    with torch.cuda.device_of(x):
        record, few, ways = None, False, {"dense": dense}
        values = aligned(values)
        if _kernels(op, x) and 0 not in (*shape, col.numel()):
            if plan is not None and geometry[4] == 1 and csr_cuda._usable(plan, x):
                record, packed = csr_cuda._forward_record(plan, crow, col, cols)
                few = packed.numel() > 1
            index = (record, "forward", crow, col)
            ways |= _ways(op, x, index, cols, shape, geometry, activation, few)
        ways = {name: partial(way, x, values, bias, plan) for name, way in ways.items()}
        key = shape_key(op, x, rows, cols, col.numel(), math.prod(shape) // max(1, rows))
        key = (*key, *conv_key(x, shape, geometry))
        y = run_fastest(key, ways, x)
        keep_call(plan, call, key, ways)
        return y


def _kernels(op: str, x) -> bool:
    """Whether our kernels run, which all ways but the dense one need; if not, it is said once."""
    fault = csr_cuda.kernel_fault(csr_cuda.device_facts(x.device.index))
    if x.dtype not in csr_cuda.TRITON_DTYPES:
        fault = f"expected float16, bfloat16 or float32, got {x.dtype}"
    if fault:
        state_once(f"{op} is computed with the dense weight: {fault}")
    return not fault


def _ways(op, like, index, cols, shape, geometry, activation, few=False) -> dict:
    """Ways to compute a convolution with a result of this shape.

    They are functions of (x, values, bias, plan). `index` is the record of a plan (or None), what
    the pattern is to it, crow and col; cols are those of the pattern. `few` if the plan holds what
    the kernel of few tokens reads.
    """
    record, kind, crow, col = index
    library, _ = csr_cuda._ways_allowed(op, like)
    kernel_size, stride, _, dilation, groups = geometry

    def direct(x, values, bias, plan):
        from .csr_conv_triton import csr_conv

        image, to = padded(x, shape[2:], geometry), x.new_empty(shape)
        options = (kernel_size, stride, dilation, groups, activation)
        return csr_conv(image, values, (crow, col), bias, to, *options)

    ways, pixels = {"direct": direct}, math.prod(shape) // shape[1]
    if groups > 1 or pixels * cols > MAX_UNFOLDED:
        return ways

    def unfolded(product):
        def run(x, values, bias, plan):
            from .unfold_triton import unfold

            image = padded(x, shape[2:], geometry)
            read = unfold(image, (kernel_size, stride, (0, 0), dilation), tap_major=False)
            flat = product(read, values, bias, plan)
            return flat.view(shape[0], *shape[2:], -1).permute(0, 3, 1, 2).contiguous()

        return run

    def by_library(algorithm):
        def run(flat, values, bias, plan):
            product = csr_cuda._spmm(record, kind, flat, values, crow, col, *algorithm)
            return finish(product, bias, activation, op)

        return run

    def by_decode(flat, values, bias, plan):
        from .csr_triton import csr_decode

        packed = plan if record.made is None else record.made
        return csr_decode(flat, values, crow, col, packed, bias, activation)

    if few and pixels <= csr_cuda.DECODE_TOKENS:
        ways["unfolded decode"] = unfolded(by_decode)
    if library and record is not None:
        for a in csr_cuda.algorithms(like.dtype):
            ways[f"unfolded cusparse {a[0]}{'r' if a[1] else 'c'}"] = unfolded(by_library(a))
    return ways


def padded(x, out_size, geometry):
    """The contiguous image that a convolution without padding turns into one of `out_size`."""
    kernel_size, stride, padding, dilation, _ = geometry
    pads = []
    for i in (1, 0):  # the last dimension first
        reach = (out_size[i] - 1) * stride[i] + dilation[i] * (kernel_size[i] - 1) + 1
        pads += [padding[i], reach - padding[i] - x.shape[2 + i]]
    return (pad(x, pads) if any(pads) else x).contiguous()


def _grad_input(
    grad, values, crow, col, plan_t, channels, height, width,
    kernel_size, stride, padding, dilation, groups,
):  # fmt: skip
    op, geometry = "csr_conv2d_grad_input", (kernel_size, stride, padding, dilation, groups)
    rows, taps = crow.numel() - 1, kernel_size[0] * kernel_size[1]
    csr_cuda._check_csr(op, grad, values, crow, col)
    check(grad.dim() == 4 and grad.shape[1] == rows, op, f"grad with {rows} channels", grad.shape)
    if is_pointwise(kernel_size, stride, padding, groups):
        arguments = (values, crow, col, plan_t, channels)
        return pixels_linear(lambda flat: csr_cuda._grad_input(flat, *arguments), grad)
    shape = (grad.shape[0], channels, height, width)
    size = (rows, channels // groups, *kernel_size)
    cols = size[1] * taps
    csr_cuda._check_transposed(op, plan_t, crow, col, cols)

    def dense():
        weight = csr_cuda.dense_weight(values, crow, col, cols).view(size)
        return conv.dense_grad_input(grad, weight, shape[1:], geometry[1:])

    with torch.cuda.device_of(grad):
        ways, there = {}, 0 not in (grad.numel(), *shape, col.numel())
        if plan_t is not None and there and _kernels(op, grad) and csr_cuda._usable(plan_t, grad):
            sizes = (cols, groups, taps)
            record, bundle = csr_cuda._transposed_record(plan_t, crow, col, *sizes)
            crow_t, col_t, perm = csr_cuda.split_transposed(bundle, channels, col.numel())
            index = (record, "transposed", crow_t, col_t)
            turned = turned_geometry(geometry)
            found = _ways(op, grad, index, rows // groups * taps, shape, turned, "none")
            ways = {name: _of_gradient(way, grad, stride, values, perm)
                    for name, way in found.items()}  # fmt: skip
        key = shape_key(op, grad, rows, cols, col.numel(), math.prod(shape) // max(1, channels))
        key = (*key, *conv_key(grad, shape, geometry))
        return run_fastest(key, {"dense": dense, **ways}, grad)


def _of_gradient(way, grad, stride, values, perm):
    """A way on the gradient of the output and the values of the transposed pattern."""
    return lambda: way(insert_zeros(grad, stride), values.index_select(0, perm), None, None)


def _grad_values(grad, x, crow, col, plan, kernel_size, stride, padding, dilation, groups):
    op, geometry = "csr_conv2d_grad_values", (kernel_size, stride, padding, dilation, groups)
    rows, cols = crow.numel() - 1, x.shape[1] // groups * kernel_size[0] * kernel_size[1]
    check_operand(op, "grad", grad, x, x.dtype)
    if is_pointwise(kernel_size, stride, padding, groups):
        flat, seen = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (grad, x))
        return csr_cuda._grad_values(flat, seen, crow, col, plan)
    csr_cuda._check_pattern(op, plan, crow, col, cols)
    shape = (rows, x.shape[1] // groups, *kernel_size)

    def dense():
        full = torch.nn.grad.conv2d_weight(x, shape, grad, *geometry[1:])
        return full.flatten()[csr_cuda.flat_index(crow, col, cols)]

    def direct():
        from .csr_conv_triton import csr_conv_sddmm

        image, index = padded(x, grad.shape[2:], geometry), (rows_of(crow, col), col)
        return csr_conv_sddmm(
            grad.contiguous(), image, index, kernel_size, stride, dilation, groups
        )  # fmt: skip

    with torch.cuda.device_of(x):
        ways = {"direct": direct} if _kernels(op, x) else {}
        key = shape_key(op, x, rows, cols, col.numel(), grad.numel() // max(1, rows))
        return run_fastest((*key, *conv_key(x, grad.shape, geometry)), {"dense": dense, **ways}, x)


def _conv_residual(*args):
    """csr_conv2d as it is called: activation and residual may be there or not."""
    activation, residual = (*args[12:], *("none", None)[len(args) - 12 :])[:2]
    if residual is None:
        return _conv(*args[:12], activation)
    return conv.add_residual(conv.CONV, _conv(*args[:12]), residual, activation)


CUDA.impl("csr_conv2d", _conv_residual)
CUDA.impl("csr_conv2d_grad_input", _grad_input)
CUDA.impl("csr_conv2d_grad_values", _grad_values)

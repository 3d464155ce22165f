"""nm_linear_int8 on CUDA: 8-bit tensor cores through cuSPARSELt, our kernel, or dense, by timing.

Weight-only: the decode kernel reads the 8-bit values as they are (float8 from compute capability
8.9 on); otherwise, and for more tokens, the weight is spread to a dense one of the dtype of x.

With rounded tokens: cuSPARSELt multiplies 2:4 weights and tokens of 8 bits and gives bfloat16, and
one kernel applies both scales, bias and activation. Its vector of alphas could hold the scales of
the outputs, but those of the tokens need that pass anyway. The other way multiplies the same
numbers, which bfloat16 holds exactly, and rounds the same sums, so the choice changes last bits
only.
"""

import torch

from . import cslt, nm_cuda
from ._library import CUDA, activate, check_activation
from .cuda_choice import run_fastest, shape_key
from .cuda_support import (
    aligned,
    check,
    check_bias,
    check_operand,
    check_shape,
    device_facts,
    finish,
)
from .nm import slot_count
from .nm_int8 import FLOAT8, OP, dequantize_rows, from_bytes, quantize_tokens
from .nm_library import packed_way

FLOAT8_CAPABILITY = (8, 9)


def _linear(x, values, scales, index, bias, plan, n, m, dynamic=False, activation="none"):
    rows, cols = index.shape[0], x.shape[-1]
    check(values.dtype in (torch.int8, torch.uint8), OP, "values of int8 or uint8", values.dtype)
    check_operand(OP, "values", values, x, values.dtype)
    check_operand(OP, "scales", scales, x, torch.float32)
    check_operand(OP, "index", index, x, torch.uint8)
    check_shape(OP, "values", values, (rows, slot_count(cols, n, m)))
    check_shape(OP, "scales", scales, (rows,))
    check_activation(OP, activation)
    check_bias(OP, bias, x, rows)
    with torch.cuda.device_of(x):
        flat = aligned(x.reshape(-1, cols))
        weight = (values.contiguous(), scales, index.contiguous(), n, m)
        make = _dynamic_ways if dynamic else _ways
        ways = make(flat, weight, bias, plan, activation)
        if flat.shape[0] == 0 or values.numel() == 0:
            y = ways["dense"]()
        else:
            key = shape_key(OP, x, rows, cols, values.numel(), flat.shape[0])
            y = run_fastest((*key, n, m, dynamic, values.dtype), ways, x)
        return y.view(*x.shape[:-1], rows)


def _ways(x, weight, bias, plan, activation) -> dict:
    """Ways without rounded tokens; `x` is `(tokens, in)`, aligned."""
    values, scales, index, n, m = weight
    rows, cols = index.shape[0], x.shape[1]

    def dense():
        wide = dequantize_rows(values, scales).to(x.dtype)
        full = nm_cuda.expand(wide, index, cols, n, m)
        return finish(torch.nn.functional.linear(x, full, bias), None, activation, OP)

    ways = {"dense": dense}
    few = nm_cuda._kernels(x) and x.shape[0] <= nm_cuda.DECODE_TOKENS
    if few and (values.dtype == torch.int8 or _has_float8(x)):
        from .nm_triton import nm_decode

        arguments = (x, values, index, (rows, cols, n, m), bias, activation)
        ways = {"decode": lambda: nm_decode(*arguments, scales=scales), **ways}
    return ways


def _has_float8(x) -> bool:
    return device_facts(x.device.index).capability >= FLOAT8_CAPABILITY


def _dynamic_ways(x, weight, bias, plan, activation) -> dict:
    """Ways with rounded tokens."""
    values, scales, index, n, m = weight
    rows, cols, kind = index.shape[0], x.shape[1], values.dtype

    def scaled(product):
        rounded, token_scales = _tokens(x, kind)
        y = product(rounded)
        return _scaled(y, token_scales, scales, bias, activation, x.dtype)

    def dense():
        wide = nm_cuda.expand(from_bytes(values).bfloat16(), index, cols, n, m)
        return scaled(lambda q: from_bytes(q).bfloat16() @ wide.t())

    packed = None
    if kind == torch.int8 or _has_float8(x):
        stored = values if kind == torch.int8 else values.view(FLOAT8)
        packed = packed_way(OP, plan, stored, (rows, cols, n, m), "forward")
    if packed is None:
        return {"dense": dense}

    def spread():
        full = nm_cuda.expand(values.view(torch.int8), index, cols, n, m).view(kind)
        if kind == torch.uint8:  # -0.0, which a file may hold
            full = torch.where(full == 128, 0, full).view(FLOAT8)
        return full

    def library():
        # Bytes of float8 are told by their dtype there.
        weight = packed(stored, spread)
        return scaled(
            lambda q: cslt.linear(
                q if kind == torch.int8 else q.view(FLOAT8), weight, None, rows, "none"
            )
        )

    return {"cusparselt": library, "dense": dense}


def _tokens(x, kind):
    if nm_cuda._kernels(x):
        from .nm_int8_triton import quantize

        return quantize(x, kind)
    return quantize_tokens(x, kind)


def _scaled(product, token_scales, row_scales, bias, activation: str, dtype):
    if nm_cuda._kernels(product):
        from .nm_int8_triton import finish as run

        return run(product, token_scales, row_scales, bias, activation, dtype)
    y = product.float() * token_scales * row_scales
    y = y if bias is None else y + bias.float()
    return activate(y, activation, OP).to(dtype)


CUDA.impl(OP, _linear)

"""Triton kernels around 8-bit products: tokens to 8 bits, and scales, bias, activation after them.

This module imports Triton; nothing but a call with CUDA tensors imports this module.
"""

import torch
import triton
import triton.language as tl

from .cuda_support import ceil_div
from .decode_triton import activate, on_device
from .nm_int8 import FLOAT8, LARGEST

COLUMNS = 1024
ROUND = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: adding it drops what is behind the point, half to even


@triton.jit
def quantize_kernel(
    x, out, scales, cols, by_token,
    LARGEST: tl.constexpr, FLOAT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One token of x (tokens, cols) as 8 bits, and its scale; FLOAT for float8 e4m3."""
    token = tl.program_id(0).to(tl.int64)
    row = x + token * by_token
    largest = tl.zeros((COLUMNS,), tl.float32)
    wrong = tl.zeros((COLUMNS,), tl.int1)
    for first in range(0, cols, COLUMNS):
        at = first + tl.arange(0, COLUMNS)
        value = tl.load(row + at, mask=at < cols, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        wrong = wrong | (value != value)
    scale = tl.maximum(tl.max(largest, 0) / LARGEST, 1.1754943508222875e-38)
    if tl.max(wrong.to(tl.int32), 0) > 0:
        scale = float("nan")  # of one number that is none the whole token is none
    tl.store(scales + token, scale)
    for first in range(0, cols, COLUMNS):
        at = first + tl.arange(0, COLUMNS)
        value = tl.load(row + at, mask=at < cols, other=0).to(tl.float32) / scale
        value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
        if FLOAT:
            rounded = value.to(tl.float8e4nv)
        else:
            rounded = ((value + ROUND) - ROUND).to(tl.int8)
        tl.store(out + token * cols + at, rounded, mask=at < cols)


@triton.jit
def finish_kernel(
    product, token_scales, row_scales, bias, y, rows, by_token,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Y (tokens, rows) = act(product * scale of the token * scale of the output + bias)."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    value = tl.load(product + token * by_token + row, mask=inside, other=0).to(tl.float32)
    value = value * tl.load(token_scales + token) * tl.load(row_scales + row, mask=inside, other=0)
    if HAS_BIAS:
        value += tl.load(bias + row, mask=inside, other=0).to(tl.float32)
    tl.store(y + token * rows + row, activate(value, ACTIVATION), mask=inside)


def quantize(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `nm_int8.quantize_tokens` for x `(tokens, in)`, rows contiguous: one pass over memory."""
    tokens, cols = x.shape
    out = x.new_empty(tokens, cols, dtype=kind)
    scales = x.new_empty(tokens, 1, dtype=torch.float32)
    if tokens:
        with on_device(x):
            quantize_kernel[(tokens,)](
                x, out if kind == torch.int8 else out.view(FLOAT8), scales, cols, x.stride(0),
                LARGEST=LARGEST[kind], FLOAT=kind == torch.uint8,
                COLUMNS=COLUMNS,
            )  # fmt: skip
    return out, scales


def finish(product, token_scales, row_scales, bias, activation: str, dtype) -> torch.Tensor:
    """act(product * both scales + bias) in a dtype, `(tokens, rows)`."""
    tokens, rows = product.shape
    y = product.new_empty(tokens, rows, dtype=dtype)
    if y.numel():
        with on_device(product):
            finish_kernel[(tokens, ceil_div(rows, COLUMNS))](
                product, token_scales, row_scales, bias, y, rows, product.stride(0),
                HAS_BIAS=bias is not None, ACTIVATION=activation, COLUMNS=COLUMNS,
            )  # fmt: skip
    return y

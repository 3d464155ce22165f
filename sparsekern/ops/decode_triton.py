"""What the few-token Triton kernels share: activations, the sum over splits, the launch.

Imports Triton; nothing but a call with CUDA tensors imports this module.
"""

import contextlib
import os

import torch
import triton
import triton.language as tl

from ._library import check_activation
from .cuda_support import ceil_div, multiprocessors

# Triton's interpreter keeps bfloat16 as integers and computes nonsense with it.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Programs per multiprocessor that keep enough loads in flight for the memory of a Hopper GPU.
PROGRAMS_PER_SM = 4


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The fused activations: none, relu, relu6, gelu (erf), gelu_tanh."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # keeps NaN, as torch does
    elif ACTIVATION == "relu6":
        y = tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y


@triton.jit
def store_tile(
    total, y, bias, row, token, rows, tokens, part,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Store total (rows, tokens) into y (tokens, rows), or as a part into y (SPLIT, tokens, rows).

    Only a whole sum takes the bias and the activation; parts wait for `finish_kernel`.
    """
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    if SPLIT == 1:
        if HAS_BIAS:
            b = tl.load(bias + row, mask=row < rows, other=0)
            total += b.to(total.dtype)[:, None]
        total = activate(total, ACTIVATION)
    at = (part * tokens + token).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(y + at, total, mask=inside)


@triton.jit
def finish_kernel(
    parts, bias, y, rows, size,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Compute y = act(sum of the parts + bias), added in the same order; size = tokens * rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * size + at, mask=inside, other=0)
    if HAS_BIAS:
        total += tl.load(bias + at % rows, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, activate(total, ACTIVATION), mask=inside)


def run_split(kernel, tiles: int, split: int, x, rows: int, bias, activation: str, arguments):
    """Launch a kernel on (tiles, split) programs and add its parts up; returns y (tokens, rows).

    `arguments(y)` gives what the kernel takes besides its output, as positional and named ones.
    """
    tokens = x.shape[0]
    y = x.new_empty((tokens, rows))
    parts = y if split == 1 else x.new_empty((split, tokens, rows), dtype=torch.float32)
    positional, named = arguments(parts)
    with on_device(x):
        kernel[(tiles, split)](
            *positional, SPLIT=split, HAS_BIAS=bias is not None, ACTIVATION=activation, **named
        )
        if split > 1:
            finish_kernel[(ceil_div(y.numel(), 1024),)](
                parts, bias, y, rows, y.numel(), SPLIT=split, BLOCK=1024,
                HAS_BIAS=bias is not None, ACTIVATION=activation,
            )  # fmt: skip
    return y


def split_for(tiles: int, steps: int, device: torch.device) -> int:
    """Into how many parts to cut the sums so that the programs fill the device; at most 16."""
    wanted = ceil_div(PROGRAMS_PER_SM * multiprocessors(device), max(tiles, 1))
    return max(1, min(wanted, steps, 16))


def sum_type(x: torch.Tensor):
    """What products of `x` are summed in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def on_device(x: torch.Tensor):
    """Triton launches on the current device; this makes it that of x."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def check_linear(op: str, x, values, bias, rows: int, activation: str, max_tokens=None) -> None:
    """Refuse what the kernels would compute nonsense with."""
    if x.dim() != 2:
        raise RuntimeError(f"{op}: expected x with 2 dimensions, got shape {tuple(x.shape)}")
    if max_tokens is not None and x.shape[0] > max_tokens:
        raise RuntimeError(f"{op}: expected x with at most {max_tokens} rows, got {x.shape[0]}")
    check_dtypes(op, x, values=values, **({} if bias is None else {"bias": bias}))
    if bias is not None and bias.shape != (rows,):
        raise RuntimeError(f"{op}: expected bias of shape ({rows},), got {tuple(bias.shape)}")
    check_activation(op, activation)


def check_dtypes(op: str, x, **others) -> None:
    """Every tensor must have the dtype and the device of x, and x one that the kernels know."""
    known = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if x.dtype not in known:
        raise RuntimeError(f"{op}: expected x of a floating dtype of 16 to 64 bits, got {x.dtype}")
    for name, tensor in others.items():
        if tensor.dtype != x.dtype:
            raise RuntimeError(
                f"{op}: expected {name} of the dtype of x ({x.dtype}), got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise RuntimeError(
                f"{op}: expected {name} on the device of x ({x.device}), got {tensor.device}"
            )

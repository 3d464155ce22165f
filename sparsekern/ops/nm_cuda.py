"""nm_linear and its gradients on CUDA: cuSPARSELt, our kernels, or dense, by timing.

The weight gradient is a dense product of which the kept positions are collected. The input gradient
runs on the transposed weight packed as 2:4 where its mask is 2:4, too, else on the dense one.
In float32 cuSPARSELt takes 1:2 weights alone, and only where TF32 is allowed (see `cslt`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import cslt, own_check, own_cuda
from ._library import CUDA, check_activation
from .cuda_choice import run_fastest, shape_key
from .cuda_packed import PackedWay, packed_record
from .cuda_quick import call_key, keep_call, quick_call
from .cuda_support import (
    Record,
    aligned,
    capturing,
    check_bias,
    check_last,
    check_operand,
    check_shape,
    check_values,
    device_facts,
    device_fault,
    finish,
    recall,
    refuse,
    remember,
    state_once,
    triton_fault,
)
from .nm import slot_bits, slot_channels, slot_columns, slot_count

DECODE_TOKENS = 64  # up to here the decode kernel is tried


def kernel_fault(device) -> str:
    """Say why our Triton kernels cannot be used on a device; empty when they can."""
    return device_fault(device, (8, 0)) or triton_fault("nm_triton")


def _kernels(x: Tensor) -> bool:
    return not kernel_fault(device_facts(x.device.index)) and x.dtype != torch.float64


def expand(values: Tensor, index: Tensor, channels: int, n: int, m: int, taps: int = 1) -> Tensor:
    """The dense weight `(rows, taps * channels)`, without a check and without a wait."""
    if _kernels(values):
        from .nm_expand_triton import nm_expand

        return nm_expand(values, index, channels, n, m, taps)
    channel = slot_channels(index, channels, n, m, taps)
    columns = channel + torch.arange(taps, device=index.device)[:, None] * channels
    dense = values.new_zeros(values.shape[0], taps * channels)
    dense = dense.scatter(1, columns.flatten(1), values)
    return torch.where(dense == 0, 0, dense)


def collect(dense: Tensor, index: Tensor, slots: int, n: int, m: int, taps: int = 1) -> Tensor:
    """The values `(rows, slots)` of a dense weight `(rows, channels * taps)` where it is stored."""
    if _kernels(dense):
        from .nm_expand_triton import nm_collect

        return nm_collect(dense, index, slots, n, m, taps)
    channel = slot_channels(index, dense.shape[1] // taps, n, m, taps)
    columns = channel * taps + torch.arange(taps, device=index.device)[:, None]
    return dense.gather(1, columns.flatten(1))


def library_fault(x: Tensor, rows: int, cols: int, n: int, m: int) -> str:
    """Say why cuSPARSELt cannot take a product; empty when it can."""
    index = x.device.index
    fault = cslt.weight_fault(x.dtype, rows, cols, n, m) or cslt.library_fault(device_facts(index))
    if not fault and x.dtype == torch.float16:
        unknown = capturing(x) and cslt.float16_fault.cache_info().currsize == 0
        fault = "expected one product before the capture" if unknown else cslt.float16_fault(index)
    return fault


def check_weight(op: str, x, values, index, channels: int, n: int, m: int, taps: int = 1) -> None:
    """Refuse values or an index of another dtype, device or size than a weight for x has."""
    check_values(op, values, x)
    check_operand(op, "index", index, x, torch.uint8)
    slots = slot_count(channels, n, m, taps)
    check_shape(op, "values", values, (index.shape[0], slots))
    check_shape(op, "index", index, (index.shape[0], -(-slots * slot_bits(m) // 8)))


def check_index(op: str, plan, index, channels: int, n: int, m: int, taps: int = 1) -> None:
    """Without a plan that vouches for it, look at every position; waits for the device.

    An empty plan vouches for what was looked at with it.
    """
    if plan is not None and (plan.numel() or recall(plan) is not None):
        return
    if capturing(index):
        refuse(op, "a plan made by nm_plan while a CUDA graph is captured", "none")
    slot_columns(op, index, channels, n, m, taps)
    if plan is not None:
        remember(plan, Record())


def _linear(x, values, index, bias, plan, plan_t, n, m, activation="none"):
    call = call_key(x, values, bias, index, n, m, activation)
    anew = partial(_timed_linear, call, x, values, index, bias, plan, n, m, activation)
    return quick_call("nm_linear", plan, call, (x, values, bias), anew)


def _timed_linear(call, x, values, index, bias, plan, n, m, activation):
    """The product by the fastest way, which is remembered for the next such call."""
    op, rows, cols = "nm_linear", index.shape[0], x.shape[-1]
    check_weight(op, x, values, index, cols, n, m)
    check_activation(op, activation)
    check_bias(op, bias, x, rows)
    check_index(op, plan, index, cols, n, m)
    with torch.cuda.device_of(x):
        flat = aligned(x.reshape(-1, cols))
        ways = _linear_ways(flat, values, index.contiguous(), bias, plan, n, m, activation)
        if flat.shape[0] == 0 or values.numel() == 0:
            y = ways["dense"]()
        else:
            key = (*shape_key(op, x, rows, cols, values.numel(), flat.shape[0]), n, m)
            y = run_fastest(key, ways, x)
            if index.is_contiguous():
                keep_call(plan, call, key, ways)
        return y.view(*x.shape[:-1], rows)


def _linear_ways(x, values, index, bias, plan, n, m, activation) -> dict:
    """Ways to compute the forward product; `x` is `(tokens, in)`, aligned."""
    rows, cols = index.shape[0], x.shape[1]
    ways = {}
    if 0 not in (x.shape[0], values.numel()):
        if _kernels(x) and x.shape[0] <= DECODE_TOKENS:
            from .nm_triton import nm_decode

            def decode(x, values, bias, plan):
                return nm_decode(x, aligned(values), index, (rows, cols, n, m), bias, activation)

            ways["decode"] = partial(decode, x, values, bias, plan)
        ways |= _own_ways(x, values, index, bias, plan, n, m, activation)
        ways |= _library_way(x, values, index, bias, plan, n, m, activation)

    def dense(x, values, bias, plan):
        weight = expand(values.contiguous(), index, cols, n, m)
        y = torch.nn.functional.linear(x, weight, bias)
        return finish(y, None, activation, "nm_linear")

    return {**ways, "dense": partial(dense, x, values, bias, plan)}


def _own_ways(x, values, index, bias, plan, n, m, activation) -> dict:
    """Those of our CUDA kernel."""
    rows = index.shape[0]
    if (n, m) != (2, 4) or not own_cuda.takes(x, rows):
        return {}
    ways = own_cuda.nm_ways(x, rows, device_facts(x.device.index).capability)
    names = own_check.sound("nm_linear", ways, x)
    held = packed_record(plan, values, ("own", x.dtype)) if names else None
    if held is None:
        return {}

    def way(cluster):
        def run(x, values, bias, plan):
            values = values.contiguous()
            return own_cuda.nm_linear(x, values, index, bias, activation, held, cluster)

        return PackedWay(partial(run, x, values, bias, plan), held)

    return {name: way(ways[name]) for name in names}


def _library_way(x, values, index, bias, plan, n, m, activation) -> dict:
    """That of cuSPARSELt, where it can run."""
    rows, cols = index.shape[0], x.shape[1]
    place = _library_place(plan, values, x, rows, cols, n, m)
    if place is None:
        return {}

    def library(x, values, bias, plan):
        values = values.contiguous()
        weight = cslt.packed_weight(place, values, lambda: expand(values, index, cols, n, m))
        b = aligned(bias) if bias is not None else None
        return cslt.linear(x, weight, b, rows, activation)

    return {"cusparselt": PackedWay(partial(library, x, values, bias, plan), place)}


def _library_place(plan, values, x, rows, cols, n, m, kind: str = "forward"):
    """Where the weight packed for cuSPARSELt is kept; None where it cannot run."""
    fault = library_fault(x, rows, cols, n, m)
    if fault:
        state_once(f"nm_linear goes without cuSPARSELt: {fault}")
        return None
    return packed_record(plan, values, (kind, x.dtype))


def _grad_input(grad, values, index, plan_t, in_features, n, m):
    op, rows = "nm_linear_grad_input", index.shape[0]
    check_weight(op, grad, values, index, in_features, n, m)
    check_last(op, grad, rows)
    check_index(op, plan_t, index, in_features, n, m)
    with torch.cuda.device_of(grad):
        flat, values = aligned(grad.reshape(-1, rows)), values.contiguous()

        def dense():
            return flat @ expand(values, index, in_features, n, m)

        if flat.shape[0] == 0 or values.numel() == 0:
            return dense().view(*grad.shape[:-1], in_features)
        ways = {"dense": dense}
        if transposable(plan_t, grad, index, in_features, n, m):
            place = _library_place(plan_t, values, grad, in_features, rows, n, m, "transposed")
            if place is not None:

                def transposed():
                    return expand(values, index, in_features, n, m).t().contiguous()

                def library():
                    weight = cslt.packed_weight(place, values, transposed)
                    return cslt.linear(flat, weight, None, in_features, "none")

                ways = {"cusparselt": PackedWay(library, place), **ways}
        key = shape_key(op, grad, rows, in_features, values.numel(), flat.shape[0])
        y = run_fastest((*key, n, m, len(ways)), ways, grad)
        return y.view(*grad.shape[:-1], in_features)


def _grad_values(grad, x, index, plan_t, n, m):
    op, rows, cols = "nm_linear_grad_values", index.shape[0], x.shape[-1]
    check_operand(op, "grad", grad, x, x.dtype)
    check_operand(op, "index", index, x, torch.uint8)
    check_shape(op, "grad", grad, (*x.shape[:-1], rows))
    check_index(op, plan_t, index, cols, n, m)
    with torch.cuda.device_of(x):
        dense = grad.reshape(-1, rows).t() @ x.reshape(-1, cols)
        return collect(dense, index.contiguous(), slot_count(cols, n, m), n, m)


def transposable(plan_t, like, index, cols: int, n: int, m: int, taps: int = 1) -> bool:
    """Whether the transposed weight can be packed, by the record of a plan; made when not ours."""
    record = recall(plan_t) if plan_t is not None else None
    if record is None:
        if plan_t is None or capturing(like):
            return False
        record = remember(plan_t, Record())
    if "transposable" not in record.facts:
        record.facts["transposable"] = (n, m) == (2, 4) and is_transposable(
            slot_columns("nm_plan", index, cols, n, m, taps), index.shape[0], cols * taps
        )
    return record.facts["transposable"]


def is_transposable(columns: Tensor, rows: int, cols: int) -> bool:
    """Whether the transposed weight is 2:4 as well; waits for the device."""
    if rows % 4:
        return False
    kept = torch.zeros(rows, cols, dtype=torch.uint8, device=columns.device).scatter_(1, columns, 1)
    return bool((kept.view(rows // 4, 4, cols).sum(1) <= 2).all())


def _plan(index, rows, channels, n, m, groups=1, taps=1, transpose=False):
    with torch.cuda.device_of(index):
        columns = slot_columns("nm_plan", index, channels, n, m, taps)
        record = Record()
        if transpose and (n, m, groups) == (2, 4, 1):
            record.facts["transposable"] = is_transposable(columns, rows, channels * taps)
        made = index.new_zeros(1, dtype=torch.int32)  # an identity for the record
    remember(made, record)
    return made


CUDA.impl("nm_linear", _linear)
CUDA.impl("nm_linear_grad_input", _grad_input)
CUDA.impl("nm_linear_grad_values", _grad_values)
CUDA.impl("nm_plan", _plan)

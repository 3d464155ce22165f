"""csr_linear and its gradients on CUDA: cuSPARSE, our kernels, or dense, by timing.

cuSPARSE sees the weight as the left operand, so x (tokens, in) is its column-major (in, tokens) as
it lies in memory; the row-major ways transpose x and y, which can still be faster. In 16 bits
cuSPARSE sums in float32 and has one algorithm (3), without a product of the transposed matrix:
hence the transposed index set of the input gradient, with the values gathered through `perm`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import own_check, own_cuda
from ._library import CUDA, check_activation, check_indices
from .cuda_choice import run_fastest, shape_key
from .cuda_libraries import CUSPARSE, find_library
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
    half_fault,
    recall,
    refuse,
    remember,
    state_once,
    triton_fault,
)

DECODE_TOKENS = 64  # up to here the decode kernel is tried
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SDDMM_DTYPES = (torch.float32, torch.float64, torch.float16)  # cuSPARSE has no bfloat16 there
CUSPARSE_DTYPES = (*SDDMM_DTYPES, torch.bfloat16)
_OPS = torch.ops.sparsekern


def cusparse_fault(device) -> str:
    """Say why cuSPARSE cannot be used on a device (see `Device`); empty when it can."""
    return device_fault(device, (7, 0)) or half_fault() or find_library(CUSPARSE)[1]


def kernel_fault(device) -> str:
    """Say why our Triton kernels cannot be used on a device; empty when they can."""
    return device_fault(device, (8, 0)) or triton_fault("csr_triton")


def algorithms(dtype: torch.dtype) -> list[tuple[int, bool]]:
    """The algorithms of cuSPARSE worth timing, as (number, row-major), the usual best first."""
    if torch.are_deterministic_algorithms_enabled() or dtype in (torch.float16, torch.bfloat16):
        return [(3, False), (3, True)]
    return [(2, False), (3, False), (1, False), (2, True), (3, True)]


def _facts(x: Tensor):
    return device_facts(x.device.index)


def _ways_allowed(op: str, x: Tensor) -> tuple[bool, bool]:
    """Whether (cuSPARSE, Triton) can run; states once when neither can."""
    library, kernels = cusparse_fault(_facts(x)), kernel_fault(_facts(x))
    if library and kernels:
        state_once(f"{op} multiplies dense on this device: {library}; {kernels}")
    return not library and x.dtype in CUSPARSE_DTYPES, not kernels and x.dtype in TRITON_DTYPES


def dense_weight(values: Tensor, crow: Tensor, col: Tensor, cols: int) -> Tensor:
    """The dense (rows, cols) matrix, without a look at the indices and without a wait."""
    rows = crow.numel() - 1
    flat = values.new_zeros(rows * cols)
    return flat.index_put_((flat_index(crow, col, cols),), values).view(rows, cols)


def flat_index(crow: Tensor, col: Tensor, cols: int) -> Tensor:
    """Where each value lies in the flattened dense matrix, `(nnz,)` int64."""
    row = torch.arange(crow.numel() - 1, device=crow.device)
    # With the size given, nothing has to be read back from the device.
    row = torch.repeat_interleave(row, crow.diff(), output_size=col.numel())
    return row * cols + col


def _spmm(record: Record, kind: str, x, values, crow, col, algorithm: int, row_major: bool):
    """W x for x `(tokens, in)`: `(tokens, out)`, by cuSPARSE."""
    rows, tokens = crow.numel() - 1, x.shape[0]
    b = x.t().contiguous() if row_major else x
    c = x.new_empty((rows, tokens) if row_major else (tokens, rows))
    number = record.plan(
        (kind, algorithm, row_major, tokens, x.dtype, crow.data_ptr(), col.data_ptr()),
        x,
        lambda: _OPS._cusparse_spmm_plan(crow, col, values, b, c, row_major, algorithm),
    )
    _OPS._cusparse_spmm(number, values, b, c)
    return c.t().contiguous() if row_major else c


def _check_csr(op, x, values, crow, col) -> None:
    check_values(op, values, x)
    check_operand(op, "crow", crow, x, torch.int32)
    check_operand(op, "col", col, x, torch.int32)
    if values.numel() != col.numel():
        refuse(op, f"col of {values.numel()} entries", col.numel())


def _check_pattern(op: str, plan: Tensor | None, crow: Tensor, col: Tensor, cols: int) -> None:
    """Without a plan that vouches for it, look at every index; waits for the device."""
    if plan is None or plan.numel() == 0:
        if capturing(crow):
            refuse(op, "a plan made by csr_plan while a CUDA graph is captured", "none")
        check_indices(op, crow, col, cols)


def _check_transposed(op: str, plan_t: Tensor | None, crow, col, cols: int) -> None:
    """Likewise for the gradient of x; what a call before has made for an empty plan_t vouches."""
    if plan_t is None or _record_of(plan_t, True, crow, col) is None:
        _check_pattern(op, plan_t, crow, col, cols)


def _record_of(plan: Tensor, turned: bool, crow: Tensor, col: Tensor) -> Record | None:
    """The record of a plan, None also where what it holds was made of something else."""
    record = recall(plan)
    if record is None or record.made is None:
        return record
    kind, *made_of = record.facts["made of"]
    same = all(a.data_ptr() == b.data_ptr() for a, b in zip(made_of, (crow, col)))
    return record if same and kind == turned else None


def _linear(x, values, crow, col, bias=None, plan=None, plan_t=None, activation="none"):
    call = call_key(x, values, bias, crow, col, activation)
    anew = partial(_timed_linear, call, x, values, crow, col, bias, plan, activation)
    return quick_call("csr_linear", plan, call, (x, values, bias), anew)


def _timed_linear(call, x, values, crow, col, bias, plan, activation):
    """The product by the fastest way, which is remembered for the next such call."""
    op, rows, cols = "csr_linear", crow.numel() - 1, x.shape[-1]
    _check_csr(op, x, values, crow, col)
    check_activation(op, activation)
    check_bias(op, bias, x, rows)
    _check_pattern(op, plan, crow, col, cols)
    with torch.cuda.device_of(x):
        flat, values = aligned(x.reshape(-1, cols)), aligned(values)
        tokens = flat.shape[0]
        if 0 in (tokens, rows, col.numel()):
            weight = dense_weight(values, crow, col, cols)
            y = finish(flat @ weight.t(), bias, activation, op)
        else:
            key = shape_key(op, x, rows, cols, col.numel(), tokens)
            ways = _linear_ways(flat, values, crow, col, bias, plan, activation)
            y = run_fastest(key, ways, x)
            keep_call(plan, call, key, ways)
        return y.view(*x.shape[:-1], rows)


def _linear_ways(x, values, crow, col, bias, plan, activation) -> dict:
    """Ways to compute the forward product; `x` is `(tokens, in)`, aligned."""
    op, cols = "csr_linear", x.shape[1]
    library, kernels = _ways_allowed(op, x)
    found = {}
    if plan is not None and _usable(plan, x):
        record, decode_plan = _forward_record(plan, crow, col, cols)
        made = record.made
        if kernels and decode_plan.numel() > 1 and x.shape[0] <= DECODE_TOKENS:
            from .csr_triton import csr_decode

            found["decode"] = lambda x, values, bias, plan: csr_decode(
                x, values, crow, col, plan if made is None else made, bias, activation
            )
        found |= _own_ways(x, values, crow, col, plan, activation)
        if library:
            found |= _cusparse_ways(record, crow, col, x.dtype, activation)
    if kernels:
        from .csr_triton import csr_spmm

        found["triton"] = lambda x, values, bias, plan: csr_spmm(
            x, values, crow, col, bias, activation
        )

    def dense(x, values, bias, plan):
        weight = dense_weight(values, crow, col, cols)
        return finish(torch.nn.functional.linear(x, weight, bias), None, activation, op)

    found["dense"] = dense
    return {name: _bound(way, x, values, bias, plan) for name, way in found.items()}


def _bound(way, *arguments):
    """A way as `run_fastest` takes it."""
    if isinstance(way, PackedWay):
        return PackedWay(partial(way.run, *arguments), way.held)
    return partial(way, *arguments)


def _cusparse_ways(record, crow, col, dtype, activation) -> dict:
    def way(algorithm, row_major):
        def run(x, values, bias, plan):
            y = _spmm(record, "forward", x, values, crow, col, algorithm, row_major)
            return finish(y, bias, activation, "csr_linear")

        return run

    return {f"cusparse {a}{'r' if r else 'c'}": way(a, r) for a, r in algorithms(dtype)}


def _own_ways(x, values, crow, col, plan, activation) -> dict:
    """Those of our CUDA kernels."""
    rows = crow.numel() - 1
    names = own_cuda.csr_ways(x, rows, col.numel()) if own_cuda.takes(x, rows) else []
    names = own_check.sound("csr_linear", names, x) if names else []

    def way(name, held):
        def run(x, values, bias, plan):
            return own_cuda.csr_linear(name, x, values, crow, col, bias, activation, held)

        return PackedWay(run, held)

    held = {name: packed_record(plan, values, (name, x.dtype)) for name in names}
    return {name: way(name, place) for name, place in held.items() if place is not None}


def _usable(plan: Tensor, like: Tensor) -> bool:
    """Whether a plan is ours or can be looked at now: in a capture nothing may wait for that."""
    return recall(plan) is not None or not capturing(like)


def _forward_record(plan: Tensor, crow: Tensor, col: Tensor, cols: int) -> tuple[Record, Tensor]:
    """The record of a plan and the contents for the decode kernel, made again when not ours."""
    record = _record_of(plan, False, crow, col)
    if record is None:
        made = _make_plan(crow, col, cols)  # waits for the device, once per plan
        record = remember(plan, Record(made, {"made of": (False, crow, col)}))
    return record, plan if record.made is None else record.made


def _make_plan(crow: Tensor, col: Tensor, cols: int) -> Tensor:
    check_indices("csr_plan", crow, col, cols)
    if kernel_fault(_facts(crow)) or col.numel() == 0:
        return crow.new_zeros(1)  # an identity for the record, without contents
    from .csr_decode_plan import csr_decode_pack

    packed = csr_decode_pack(crow, col, cols)
    return packed if packed.numel() > 1 else crow.new_zeros(1)


def _make_transposed(crow: Tensor, col: Tensor, cols: int, groups: int = 1, taps: int = 1):
    """The transposed pattern as one int32 tensor: crow_t, col_t, perm, each 16-byte aligned.

    Of a convolution it is the weight (groups * channels, outputs of a group, kernel positions from
    the last to the first), whose convolution with the gradient is the gradient of the input.
    """
    check_indices("csr_plan", crow, col, cols)
    rows, channels, col = crow.numel() - 1, cols // taps, col.long()
    row = torch.repeat_interleave(torch.arange(rows, device=crow.device), crow.diff().long())
    per_group = max(1, rows // groups)
    turned = row % per_group * taps + taps - 1 - col % taps
    channel = row // per_group * channels + col // taps
    perm = torch.argsort(channel * (per_group * taps) + turned)
    crow_t = torch.zeros(groups * channels + 1, dtype=torch.int64, device=crow.device)
    crow_t[1:] = torch.bincount(channel, minlength=groups * channels).cumsum(0)
    parts = [t.to(torch.int32) for t in (crow_t, turned[perm], perm)]
    return torch.cat([torch.nn.functional.pad(t, (0, -t.numel() % 4)) for t in parts])


def split_transposed(bundle: Tensor, cols: int, nnz: int) -> tuple[Tensor, Tensor, Tensor]:
    """crow_t `(cols + 1,)`, col_t `(nnz,)` and perm `(nnz,)` of a bundle."""
    first, length = cols + 1 + -(cols + 1) % 4, nnz + -nnz % 4
    col_t = bundle.narrow(0, first, nnz)
    return bundle.narrow(0, 0, cols + 1), col_t, bundle.narrow(0, first + length, nnz)


def _transposed_record(plan_t: Tensor, crow: Tensor, col: Tensor, *sizes: int):
    record = _record_of(plan_t, True, crow, col)
    if record is None:
        made = _make_transposed(crow, col, *sizes)
        record = remember(plan_t, Record(made, {"made of": (True, crow, col)}))
    return record, plan_t if record.made is None else record.made


def _grad_input(grad, values, crow, col, plan_t, in_features):
    op, rows = "csr_linear_grad_input", crow.numel() - 1
    _check_csr(op, grad, values, crow, col)
    check_last(op, grad, rows)
    _check_transposed(op, plan_t, crow, col, in_features)
    with torch.cuda.device_of(grad):
        flat, values = aligned(grad.reshape(-1, rows)), aligned(values)

        def dense():
            return flat @ dense_weight(values, crow, col, in_features)

        if plan_t is None or 0 in (flat.shape[0], in_features, col.numel()):
            return dense().view(*grad.shape[:-1], in_features)
        ways = _grad_input_ways(flat, values, crow, col, plan_t, in_features)
        key = shape_key(op, grad, rows, in_features, col.numel(), flat.shape[0])
        y = run_fastest(key, {**ways, "dense": dense}, grad)
        return y.view(*grad.shape[:-1], in_features)


def _grad_input_ways(grad, values, crow, col, plan_t, cols) -> dict:
    library, kernels = _ways_allowed("csr_linear_grad_input", grad)
    if not (library or kernels) or not _usable(plan_t, grad):
        return {}
    record, bundle = _transposed_record(plan_t, crow, col, cols)
    crow_t, col_t, perm = split_transposed(bundle, cols, col.numel())

    def gathered(run):
        return lambda: run(values.index_select(0, perm))

    ways = {}
    if library:
        for a, r in algorithms(grad.dtype):
            ways[f"cusparse {a}{'r' if r else 'c'}"] = gathered(
                lambda v, a=a, r=r: _spmm(record, "transposed", grad, v, crow_t, col_t, a, r)
            )
    if kernels:
        from .csr_triton import csr_spmm

        ways["triton"] = gathered(lambda v: csr_spmm(grad, v, crow_t, col_t, None, "none"))
    return ways


def _grad_values(grad, x, crow, col, plan):
    op, rows, cols = "csr_linear_grad_values", crow.numel() - 1, x.shape[-1]
    check_operand(op, "grad", grad, x, x.dtype)
    check_operand(op, "crow", crow, x, torch.int32)
    check_operand(op, "col", col, x, torch.int32)
    check_shape(op, "grad", grad, (*x.shape[:-1], rows))
    _check_pattern(op, plan, crow, col, cols)
    with torch.cuda.device_of(x):
        flat, x2d = aligned(grad.reshape(-1, rows)), aligned(x.reshape(-1, cols))

        def dense():
            return (flat.t() @ x2d).flatten()[flat_index(crow, col, cols)]

        if 0 in (x2d.shape[0], rows, col.numel()):
            return dense()
        ways = _grad_values_ways(flat, x2d, crow, col, plan)
        key = shape_key(op, x, rows, cols, col.numel(), x2d.shape[0])
        return run_fastest(key, {**ways, "dense": dense}, x)


def _grad_values_ways(grad, x, crow, col, plan) -> dict:
    library, kernels = _ways_allowed("csr_linear_grad_values", x)
    ways = {}
    record = recall(plan) if plan is not None else None
    if library and record is not None and x.dtype in SDDMM_DTYPES:
        for transposed in (False, True):
            name = f"cusparse {'transposed' if transposed else 'plain'}"
            ways[name] = lambda t=transposed: _sddmm(record, grad, x, crow, col, t)
    if kernels:
        from .csr_triton import csr_sddmm

        ways["triton"] = lambda: csr_sddmm(grad, x, crow, col)
    return ways


def _sddmm(record: Record, grad, x, crow, col, transposed: bool) -> Tensor:
    out = x.new_empty(col.numel())
    if transposed:
        grad, x = grad.t().contiguous(), x.t().contiguous()
    number = record.plan(
        ("sddmm", transposed, grad.shape, x.dtype, crow.data_ptr(), col.data_ptr()),
        x,
        lambda: _OPS._cusparse_sddmm_plan(crow, col, out, grad, x, transposed),
    )
    _OPS._cusparse_sddmm(number, out, grad, x)
    return out


def _plan(crow, col, cols, groups=1, taps=1, transpose=False, pairs=False):
    for name, index in (("crow", crow), ("col", col)):
        check_operand("csr_plan", name, index, crow, torch.int32)
    with torch.cuda.device_of(crow):
        if transpose:
            made = _make_transposed(crow, col, cols, groups, taps)
        elif groups > 1:  # no matrix, so nothing for the kernels of few tokens
            check_indices("csr_plan", crow, col, cols)
            made = crow.new_zeros(1)
        else:
            made = _make_plan(crow, col, cols)
    remember(made, Record())
    return made


CUDA.impl("csr_linear", _linear)
CUDA.impl("csr_linear_grad_input", _grad_input)
CUDA.impl("csr_linear_grad_values", _grad_values)
CUDA.impl("csr_plan", _plan)

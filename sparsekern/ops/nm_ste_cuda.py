"""nm_ste_linear on CUDA: pruned and packed at every call, cuSPARSELt or dense by timing.

Nothing is kept from call to call: the weight changes with every step, and pruning, packing and
product are timed together against pruning and the dense product. The gradient of the input runs on
2:4 as well where the mask is transposable. float16 and bfloat16, 2:4; everything else is dense.
"""

import torch

from . import cslt, nm_cuda
from ._library import CUDA
from .cuda_choice import run_fastest, shape_key
from .cuda_support import aligned, check, check_bias, check_last, check_values, state_once
from .nm_ste import GRAD_INPUT, LINEAR, PRUNE, check_weight, prune_reference


def prune(weight, n, m, transposable, transposed=False):
    """P(W) `(out, in)`, or its transpose, contiguous and aligned."""
    if (n, m) != (2, 4) or not nm_cuda._kernels(weight):
        pruned = prune_reference(weight, n, m, transposable)
        return (pruned.t() if transposed else pruned).contiguous()
    from .nm_prune_triton import prune_rows, prune_tiles

    if transposable:
        return prune_tiles(weight.contiguous(), transposed)
    pruned = prune_rows(weight.contiguous())
    return pruned.t().contiguous() if transposed else pruned


def _prune(weight, n, m, transposable):
    check_weight(PRUNE, weight, n, m, transposable)
    with torch.cuda.device_of(weight):
        return prune(weight, n, m, transposable)


def _sparse_fault(op, x, rows, cols, n, m) -> str:
    """Why the product is dense; said once."""
    fault = nm_cuda.library_fault(x, rows, cols, n, m)
    if fault:
        state_once(f"{op} goes without cuSPARSELt: {fault}")
    return fault


def _linear(x, weight, bias, n, m, transposable):
    check_values(LINEAR, weight, x)
    check_weight(LINEAR, weight, n, m, transposable)
    rows, cols = weight.shape
    check(x.shape[-1] == cols, LINEAR, f"x.size(-1) = in_features = {cols}", x.shape[-1])
    check_bias(LINEAR, bias, x, rows)
    with torch.cuda.device_of(x):
        flat = aligned(x.reshape(-1, cols))

        def dense():
            return torch.nn.functional.linear(flat, prune(weight, n, m, transposable), bias)

        def library():
            packed = cslt.pack(prune(weight, n, m, transposable))
            b = aligned(bias) if bias is not None else None
            return cslt.linear(flat, packed, b, rows, "none")

        y = _fastest(LINEAR, flat, library, dense, (rows, cols, n, m), transposable)
        return y.view(*x.shape[:-1], rows)


def _grad_input(grad, weight, n, m, transposable):
    check_values(GRAD_INPUT, weight, grad)
    check_weight(GRAD_INPUT, weight, n, m, transposable)
    rows, cols = weight.shape
    check_last(GRAD_INPUT, grad, rows)
    with torch.cuda.device_of(grad):
        flat = aligned(grad.reshape(-1, rows))

        def dense():
            return flat @ prune(weight, n, m, transposable)

        def library():
            packed = cslt.pack(prune(weight, n, m, transposable, transposed=True))
            return cslt.linear(flat, packed, None, cols, "none")

        if not transposable:
            return dense().view(*grad.shape[:-1], cols)
        y = _fastest(GRAD_INPUT, flat, library, dense, (cols, rows, n, m), transposable)
        return y.view(*grad.shape[:-1], cols)


def _fastest(op, flat, library, dense, sizes, transposable):
    rows, cols, n, m = sizes
    if 0 in (flat.numel(), rows) or _sparse_fault(op, flat, rows, cols, n, m):
        return dense()
    key = shape_key(op, flat, rows, cols, rows * cols * n // m, flat.shape[0])
    return run_fastest((*key, n, m, transposable), {"cusparselt": library, "dense": dense}, flat)


CUDA.impl(PRUNE, _prune)
CUDA.impl(LINEAR, _linear)
CUDA.impl(GRAD_INPUT, _grad_input)

"""Weights packed for cuSPARSELt by the ops beside nm_linear, kept with the plan of the weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from . import cslt, nm_cuda
from .cuda_packed import packed_record
from .cuda_support import state_once


def packed_way(
    op: str, plan: Tensor | None, values: Tensor, sizes, kind: str
) -> Callable[[Tensor, Callable[[], Tensor]], Tensor] | None:
    """What makes or finds the packed weight, given the values and what makes the dense one.

    None if it cannot be.

    Args:
        op: Says once why it goes without the library.
        plan: What the packed weight is kept with; without one nothing is packed.
        values: What the weight is made of, in the dtype it is packed in; any of them later.
        sizes: Rows and columns of the packed matrix, n and m.
        kind: Tells the packed weights of a plan apart.
    """
    fault = nm_cuda.library_fault(values, *sizes)
    if fault:
        state_once(f"{op} goes without cuSPARSELt: {fault}")
        return None
    held = packed_record(plan, values, (op, kind, values.dtype))
    if held is None:
        return None
    return partial(cslt.packed_weight, held)

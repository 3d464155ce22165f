"""Calls like one before: what the first has settled is kept with the plan.

The first call of a product checks its arguments, looks up what can run and times it. That takes the
host ten times as long as the GPU takes for a product of one token, so a call whose arguments agree
with those of an earlier one in all but their contents goes straight to the way chosen then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from traceback import clear_frames

import torch
from torch import Tensor

from .block_tuning import precision
from .cuda_choice import chosen_way, first_line
from .cuda_packed import PackedWay
from .cuda_support import Record, recall, remember, state_once

MAX_CALLS = 64  # of one plan; then all are forgotten


def call_key(x: Tensor, values: Tensor, bias: Tensor | None, *rest) -> tuple:
    """What two calls must have in common; `rest` are index tensors and plain arguments.

    An index counts by address and length: whoever is remembered keeps the tensor alive.
    """
    b = None if bias is None else (bias.shape, bias.dtype, bias.get_device())
    settled = [(r.data_ptr(), r.numel()) if isinstance(r, Tensor) else r for r in rest]
    return (
        x.shape, x.dtype, x.get_device(), values.shape, values.dtype, values.get_device(), b,
        precision(x.dtype), *settled,
    )  # fmt: skip


def conv_call_key(x: Tensor, values: Tensor, bias: Tensor | None, geometry: tuple, *rest) -> tuple:
    """`call_key` of a convolution; the layout of x decides which way wins, though all take any."""
    layout = x.is_contiguous(memory_format=torch.channels_last)
    return call_key(x, values, bias, layout, geometry, *rest)


def quick_call(
    op: str, plan: Tensor | None, key: tuple, operands: tuple, anew: Callable[[], Tensor],
    images: bool = False,
) -> Tensor:  # fmt: skip
    """The product by the way that such a call took before; where there was none, `anew()`.

    `operands` are x, values and bias: x `(..., in)`, or images of any strides.
    """
    x, values, bias = operands
    record = recall(plan) if plan is not None else None
    way = record.quick.get(key) if record else None
    if way is None or not _plain(x, *((values,) if images else (x, values))):
        return anew()
    try:
        if images or x.dim() == 2:
            return way(x, values, bias, plan)
        y = way(x.view(-1, x.shape[-1]), values, bias, plan)
        return y.view(*x.shape[:-1], y.shape[-1])
    except Exception as error:
        return _again(op, record, key, error, anew)


def _again(op: str, record: Record, key: tuple, error: Exception, anew) -> Tensor:
    """The product after an error, inside of its handler: it is the context of what `anew` raises.

    Where `anew` succeeds, the error is said once.
    """
    record.quick.pop(key, None)
    clear_frames(error.__traceback__)  # what it had allocated may be what is missing
    y = anew()
    state_once(f"{op} was computed anew after an error: {first_line(error)}")
    return y


def _plain(x: Tensor, *read: Tensor) -> bool:
    """Whether nothing has to be copied, no device switched and no way avoided."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False
    return all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in read)


def keep_call(plan: Tensor | None, key: tuple, chosen: tuple, ways: dict[str, Callable]) -> None:
    """Remember the way chosen for `chosen` (see `run_fastest`) for calls with this key.

    Ways are partials of functions of (x, values, bias, plan), with x as `(tokens, in)` or images.
    Nothing else they hold may share memory with the plan, or it would live for ever.
    """
    way = ways.get(chosen_way(chosen))
    if plan is None or plan.numel() == 0 or way is None:
        return
    bound: partial = way.run if isinstance(way, PackedWay) else way
    record = recall(plan) or remember(plan, Record())
    if len(record.quick) >= MAX_CALLS:
        record.quick.clear()
    record.quick[key] = bound.func

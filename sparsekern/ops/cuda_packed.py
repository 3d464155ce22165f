"""Weights packed for a kernel, made again when the values changed.

Packed forms hold the values once more, in an order of their own. They belong to the record of a
plan (see cuda_support) and stay at their address, so that captured graphs see new weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .cuda_support import Record, capturing, recall, remember, stream_id


@dataclass
class Packed:
    """A packed weight and what it was made of.

    Attributes:
        tensors: Always the same memory.
        source: Storage, offset and version of the values; None while unknown.
        stream: Where it was packed, and `done` the event of it.
        pinned: A captured graph reads it.
        changes: How often it was packed again for other values.
    """

    tensors: tuple[Tensor, ...] | None = None
    source: tuple | None = None
    storage: StorageWeakRef | None = None
    stream: int = 0
    done: torch.cuda.Event | None = None
    pinned: bool = False
    changes: int = 0

    def release(self) -> None:
        """Give the memory back; the next use packs again."""
        if not self.pinned:
            self.tensors = self.source = None


@dataclass(frozen=True)
class PackedWay:
    """A way to compute a product from a packed weight, which is let go where another way wins."""

    run: Callable[[], Tensor]
    held: Packed

    def __call__(self) -> Tensor:
        """The product."""
        return self.run()


def packed_record(plan: Tensor | None, values: Tensor, kind: tuple) -> Packed | None:
    """Where the packed weight of a plan is kept; None where none can be.

    Without a plan there is nothing to keep it with, and inference tensors have no counter that
    tells when it is out of date.
    """
    if plan is None or values.is_inference():
        return None
    record = recall(plan) or remember(plan, Record())
    return record.packed.setdefault(kind, Packed())


def packed_weight(held: Packed, values: Tensor, pack: Callable) -> tuple[Tensor, ...]:
    """The packed weight, made again when the values changed (by identity and version counter).

    `pack(tensors)` packs into these or, given None, into new ones, and returns them. Writes
    through `values.data` do not count as changes to torch and are not seen.
    """
    source, stream, captured = _source(values), stream_id(values), capturing(values)
    held.pinned |= captured
    if held.source != source:
        held.changes += held.tensors is not None
        held.tensors = pack(held.tensors)
        # A capture only records the packing; whoever comes next has to do it.
        held.source = None if captured else source
        # Keeps the address of the storage from being given to another one.
        held.storage = StorageWeakRef(values.untyped_storage())
        if not captured:
            held.stream = stream
            held.done = torch.cuda.current_stream(values.device).record_event()
    elif stream != held.stream and not captured:
        current = torch.cuda.current_stream(values.device)
        current.wait_event(held.done)
        for tensor in held.tensors if values.is_cuda else ():
            tensor.record_stream(current)  # it may be let go while this stream still reads it
    return held.tensors


def keep_place(old: tuple[Tensor, ...] | None, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The new contents, in the old memory where there is one."""
    if old is None:
        return new
    for place, contents in zip(old, new):
        place.copy_(contents)
    return old


def _source(values: Tensor) -> tuple:
    return values.untyped_storage()._cdata, values.storage_offset(), values._version, values.dtype

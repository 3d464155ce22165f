"""Bytes: what a model stores, and what one forward pass allocates on top."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import nn


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and persistent buffers, shared storage counted once.

    This is what a checkpoint holds. A storage counts whole, even when a parameter is a view of a
    part of it, because the whole of it stays alive.
    """
    return _storage_bytes(_stored_tensors(model))


def extra_buffer_bytes(model: nn.Module) -> int:
    """Bytes of tensors that are no part of the state (such as kernel schedules).

    Non-persistent buffers, and tensors that modules hold as plain attributes: in memory, not in the
    file.
    """
    plain = [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    everything = [*model.parameters(), *model.buffers(), *plain]
    return _storage_bytes([*_stored_tensors(model), *everything]) - weight_bytes(model)


def _stored_tensors(model: nn.Module) -> list[torch.Tensor]:
    values = model.state_dict(keep_vars=True).values()
    return [v for v in values if isinstance(v, torch.Tensor)]


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    sizes = {}
    for tensor in tensors:
        for part in _strided_parts(tensor.detach()):
            storage = part.untyped_storage()
            sizes[(part.device, storage.data_ptr())] = storage.nbytes()
    return sum(sizes.values())


def _strided_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor in one of torch's sparse layouts has no storage of its own, only its parts do."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    raise ValueError(f"weight_bytes: expected a strided or sparse tensor, got {tensor.layout}")


def peak_forward_bytes(fn: Callable[[], object], device: torch.device) -> int:
    """Largest amount of memory one call holds at a time, beyond what was held before it.

    On a GPU the caching allocator's own peak statistic. On CPU the running sum of the allocations
    and frees that torch's profiler sees in torch's CPU allocator: tensors and most workspaces, but
    not what MKL, oneDNN or the per-thread scratch of our kernels take from the system directly.

    Args:
        fn: the forward pass; called once to settle lazy set-up, then once under observation. What
            it returns counts as held.
        device: where it runs; `cpu` or `cuda`.

    Raises:
        ValueError: for another kind of device.
    """
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu":
        return _peak_cpu_bytes(fn)
    raise ValueError(f"peak_forward_bytes: expected a cpu or cuda device, got {device}")


def _peak_cpu_bytes(fn: Callable[[], object]) -> int:
    # The Kineto back end also works but adds about a second of set-up to each measurement.
    with (
        _without_profiler_chatter(),
        torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile,
    ):
        output = fn()  # held until the observation ends
    del output
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _without_profiler_chatter():
    """Keep the profiler's "USDT:" trace lines off the terminal and pass on everything else.

    torch 2.13 prints them from C++ at every start and stop and has no switch for it.
    """
    try:
        real = os.dup(2)
    except OSError:  # standard error is closed: nothing to protect
        yield
        return
    with tempfile.TemporaryFile() as captured:
        sys.stderr.flush()
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            captured.seek(0)
            rest = b"".join(line for line in captured if not line.startswith(b"USDT:"))
            os.write(real, rest)
            os.close(real)

"""Which of several ways to compute a product is the fastest here: timed once, then remembered.

The timing runs at the first call of an op per device, dtype and shape (tokens above 16 count in
powers of two), outside of the capture of a CUDA graph: run a model once before you capture it.
SPARSEKERN_TUNE=0 takes the first way that works instead; so do deterministic algorithms
(`torch.use_deterministic_algorithms`), because which way wins may differ from run to run, and with
it the last bits of a result.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from .cuda_packed import PackedWay
from .cuda_support import capturing, state_once

ROUNDS = 3
ROUND_MS = 2.0  # aimed at per way and round
HOPELESS = 3.0  # times slower than the best one seen in its first call

_CHOSEN: dict[tuple, str] = {}
_BROKEN: dict[tuple, dict[str, str]] = {}


def token_bucket(tokens: int) -> int:
    """Numbers of tokens that share a choice: each up to 16, then up to the next power of two."""
    return tokens if tokens <= 16 else 1 << (tokens - 1).bit_length()


def shape_key(op: str, x: Tensor, rows: int, cols: int, nnz: int, tokens: int) -> tuple:
    """What a choice depends on; nonzeros in steps of the square root of two."""
    density = round(2 * math.log2(nnz + 1))
    return (op, x.device.index, x.dtype, rows, cols, density, token_bucket(tokens))


def chosen_way(key: tuple) -> str | None:
    """The way chosen for a key so far."""
    return _CHOSEN.get(key)


def choices() -> tuple[dict[tuple, str], dict[tuple, dict[str, str]]]:
    """The way chosen for each key so far, and by key and way why others were left out."""
    return dict(_CHOSEN), {key: dict(why) for key, why in _BROKEN.items()}


def run_fastest(key: tuple, ways: dict[str, Callable[[], Tensor]], like: Tensor) -> Tensor:
    """The result of the fastest way for this key; the first ones of `ways` are preferred untimed.

    A way that raises is left out for this key from then on, which is stated once. The error of the
    last way left is raised.
    """
    name = _CHOSEN.get(key)
    if name is None and not capturing(like) and _may_time():
        name = _CHOSEN[key] = _fastest(key, ways)
        _release(ways, name)
    order = [name] if name in ways else []
    order += [n for n in ways if n not in order and n not in _BROKEN.get(key, {})]
    for i, candidate in enumerate(order):
        try:
            return ways[candidate]()
        except Exception as error:
            if i == len(order) - 1:
                raise
            _leave_out(key, candidate, error)
    raise RuntimeError(f"{key[0]}: expected a way that works, got {_BROKEN.get(key)}")


def _release(ways: dict[str, Callable[[], Tensor]], name: str | None) -> None:
    """Let go what the ways keep that were not chosen (see cuda_packed)."""
    kept = getattr(ways.get(name), "held", None)
    for way in ways.values():
        if isinstance(way, PackedWay) and way.held is not kept:
            way.held.release()


def _may_time() -> bool:
    if torch.are_deterministic_algorithms_enabled():
        return False
    return os.environ.get("SPARSEKERN_TUNE", "1") != "0"


def first_line(error: Exception) -> str:
    """What an error says first, or its type where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _leave_out(key: tuple, name: str, error: Exception) -> None:
    if _CHOSEN.get(key) == name:
        del _CHOSEN[key]
    reason = _BROKEN.setdefault(key, {})[name] = first_line(error)
    state_once(f"{key[0]} goes on without {name} on this device: {reason}")


def _fastest(key: tuple, ways: dict[str, Callable[[], Tensor]]) -> str | None:
    """Name of the fastest way, None when all fail: the caller then meets the error."""
    first: dict[str, float] = {}
    for name, way in ways.items():
        try:
            way()  # makes plans, compiles kernels
            first[name] = elapsed_ms(way, 1)
        except Exception as error:
            if len(_BROKEN.get(key, {})) + 1 < len(ways):
                _leave_out(key, name, error)
    if not first:
        return None
    best = min(first.values())
    running = [n for n, ms in first.items() if ms <= HOPELESS * best]
    if len(running) == 1:
        return running[0]
    samples: dict[str, list[float]] = {n: [] for n in running}
    for _ in range(ROUNDS):
        for name in running:
            repeats = max(1, min(50, round(ROUND_MS / max(first[name], 1e-3))))
            samples[name].append(elapsed_ms(ways[name], repeats))
    return min(running, key=lambda n: statistics.median(samples[n]))


def elapsed_ms(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of one call by events on the current stream; waits for the end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats

"""Interleaved timing: every side is timed in turn, so drift of the machine hits all sides alike.

A machine shared with others, or one that heats up, changes speed within seconds. Timing one model
after the other turns that drift into a difference between the models; timing them in alternating
order, sample by sample, does not.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

# A sample lasts at least this long, so that the resolution of the clock (tens of nanoseconds) and
# the loop around the call stay below one part in a thousand.
MIN_SAMPLE_S = 1e-3


@dataclass(frozen=True)
class Timing:
    """Time of one call, from interleaved samples.

    Attributes:
        median_ms: median over samples, milliseconds per call.
        p10_ms: 10th percentile, milliseconds per call.
        p90_ms: 90th percentile, milliseconds per call.
        min_ms: fastest sample, milliseconds per call.
        rounds: number of samples.
        calls: calls inside each sample (more than one when a call is very fast).
        samples_ms: every sample in order, milliseconds per call; sample i of all sides that were
            timed together lie next to each other in time.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    rounds: int
    calls: int
    samples_ms: tuple[float, ...]

    @classmethod
    def from_samples(cls, samples_ms: Sequence[float], calls: int) -> Timing:
        """Summarise samples, each in milliseconds per call."""
        p10, median, p90 = quantiles(samples_ms)
        return cls(median, p10, p90, min(samples_ms), len(samples_ms), calls, tuple(samples_ms))


@dataclass(frozen=True)
class Ratio:
    """How many times faster, from pairs of neighbouring samples.

    Attributes:
        median: median of the per-pair ratios.
        p10: 10th percentile of the per-pair ratios.
        p90: 90th percentile of the per-pair ratios.
    """

    median: float
    p10: float
    p90: float


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """10th percentile, median and 90th percentile, linearly interpolated."""
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    p10, median, p90 = torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()
    return p10, median, p90


def speedup(base: Timing, other: Timing) -> Ratio:
    """Ratio base / other of samples taken next to each other; above 1 means `other` is faster.

    Both must come from the same call of `interleaved`.
    """
    if base.rounds != other.rounds:
        raise ValueError(
            "speedup: expected timings from one call of interleaved, "
            f"got {base.rounds} and {other.rounds} rounds"
        )
    pairs = zip(base.samples_ms, other.samples_ms, strict=True)
    p10, median, p90 = quantiles([b / o for b, o in pairs])
    return Ratio(median, p10, p90)


def synchronize(device: torch.device | None = None) -> None:
    """Wait for queued GPU work; does nothing (and starts no CUDA) while CUDA is unused."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize(device if device is not None and device.type == "cuda" else None)


def interleaved(
    fns: Sequence[Callable[[], object]],
    budget_s: float = 0.5,
    min_rounds: int = 5,
    max_rounds: int = 1000,
    device: torch.device | None = None,
    on_device: bool = False,
) -> list[Timing]:
    """Time functions against each other, one sample of each per round, in alternating order.

    Wall-clock time with the device synchronised around each sample, so on a GPU launch costs are
    included. With `on_device` the GPU tells the time between two events on its current stream:
    launches count only where the GPU has to wait for them. A call faster than 1 ms is repeated
    inside its sample. Garbage collection is off while the clock runs.

    Args:
        fns: functions without arguments; what they return is dropped.
        budget_s: seconds to spend on samples of all functions together, warm-up aside. It is a
            target: `min_rounds` are always taken.
        min_rounds: least number of samples per function.
        max_rounds: largest number of samples per function.
        device: the GPU to wait for; None means the current one, if CUDA is in use at all.
        on_device: time by the events of `device`, which must be a GPU.

    Returns:
        One `Timing` per function, in order.

    Raises:
        ValueError: for an empty `fns`, a budget that is not positive or impossible rounds.
    """
    _check_arguments(fns, budget_s, min_rounds, max_rounds)
    take = partial(_device_sample if on_device else _sample, device=device)
    calls = [_warm_up(fn, budget_s / len(fns), take) for fn in fns]
    samples: list[list[float]] = [[] for _ in fns]
    with _no_gc():
        start, rounds = time.perf_counter(), 0
        while rounds < min_rounds or (
            rounds < max_rounds and time.perf_counter() - start < budget_s
        ):
            order = range(len(fns)) if rounds % 2 == 0 else reversed(range(len(fns)))
            for i in order:
                samples[i].append(take(fns[i], calls[i]) * 1e3)
            rounds += 1
    return [Timing.from_samples(s, c) for s, c in zip(samples, calls, strict=True)]


def _check_arguments(fns, budget_s, min_rounds, max_rounds) -> None:
    if not fns:
        raise ValueError("interleaved: expected at least one function in fns, got none")
    if not budget_s > 0:
        raise ValueError(f"interleaved: expected budget_s > 0 seconds, got {budget_s}")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(
            "interleaved: expected 1 <= min_rounds <= max_rounds, "
            f"got min_rounds={min_rounds}, max_rounds={max_rounds}"
        )


def _warm_up(fn: Callable[[], object], budget_s: float, take) -> int:
    """Call until caches and lazy set-up have settled; return how many calls fill a sample."""
    take(fn, 1)  # the first call pays for lazy set-up, so it says nothing about speed
    start, fastest, seen = time.perf_counter(), float("inf"), 0
    while seen < 2 or (seen < 20 and time.perf_counter() - start < 0.1 * budget_s):
        fastest = min(fastest, take(fn, 1))
        seen += 1
    return max(1, round(MIN_SAMPLE_S / max(fastest, 1e-9)))


def _sample(fn: Callable[[], object], calls: int, device) -> float:
    """Seconds per call of `calls` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def _device_sample(fn: Callable[[], object], calls: int, device) -> float:
    """As `_sample`, by the clock of a GPU."""
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    start.record(stream)
    for _ in range(calls):
        fn()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


_COLLECTION = threading.Lock()
_timing = 0  # how many threads are; garbage is collected again when the last one is done
_was_on = True


@contextmanager
def _no_gc():
    global _timing, _was_on
    with _COLLECTION:
        if not _timing:
            _was_on = gc.isenabled()
            gc.disable()
        _timing += 1
    try:
        yield
    finally:
        with _COLLECTION:
            _timing -= 1
            if not _timing and _was_on:
                gc.enable()

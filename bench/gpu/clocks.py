"""Samplers for `rounds.interleaved` on any device: what one call costs the device itself.

On a GPU the calls are captured once into a CUDA graph and replayed between two events, so that what
Python takes to launch a kernel is not part of the figure. Where a call cannot be captured, the
events go around plain launches and the result says so. On a CPU the wall clock serves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import rounds
import torch

from sparsekern.measure.graphs import capture

Call = Callable[[], object]
MIN_GRAPH_MS = 2.0  # calls shorter than this are captured several times over
MAX_CALLS = 64  # in one graph


def copies_needed(weight_bytes: int, device: torch.device, limit: int = 32) -> int:
    """How many copies of a weight it takes to read twice the L2 before the first comes again."""
    if device.type != "cuda" or not weight_bytes:
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(limit, -(-2 * l2 // weight_bytes))


def sampler(calls: Sequence[Call], device: torch.device, graph: bool = True):
    """A sampler over calls that take turns, and how it tells the time.

    Args:
        calls: The same work on different copies of the weights.
        device: Where they run.
        graph: Whether capturing may be tried.

    Returns:
        The sampler, and `wall`, `graph`, `events` or `events: why there is no graph`.
    """
    if device.type != "cuda":
        return rounds.local(_in_turn(calls)), "wall"
    if not graph:
        return _events(_in_turn(calls), device), "events"
    try:
        return captured(calls, device), "graph"
    except Exception as error:  # a synchronisation or an allocation that a graph cannot hold
        torch.cuda.synchronize(device)
        why = str(error).splitlines()[0] if str(error) else repr(error)
        return _events(_in_turn(calls), device), f"events: {why}"


def _in_turn(calls: Sequence[Call]) -> Call:
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def _events(call: Call, device: torch.device) -> rounds.Sampler:
    """Time between two events on the current stream."""

    def sample(count: int) -> float:
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record(stream)
        for _ in range(count):
            call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return sample


@dataclass(frozen=True)
class Captured:
    """A graph of `size` calls; samples are replays of it."""

    graph: torch.cuda.CUDAGraph
    size: int
    device: torch.device

    def replay(self) -> None:
        """Queue all its calls."""
        self.graph.replay()

    def __call__(self, count: int) -> float:
        """Seconds that `count` calls take, from as many replays as come closest."""
        replays = max(1, round(count / self.size))
        return _events(self.replay, self.device)(replays) * count / (replays * self.size)


def captured(calls: Sequence[Call], device: torch.device) -> Captured:
    """One graph of all calls, as often over as makes a few milliseconds.

    Raises:
        RuntimeError: one of the calls cannot be captured.
    """
    once_ms = min(_events(_in_turn(calls), device)(len(calls)) for _ in range(2)) * 1e3
    passes = max(1, min(MAX_CALLS // len(calls), round(MIN_GRAPH_MS / max(once_ms, 1e-6))))
    graph = capture(calls, device, passes)
    return Captured(graph, passes * len(calls), device)

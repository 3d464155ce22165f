"""CUDA graphs: calls that are captured once and then replayed without the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def capture(
    calls: Sequence[Callable[[], object]], device: torch.device, passes: int = 1
) -> torch.cuda.CUDAGraph:
    """One graph of some calls in turn, all of them `passes` times over.

    Raises:
        RuntimeError: a call waits for the device, or takes memory as no graph can hold it.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # lazy set-up has no place in a graph
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in list(calls) * passes:
            call()
    return graph

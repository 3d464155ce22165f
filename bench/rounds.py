"""Times sides against each other where some of them run in another process.

As `sparsekern.measure.interleaved`, for sides that measure their own time: a peer's clock runs in
its own process, so the pipe to it is never counted.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

from sparsekern.measure import Timing
from sparsekern.measure.timer import MIN_SAMPLE_S

# Takes the number of calls to make in a row; returns the seconds they took together.
Sampler = Callable[[int], float]

# Threads of the side before may still spin when a sample starts (milliseconds, in OpenMP and in the
# pools of the peers), and caches hold its data. Samples up to this length follow an untimed one.
LEAD_IN_BELOW_S = 50e-3


def local(call: Callable[[], object]) -> Sampler:
    """A side that runs in this process."""

    def sample(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start

    return sample


def interleaved(
    samplers: Sequence[Sampler], budget_s: float, min_rounds: int = 5, max_rounds: int = 1000
) -> list[Timing]:
    """One sample of every side per round, in alternating order.

    Args:
        samplers: The sides.
        budget_s: Seconds to spend on all sides together, warm-up aside; a target, since
            `min_rounds` are always taken.
        min_rounds: Least number of samples per side.
        max_rounds: Largest number of samples per side.

    Returns:
        One `Timing` per side, in order; sample i of all sides lie next to each other in time.

    Raises:
        ValueError: no samplers, a budget that is not positive, or impossible rounds.
    """
    _check(len(samplers), budget_s, min_rounds, max_rounds)
    plans = [_warm_up(sample, budget_s / len(samplers)) for sample in samplers]
    samples: list[list[float]] = [[] for _ in samplers]
    was_on = gc.isenabled()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < min_rounds or (
            rounds < max_rounds and time.perf_counter() - start < budget_s
        ):
            order = range(len(samplers))
            for i in order if rounds % 2 == 0 else reversed(order):
                calls, lead_in = plans[i]
                if lead_in:
                    samplers[i](lead_in)
                samples[i].append(samplers[i](calls) / calls * 1e3)
            rounds += 1
    finally:
        if was_on:
            gc.enable()
    return [Timing.from_samples(s, calls) for s, (calls, _) in zip(samples, plans, strict=True)]


def _check(sides: int, budget_s: float, min_rounds: int, max_rounds: int) -> None:
    if not sides or not budget_s > 0 or not 1 <= min_rounds <= max_rounds:
        raise ValueError(
            "interleaved: expected samplers, budget_s > 0 and 1 <= min_rounds <= max_rounds, got "
            f"{sides} samplers, budget_s={budget_s}, rounds {min_rounds} to {max_rounds}"
        )


def _warm_up(sample: Sampler, budget_s: float) -> tuple[int, int]:
    """Call until set-up has settled; how many calls fill a sample, and how many go before it."""
    sample(1)  # pays for lazy set-up, so it says nothing about speed
    start, fastest, seen = time.perf_counter(), float("inf"), 0
    while seen < 2 or (seen < 20 and time.perf_counter() - start < 0.1 * budget_s):
        fastest = min(fastest, sample(1))
        seen += 1
    calls = max(1, round(MIN_SAMPLE_S / max(fastest, 1e-9)))
    return calls, calls if fastest < LEAD_IN_BELOW_S else 0

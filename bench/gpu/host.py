"""What a call takes the host: Python, checks and launches, as long as the device has room for them.

A layer of one token keeps a GPU busy for less time than this, so in eager mode the host decides.
Each side is called as a user calls it, and replayed from a CUDA graph that holds one call.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial

import baselines
import cases
import rounds
import torch

from gpu import sides
from gpu.suites import Work
from sparsekern.measure import speedup
from sparsekern.measure.graphs import capture

# Between two waits for the device. A stream holds about a thousand launches, then the host waits.
CALLS = 50


def launches(call, device: torch.device) -> rounds.Sampler:
    """A sampler of what the host does for a call; what the device does then is not waited for."""

    def sample(count: int) -> float:
        spent = 0.0
        for left in range(count, 0, -CALLS):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(min(left, CALLS)):
                call()
            spent += time.perf_counter() - start
        return spent

    return sample


def layers(p: cases.Problem) -> dict[str, torch.nn.Module]:
    """The dense layer of a problem and ours."""
    dense = p.case.layer()
    dense.weight, dense.bias = (torch.nn.Parameter(t.clone()) for t in (p.weight, p.bias))
    return {"dense": dense.eval(), "ours": baselines.sparse_layer(p).eval()}


def measure_host(p: cases.Problem, work: Work, budget_s: float, card) -> dict:
    """The sides `dense` and `ours`, called and replayed, and how much longer dense takes."""
    made, device, reference = layers(p), p.x.device, p.reference()
    with torch.inference_mode():
        calls = {role: partial(layer, p.x) for role, layer in made.items()}
        errors = {role: sides.checked(call(), role, p, reference) for role, call in calls.items()}
        if device.type == "cuda":
            for role in made:
                calls[f"{role} replayed"] = capture([calls[role]], device).replay
        samplers = [launches(call, device) for call in calls.values()]
        timings = dict(zip(calls, rounds.interleaved(samplers, budget_s)))
    keys = ("median_ms", "p10_ms", "p90_ms", "min_ms", "rounds", "calls")
    return {
        "nnz": p.nnz, "state": card.state(), "left_out": {},
        "sides": {name: {"role": name, "clock": "host", **{k: getattr(t, k) for k in keys},
                         "max_rel_error": errors[name.split()[0]]} for name, t in timings.items()},
        "best_dense": "dense", "best_ours": "ours",
        "speedup": asdict(speedup(timings["dense"], timings["ours"])),
    }  # fmt: skip

"""Measures one suite: `python -m gpu.sweep --suite block --seconds 60 --out FILE`.

A point is on disk before the next one starts; points that the file has are not measured again. The
process ends when its time is up, or when a kernel has cost it the GPU.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import asdict
from pathlib import Path

import cases
import rounds
import torch
from baselines import first_line

import sparsekern as sk
from gpu import clocks, host, machine, sides
from gpu.journal import Journal
from gpu.machine import LOST, context_error
from gpu.suites import SUITES, Work
from sparsekern.measure import speedup
from sparsekern.measure.energy import find_meter, measure_energy
from sparsekern.ops.cuda_choice import choices, token_bucket

DTYPES = {t: getattr(torch, t) for t in ("bfloat16", "float16", "float32")}
ENERGY = {"window_s": 3.0, "windows": 2, "idle_s": 2.0}


def key_of(suite: str, work: Work) -> str:
    """Name of a point in the journal."""
    return f"{suite} | {work.key}"


def main(arguments: list[str] | None = None) -> int:
    """Measure what is left of a suite."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="gpu.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--budget", type=float, default=0.4, help="seconds of timing per point")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    options = parser.parse_args(arguments)
    journal, card = Journal(options.out), machine.Card(options.device)
    done = journal.done()
    for work in SUITES[options.suite][0]():
        key = key_of(options.suite, work)
        if key in done:
            continue
        if time.monotonic() - start > options.seconds:
            break
        journal.start(key)
        began = time.monotonic()
        record = attempt(options.suite, work, options.device, options.budget, card)
        gone = context_error()
        if gone:
            record["failed"] = f"the GPU was lost: {gone}"
        record["seconds"] = time.monotonic() - began
        journal.finish(key, type="point", suite=options.suite, **record)
        if gone:
            return LOST
        release()
    return 0


def release() -> None:
    """Give memory back before the next point."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def attempt(suite: str, work: Work, device: torch.device, budget_s: float, card) -> dict:
    """The record of a point, whatever happens."""
    record = {
        "case": work.case.name, "kind": work.case.kind, "shape": list(work.case.weight_shape),
        "tokens": work.case.tokens, "training": work.case.training, "pattern": work.pattern,
        "sparsity": work.sparsity, "dtype": work.dtype, "goal": work.goal,
    }  # fmt: skip
    measure = MEASURES.get(suite, measure_point)
    try:
        problem = cases.build(
            work.case, work.pattern, work.sparsity, DTYPES[work.dtype], device=device
        )
        with torch.set_grad_enabled(work.case.training):
            record.update(measure(problem, work, budget_s, card), **ways(problem))
    except Exception as error:  # whatever a kernel does on a card it has not met, the rest goes on
        record["failed"] = f"{type(error).__name__}: {first_line(error)}"
    return record


def measure_point(p: cases.Problem, work: Work, budget_s: float, card) -> dict:
    """Time all sides of a problem against each other."""
    contestants, left_out = sides.prepare(p, work.compiled)
    timings = rounds.interleaved([side.sample for side in contestants], budget_s)
    found = {
        "nnz": p.nnz, "state": card.state(), "left_out": left_out,
        "sides": {s.name: summary(s, t) for s, t in zip(contestants, timings)},
    }  # fmt: skip
    best = {}
    for role in ("dense", "ours", "peer"):
        rows = [(s, t) for s, t in zip(contestants, timings) if s.role == role]
        if rows:
            best[role] = min(rows, key=lambda row: row[1].median_ms)
            found[f"best_{role}"] = best[role][0].name
    if "ours" not in best or "dense" not in best:
        found["failed"] = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        return found
    ours, time_ours = best["ours"]
    found["speedup"] = asdict(speedup(best["dense"][1], time_ours))
    if "peer" in best:
        found["speedup_over_peer"] = asdict(speedup(best["peer"][1], time_ours))
    found.update(rates(p, ours, time_ours))
    if work.energy:
        found["energy"] = joules({role: best[role][0] for role in ("dense", "ours")}, p.x.device)
    return found


def summary(side: sides.Side, timing) -> dict:
    """A side and its times."""
    keys = ("median_ms", "p10_ms", "p90_ms", "min_ms", "rounds", "calls")
    return {
        "role": side.role, **{key: getattr(timing, key) for key in keys}, "clock": side.clock,
        "max_rel_error": side.error, "weight_bytes": side.weight_bytes, "copies": len(side.calls),
    }  # fmt: skip


def ways(p: cases.Problem) -> dict[str, dict]:
    """Which way each op of a linear problem went, and the ways that failed on this device."""
    chosen, broken = choices()
    rows, cols = p.weight.shape[0], p.weight[0].numel()

    def mine(found: dict) -> dict:
        return {
            f"{key[0]} T<={key[6]}": value for key, value in found.items()
            if key[2:5] == (p.x.dtype, rows, cols) and key[6] == token_bucket(p.case.tokens)
        }  # fmt: skip

    return {"ways": mine(chosen), "ways_left_out": mine(broken)}


def rates(p: cases.Problem, side: sides.Side, timing) -> dict[str, float]:
    """What our kernel does a second: dense operations it replaces, real ones, weights read."""
    per_s = 1e3 / timing.median_ms
    return {
        "effective_tflops": p.flops(p.mask.numel()) * per_s / 1e12,
        "real_tflops": p.flops(p.nnz) * per_s / 1e12,
        "weight_gb_s": side.weight_bytes * per_s / 1e9,
    }


def joules(best: dict[str, sides.Side], device: torch.device) -> dict:
    """Joules per call of the best dense side and the best of ours, by the card's counter."""
    meter, reason = find_meter(device)
    if meter is None:
        return {"missing": reason}
    graphs = {role: clocks.captured(side.calls, device) for role, side in best.items()}
    replays = [graph.replay for graph in graphs.values()]
    readings = measure_energy(replays, meter, device, **ENERGY)
    found = {}
    for (role, graph), reading in zip(graphs.items(), readings):
        found[role] = {
            **{k: getattr(reading, k) / graph.size for k in ("joules", "net_joules")},
            "seconds": reading.seconds, "calls": reading.calls * graph.size,
            "source": reading.source, "reason": reading.reason,
        }  # fmt: skip
    return found


def measure_conversion(p: cases.Problem, work: Work, budget_s: float, card) -> dict:
    """What the converter chose for a model of one layer, and what that does to its time."""
    dense = p.case.layer()
    dense.weight, dense.bias = (torch.nn.Parameter(t.clone()) for t in (p.weight, p.bias))
    twin = p.case.layer()
    twin.weight, twin.bias = (torch.nn.Parameter(t.clone()) for t in (p.weight, p.bias))
    graphs = work.graphs and p.x.is_cuda
    options = {"cache": False, "progress": False, "cuda_graphs": graphs}
    converted = sk.convert_to_sparse(twin.eval(), p.x, **options)
    (row,) = sk.report(converted).layers
    error = sides.checked(converted(p.x), "the converted model", p, p.reference())
    # As a user runs them: eager, launches included, or from a graph.
    samplers, hows = zip(*(
        clocks.sampler([lambda m=m: m(p.x)], p.x.device, graph=graphs) for m in (dense, converted)
    ))  # fmt: skip
    timings = rounds.interleaved(samplers, budget_s)
    return {
        "state": card.state(), "format": row.format, "reason": row.reason,
        "layer_dense_ms": row.dense_ms, "layer_sparse_ms": row.sparse_ms,
        "notes": sk.report(converted).notes, "max_rel_error": error,
        "sides": {name: {k: getattr(t, k) for k in ("median_ms", "p10_ms", "p90_ms")}
                  for name, t in zip(("dense", "converted"), timings)},
        "best_dense": "dense", "best_ours": "converted", "clocks": hows,
        "speedup": asdict(speedup(*timings)),
    }  # fmt: skip


# How the points of a suite are measured where they are not timed against all sides.
MEASURES = {"converter": measure_conversion, "host": host.measure_host}

if __name__ == "__main__":
    sys.exit(main())

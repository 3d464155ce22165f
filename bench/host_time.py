"""Host time of a small layer: microseconds a call, in the three ways people call a model.

    python bench/host_time.py --out bench/results/host_time.jsonl

64 x 64 with one token computes for a tenth of a microsecond; what is left is Python, the dispatcher
and the checks. nn.Linear and the formats take turns; one thread, eval mode, parameters that require
gradients.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

import sparsekern as sk
from sparsekern.measure.hardware import commit, hardware
from sparsekern.measure.timer import interleaved
from sparsekern.tune import WAYS, called

PATTERNS = {"csr": "unstructured", "block": "block:4x4", "nm": "2:4"}


def layers(width: int) -> dict[str, nn.Module]:
    """nn.Linear, and the sparse layers by format."""
    found = {"nn.Linear": nn.Linear(width, width)}
    for name, pattern in PATTERNS.items():
        sparsity = None if name == "nm" else 0.9
        found[name] = sk.SparseLinear(width, width, sparsity=sparsity, pattern=pattern, format=name)
    return {name: layer.eval() for name, layer in found.items()}


def measure(width: int, budget_s: float) -> dict[str, dict[str, float]]:
    """Median microseconds of a call by way and layer."""
    sides, x = layers(width), torch.randn(1, width)
    rows = {}
    for way in WAYS:
        with called(way):
            calls = [lambda layer=layer: layer(x) for layer in sides.values()]
            times = interleaved(calls, budget_s=budget_s)
        rows[way] = {name: 1e3 * t.median_ms for name, t in zip(sides, times, strict=True)}
    return rows


def main() -> None:
    """Measure, print a table, append a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each way")
    parser.add_argument("--out", type=Path, help="JSONL file to append to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.width, arguments.budget)
    for way, row in rows.items():
        print(f"{way:16}" + "  ".join(f"{name} {us:6.2f} us" for name, us in row.items()))
    if arguments.out:
        line = {
            "microseconds": rows,
            "width": arguments.width,
            **hardware(),
            "commit": commit(Path(__file__).parent),
        }
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

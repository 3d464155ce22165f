"""Sensitivity: what pruning one layer alone costs, and sparsities chosen by it.

    python examples/pruning/sensitivity.py

Han et al. 2015 (arXiv:1506.02626), figure 6; Li et al. 2017 (arXiv:1608.08710), section 3.2. Curves
are taken on images held out of training, without retraining. Sparsities chosen by them (the largest
that loses at most a tolerance in each layer) then prune the network, against the same number of
zeros in equal shares and by one global ranking, before and after retraining on the test images.
"""

import argparse

from frame import Bench, Experiment, accuracy, run
from lines import Line

import sparsekern as sk

TOLERANCE = 1.0  # points of accuracy per layer
GRID = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
NETWORKS = ("LeNet-300-100", "LeNet-5", "ResNet-8")


def keys(options: argparse.Namespace) -> list[dict]:
    """One record for every network and seed."""
    return [{"network": name, "seed": seed} for name in NETWORKS for seed in options.seeds]


def run_one(bench: Bench, key: dict) -> dict:
    """Curves of one network, and what the sparsities chosen by them come to."""
    network, seed = key["network"], key["seed"]
    model = bench.dense(network, seed)
    found = sk.sensitivity(model, lambda m: accuracy(m, bench.held_out), GRID)
    chosen = found.scope(TOLERANCE)
    sparsity = sk.prune(model, scope=chosen).sparsity
    points = []
    scopes = {"by sensitivity": chosen, "layer by layer": "uniform", "global": "global"}
    for name, scope in scopes.items():
        line = Line(name, "magnitude", "after", network=network, scope=scope)
        points.append({"line": name, **line.run(bench, sparsity, seed)})
    return {
        "dense": accuracy(bench.dense(network, seed), bench.data.test),
        "curves": found.to_dict(),
        "chosen": chosen,
        "points": points,
    }


EXPERIMENT = Experiment("sensitivity", keys, run_one, defaults={"train": 3000, "hold": 1000})

if __name__ == "__main__":
    run(EXPERIMENT, __doc__)

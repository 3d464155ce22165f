"""What deletion costs before any retraining: Optimal Brain Damage against magnitudes.

    python examples/pruning/damage.py

LeCun et al. 1989 ("Optimal Brain Damage", figures 1 and 2): the loss of a trained network on its
training images as more and more weights go, the least salient first. The rise is in percent of the
loss of the dense network.
"""

import argparse
import copy

import torch
from frame import Bench, Experiment, run
from torch import nn
from torch.nn import functional as F

import sparsekern as sk

NETWORK = "LeNet-300-100"
GRID = (0.3, 0.5, 0.7, 0.8, 0.9)
LINES = {
    "magnitude": ("magnitude", {}),
    "OBD, Gauss-Newton": ("obd", {}),
    "OBD, Hutchinson": ("obd", {"curvature": "hutchinson"}),
}


@torch.inference_mode()
def loss_of(model: nn.Module, bench: Bench) -> float:
    """Cross-entropy on the training images."""
    model.eval()
    return float(F.cross_entropy(model(bench.data.train.images), bench.data.train.labels))


def keys(options: argparse.Namespace) -> list[dict]:
    """One record for every seed."""
    return [{"seed": seed} for seed in options.seeds]


def run_one(bench: Bench, key: dict) -> dict:
    """The loss of one network, dense and pruned in every way."""
    dense = bench.dense(NETWORK, key["seed"])
    before, points = loss_of(dense, bench), []
    data = {"data": bench.scoring(key["seed"]), "loss_fn": F.cross_entropy}
    for line, (method, options) in LINES.items():
        for sparsity in GRID:
            model = copy.deepcopy(dense)
            sk.prune(model, method, sparsity, **data, **options)
            rise = 100 * (loss_of(model, bench) / before - 1)
            points.append({"line": line, "sparsity": sparsity, "rise": rise})
    return {"loss": before, "points": points}


EXPERIMENT = Experiment("damage", keys, run_one, defaults={})

if __name__ == "__main__":
    run(EXPERIMENT, __doc__)

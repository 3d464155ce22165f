"""Counts that stay exact in a second pruning and above 2^24 weights."""

import math

import pytest
import torch
from pruner_common import one_thread  # noqa: F401
from torch import nn

from sparsekern.prune import prune


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def weights(model):
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]


def zeros(weight):
    return int((weight == 0).sum())


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "filter"])
@pytest.mark.parametrize("method", ["random", "magnitude", "grasp", "snip", "wanda"])
def test_pruning_again_takes_what_is_zero_first(method, pattern):
    torch.manual_seed(1)
    data = [(torch.randn(20, 12), torch.randint(0, 4, (20,)))]
    options = {"pattern": pattern, "data": data, "loss_fn": nn.functional.cross_entropy}
    once, model = mlp(), mlp()
    wanted = prune(once, method, 0.8, **options).zeros
    prune(model, method, 0.6, **options)
    first = [w == 0 for w in weights(model)]
    again = {"seed": 1} if method == "random" else {}
    report = prune(model, method, 0.8, **options, **again)
    assert abs(report.zeros - wanted) <= (0 if pattern == "unstructured" else 32)
    assert all(bool((w[z] == 0).all()) for w, z in zip(weights(model), first))


@pytest.mark.parametrize(
    ("method", "scope"), [("magnitude", "global"), ("random", "global"), ("wanda", "uniform")]
)
def test_more_than_2_to_the_24_weights(method, scope):
    """A float32 count would stop there, and torch.quantile refuses as many."""
    wide, small = nn.Linear(4097, 4096, bias=False), nn.Linear(4096, 3)
    model = nn.Sequential(wide, small)
    data = {"data": [torch.rand(2, 4097)]} if method == "wanda" else {}
    report = prune(model, method, 0.9, scope=scope, **data)
    total = 4097 * 4096 + 3 * 4096
    assert total > 1 << 24 and report.total == total
    counts = [math.floor(0.9 * n + 0.5) for n in (4097 * 4096, 3 * 4096)]
    assert report.zeros == (sum(counts) if scope == "uniform" else math.floor(0.9 * total + 0.5))
    assert report.zeros == zeros(wide.weight) + zeros(small.weight)

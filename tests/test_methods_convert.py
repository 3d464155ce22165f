"""What every method leaves converts to the same outputs."""

import pytest
import torch
from methods_common import BATCHES, X, Y, mlp, one_thread  # noqa: F401
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern import patterns
from sparsekern.prune.methods import METHODS, make_method
from sparsekern.prune.schedules import Constant, Cubic

CASES = [
    (name, pattern)
    for name, method in METHODS.items()
    if method.one_shot
    for pattern in ("unstructured", "block:4x4", "1:4", "1:4T", "filter")
    if make_method(name, {}).misfit(patterns.parse(pattern)) is None
]


TRAINED = [name for name, m in METHODS.items() if not m.one_shot and not m.keeps]


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_every_method_converts_to_the_same_outputs(method, pattern):
    model, options = mlp(nn.ReLU), {"loss_fn": F.cross_entropy}
    if method == "slimming":
        model.add_module("bn", nn.BatchNorm1d(12).double())
        model = nn.Sequential(model[0], model.bn, model[1], model[2])
        options["ignore"] = "3"
    elif method == "apoz":
        options["ignore"] = "4"  # no ReLU behind it
    sparsity = None if ":4" in pattern and "x" not in pattern else 0.8
    sk.prune(model, method, sparsity, pattern, scope="uniform", data=BATCHES, **options)
    model.eval()
    wanted = model(X)
    converted = sk.convert_to_sparse(model)
    assert sk.report(converted).n_sparse >= 1
    torch.testing.assert_close(converted(X), wanted)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "1:4"])
@pytest.mark.parametrize("method", TRAINED)
def test_methods_of_training_convert_to_the_same_outputs(method, pattern, mode):
    model, final = mlp(nn.ReLU), 0.75 if ":4" in pattern and "x" not in pattern else 0.85
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    moves = "movement" in method
    schedule = Cubic(0.0, final, 1, 7) if moves else Constant(final, every=1, end=7)
    pruner = sk.Pruner(model, optimizer, method, pattern=pattern, schedule=schedule)
    for _ in range(9):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()
    assert pruner.finalize().sparsity == pytest.approx(final, abs=0.12)
    wanted = model.eval()(X)
    converted = sk.convert_to_sparse(model, mode=mode)
    assert sk.report(converted).n_sparse >= 1
    torch.testing.assert_close(converted(X), wanted)


def test_at_least_two_patterns_for_every_method_that_is_not_about_filters_alone():
    served = {name: [p for n, p in CASES if n == name] for name, _ in CASES}
    units = {"apoz", "fpgm", "skeletonization"}  # filters and channels, slimming filters alone
    assert all(len(p) >= 2 for name, p in served.items() if name not in units | {"slimming"})
    channel = patterns.parse("channel")
    assert all(make_method(name, {}).misfit(channel) is None for name in units)

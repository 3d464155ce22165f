"""Every method with every pattern, and what is refused."""

import copy

import pytest
import torch
from methods_common import BATCHES, LOSS, X, Y, mlp, one_thread, weights  # noqa: F401
from torch import nn
from torch.nn import functional as F

from sparsekern import patterns
from sparsekern.prune import prune
from sparsekern.prune.methods import METHODS, make_method


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "filter", "channel"])
@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.one_shot])
def test_every_method_serves_every_pattern_or_says_why_not(method, pattern):
    model, parsed = mlp(nn.ReLU), patterns.parse(pattern)
    options = {"norms": {"0": "bn"}} if method == "slimming" else {}
    if method == "slimming":
        model.add_module("bn", nn.BatchNorm1d(12).double())
        options["ignore"] = ["2", "4"]
    elif method == "apoz" and pattern == "filter":
        options["ignore"] = "4"  # no ReLU behind it
    elif method == "skeletonization":
        options["loss_fn"] = F.cross_entropy
    if METHODS[method].needs == "loss":
        options["loss_fn"] = F.cross_entropy
    reason = make_method(method, {}).misfit(parsed)
    if reason is not None:
        with pytest.raises(ValueError, match=r"prune: method .* needs .*, got pattern"):
            prune(model, method, 0.5, pattern, data=BATCHES, **options)
        return
    report = prune(model, method, 0.5, pattern, data=BATCHES, **options)
    masks = [w for w, la in zip(weights(model), report.layers)]
    assert all(parsed.verify(w) for w in masks)
    assert report.sparsity == pytest.approx(0.5, abs=0.12) and report.method == method


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        (
            "rigl",
            {},
            ValueError,
            "expected a method that needs no training, got 'rigl'; use Pruner",
        ),
        (
            "snip",
            {"data": BATCHES},
            ValueError,
            "expected loss_fn, which method 'snip' needs, got N",
        ),
        ("synflow", {}, ValueError, "prune: expected data, which method 'synflow' needs, got None"),
        (
            "snip",
            {**LOSS, "iterations": 0},
            ValueError,
            "expected iterations to be an int >= 1, got 0",
        ),
        (
            "obd",
            {**LOSS, "samples": 1.5},
            ValueError,
            "expected samples to be an int >= 1, got 1.5",
        ),
        (
            "obd",
            {**LOSS, "curvature": "x"},
            ValueError,
            "curvature one of gauss-newton, hutchinson; g",
        ),
        ("grasp", {**LOSS, "temperature": 0}, ValueError, "prune: expected temperature > 0, got 0"),
        ("lp", {"p": -1}, ValueError, "prune: expected p > 0, got -1"),
        ("skeletonization", {"decay": 1}, ValueError, r"expected decay in \[0, 1\), got 1"),
        ("rigl", {"fraction": 2}, ValueError, r"expected fraction in \[0, 1\], got 2"),
        ("set", {"start": "x"}, ValueError, "expected start one of random, magnitude; got 'x'"),
        ("srste", {"decay": -1}, ValueError, "expected decay >= 0, got -1"),
        (
            "grasp",
            {"tau": 1},
            TypeError,
            "options of method 'grasp' among temperature, training; got",
        ),
        (
            "snip",
            {"data": BATCHES, "loss_fn": lambda output, target: output},
            ValueError,
            r"expected loss_fn to give a scalar with gradient, got shape \(5, 4\), requires_grad=T",
        ),
        ("snip", {"data": BATCHES, "loss_fn": lambda o, t: 3.0}, ValueError, "gradient, got float"),
        (
            "skeletonization",
            {"data": BATCHES, "pattern": "filter"},
            ValueError,
            r"expected targets like the outputs, \(5, 4\), or a loss_fn; got \(5,\)",
        ),
        (
            "slimming",
            {"pattern": "filter"},
            ValueError,
            "expected an affine BatchNorm of 12 features after layer '0', got none; name it in n",
        ),
        (
            "apoz",
            {"pattern": "filter", "data": BATCHES},
            ValueError,
            "expected an nn.ReLU module after layer '0', got none; add it to ignore",
        ),
        (
            "synflow",
            {"data": [X.long()]},
            ValueError,
            "expected floating-point inputs for method 'synflow', got torch.int64",
        ),
        (
            "synflow",
            {"data": [X], "huge": True},
            ValueError,
            "expected a finite flow through layer '0', got Inf or NaN",
        ),
        (
            "obd",
            {"data": [(X.repeat(12000, 1), Y)], "loss_fn": F.cross_entropy, "wide": True},
            ValueError,
            "outputs small enough for curvature 'gauss-newton', got 144000 samples of 40; use",
        ),
    ],
)
def test_bad_input_is_refused_and_nothing_changes(method, options, error, message):
    options = dict(options)
    model = mlp()
    if options.pop("wide", False):
        model = nn.Sequential(nn.Linear(8, 40).double())
    if options.pop("huge", False):
        model = mlp(nn.ReLU)
        for weight in weights(model):
            weight.mul_(1e200)
    before = [w.clone() for w in weights(model)]
    with pytest.raises(error, match=message):
        prune(model, method, 0.5, options.pop("pattern", "unstructured"), **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before))


def test_a_layer_the_loss_does_not_see_is_named():
    model = nn.ModuleDict({"used": nn.Linear(8, 4), "unused": nn.Linear(8, 4)}).double()
    model.forward = lambda x: model["used"](x)
    for method in ("snip", "taylor", "grasp", "obd"):
        with pytest.raises(ValueError, match="a loss that depends on layer 'unused', got one that"):
            prune(model, method, 0.5, **LOSS)
    with pytest.raises(ValueError, match="a loss that depends on layer 'unused', got one that"):
        prune(model, "skeletonization", 0.5, "filter", **LOSS)
    with pytest.raises(ValueError, match="expected a call of layer 'unused', got none"):
        prune(model, "apoz", 0.5, "channel", data=BATCHES)
    assert prune(model, "snip", 0.5, ignore="unused", **LOSS).zeros == 16
    note = prune(model, "synflow", 0.5, **LOSS).layers[1].note
    assert note == "no flow reaches it; scored by magnitude"


def test_outputs_that_are_no_tensors():
    class Named(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    model = Named(8, 4).double()
    loss = {
        "data": BATCHES,
        "loss_fn": lambda output, target: F.cross_entropy(output["logits"], target),
    }
    assert prune(copy.deepcopy(model), "snip", 0.5, **loss).zeros == 16
    assert prune(copy.deepcopy(model), "grasp", 0.5, temperature=1, **loss).zeros == 16
    for method, when in (
        ("grasp", "temperature other than 1"),
        ("obd", "curvature 'gauss-newton'"),
    ):
        with pytest.raises(
            TypeError, match=f"expected the model to give a tensor .*{when}, got dict"
        ):
            prune(model, method, 0.5, **loss)

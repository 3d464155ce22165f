"""What the Pruner refuses, and that nothing changes then."""

import math

import pytest
import torch
from pruner_common import X, Y, backward, make_pruner, mlp, one_thread, sgd, state, train  # noqa: F401
from torch.nn import functional as F

from sparsekern.prune import Pruner, schedules
from sparsekern.prune.bits import unpack


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "snip"}, "Pruner.load_state_dict: expected method 'rigl', got 'snip'"),
        ({"pattern": "2:4"}, "Pruner.load_state_dict: expected pattern 'unstructured', got '2:4'"),
        ({"format": 9}, "Pruner.load_state_dict: expected format 1, got 9"),
        ({"layers": {}}, r"Pruner.load_state_dict: expected layers \['0', '3', '5'\], got \[\]"),
        ({"shape": (2, 2)}, "layer '5': expected a mask of shape .4, 16., got .2, 2."),
        ({"mask": torch.zeros(3, dtype=torch.uint8)}, "layer '5': expected uint8 .8,. for shape"),
        ({"held": torch.zeros(3)}, "layer '5': expected 32 held values, got .3,."),
        ({"seen": torch.zeros(3)}, "layer '5': expected seen like the weight, got .3,."),
    ],
)
def test_states_that_do_not_fit_are_refused_and_nothing_changes(change, message):
    model = mlp()
    pruner = make_pruner("rigl", model, sgd(model), scope="uniform")
    saved = pruner.state_dict()
    saved["layers"]["5"].update({k: v for k, v in change.items() if k not in saved})
    saved.update({k: v for k, v in change.items() if k in saved})
    before = state(model)
    with pytest.raises(ValueError, match=message):
        pruner.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(state(model), before))


def test_a_state_that_lacks_something_is_refused():
    model = mlp()
    pruner = make_pruner("rigl", model, sgd(model))
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    for key in ("steps", "generator", "layers"):
        saved = pruner.state_dict()
        del saved[key]
        with pytest.raises(ValueError, match=f"expected a state with .'{key}'., got none"):
            pruner.load_state_dict(saved)
    assert all(torch.equal(mask, before[name]) for name, mask in pruner.masks.items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": 3}, TypeError, "Pruner: expected a torch.optim.Optimizer, got int"),
        (
            {"schedule": 0.5},
            TypeError,
            "Pruner: expected a schedule of sparsekern.sched.*got float",
        ),
        (
            {"sparsity": 0.5, "schedule": schedules.OneShot(0.9)},
            ValueError,
            "Pruner: expected sparsity 0.9, as the schedule ends, got 0.5",
        ),
        (
            {"optimizer": sgd(mlp())},
            ValueError,
            "expected an optimizer that holds weights of the model, got one that holds none",
        ),
        (
            {"method": "rigl", "scope": "global"},
            ValueError,
            "a scope that gives each layer a budget .*, which method 'rigl' needs, got 'global'",
        ),
        ({"method": "snip"}, ValueError, "expected data, which method 'snip' needs, got None"),
        (
            {"method": "snip", "data": [(X, Y)]},
            ValueError,
            "expected loss_fn, which method 'snip' needs, got None",
        ),
        (
            {"method": "movement"},
            ValueError,
            "expected training steps before the first update of layer '0' by movement pruning",
        ),
        (
            {"pattern": "2:4", "sparsity": 0.7},
            ValueError,
            "expected sparsity 0.5 .fixed by pattern",
        ),
        (
            {"method": "snip", "data": [(X * math.nan, Y)], "loss_fn": F.cross_entropy},
            ValueError,
            "NaN",
        ),
    ],
)
def test_bad_arguments_are_refused_and_leave_no_trace(options, error, message):
    model = mlp()
    optimizer = options.pop("optimizer", None) or sgd(model)
    before = state(model)
    with pytest.raises(error, match=message):
        Pruner(model, optimizer, **options)
    assert all(torch.equal(a, b) for a, b in zip(state(model), before))
    assert not any(p._backward_hooks for p in model.parameters())
    Pruner(model, sgd(model))  # free


def test_one_pruner_at_a_time():
    model = mlp()
    pruner = Pruner(model, sgd(model))
    with pytest.raises(ValueError, match="without another pruner, got one on layer '0'; finalize"):
        Pruner(model, sgd(model))
    pruner.finalize()
    Pruner(model, sgd(model))


def test_a_missing_gradient_is_named_and_the_update_changes_nothing():
    model = mlp()
    model[3].weight.requires_grad_(False)
    optimizer = sgd(model)
    pruner = make_pruner("rigl", model, optimizer)
    train(model, optimizer, pruner, 3)
    backward(model, optimizer)
    optimizer.step()
    before = state(model)
    with pytest.raises(
        ValueError, match="expected a gradient of layer '3' in the step before an up"
    ):
        pruner.step()
    assert all(torch.equal(a, b) for a, b in zip(state(model), before))


@pytest.mark.parametrize("method", ["rigl", "movement", "soft_movement", "srste", "magnitude"])
def test_scores_that_become_nan_in_training_are_refused_and_masks_stay(method):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = make_pruner(method, model, optimizer)
    train(model, optimizer, pruner, 7)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    in_weights = method in ("srste", "magnitude")
    if in_weights:
        with torch.no_grad():
            model[3].weight[masks["3"].nonzero()[0].tolist()] = math.nan
    with pytest.raises(ValueError, match="expected scores without NaN in layer '3', got NaN"):
        for _ in range(5):
            masks = {name: mask.clone() for name, mask in pruner.masks.items()}
            optimizer.zero_grad()
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            if not in_weights:
                model[3].weight.grad[0, 0] = math.nan
            optimizer.step()
            before = state(model)
            pruner.step()
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())
    for now, old in zip(state(model), before):
        torch.testing.assert_close(now, old, rtol=0, atol=0, equal_nan=True)


def test_packed_masks_of_another_size():
    for packed in (torch.zeros(3, dtype=torch.uint8), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"expected uint8 \(2,\) for shape \(3, 5\), got"):
            unpack(packed, (3, 5))

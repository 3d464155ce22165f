"""Least-squares refits of what survives."""

import copy

import pytest
import torch
from pruner_common import one_thread  # noqa: F401
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.prune import prune
from sparsekern.prune.calibration import input_rows
from sparsekern.prune.regression import least_squares
from sparsekern.prune.targets import Layer

X = torch.randn(256, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
X[:, 1] += X[:, 0]
X[:, 5:8] += 2 * X[:, 2:5]
BATCHES = [X[:100], X[100:]]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4)).double()


def solved(x, y, mask, dense, ridge):
    """Row by row with torch's own solver, on the kept columns alone; x `(T, in)`, y `(T, out)`."""
    strength, found = ridge * (x**2).sum(0).mean(), torch.zeros_like(dense)
    for row, kept in enumerate(mask):
        eye = strength.sqrt() * torch.eye(int(kept.sum()), dtype=x.dtype)
        left = torch.cat([x[:, kept], eye])
        right = torch.cat([y[:, row], strength.sqrt() * dense[row, kept]])
        found[row, kept] = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    return found


def test_least_squares_by_the_solver_of_torch():
    torch.manual_seed(0)
    dense = torch.randn(5, 12, dtype=torch.float64)
    mask, y = torch.rand(5, 12) < 0.5, X @ dense.T + torch.randn(256, 5)
    mask[0] = False
    goal = dense, X.T @ X, y.T @ X, 0.01, 30
    got = least_squares(dense.where(mask, 0), mask, *goal)
    torch.testing.assert_close(got, solved(X, y, mask, dense, 0.01))
    assert not bool(got[~mask].any())


def test_least_squares_with_inputs_that_are_never_active():
    x, dense = X.clone(), torch.ones(3, 12, dtype=torch.float64)
    x[:, 3] = 0
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[:, 0] = False
    got = least_squares(dense.where(mask, 0), mask, dense, x.T @ x, dense @ (x.T @ x), 0.0, 30)
    assert bool(torch.isfinite(got).all()) and bool((got[:, 3] == 1).all())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
def test_reconstruct_goes_from_stage_to_stage(pattern):
    dense, model = mlp(), mlp()
    prune(model, sparsity=0.5, pattern=pattern, scope="uniform")
    with torch.no_grad():
        model[2].bias.add_(0.5)  # the weights make up for this as far as they can
    before = copy.deepcopy(model)
    result = sk.reconstruct(model, dense, BATCHES, ridge=0.02, iterations=40)
    inputs, wanted = X, X
    with torch.no_grad():
        for index in (0, 2, 3):
            mask = before[index].weight != 0
            goal = dense[index](wanted) - model[index].bias
            weight = solved(inputs, goal, mask, dense[index].weight, 0.02)
            torch.testing.assert_close(model[index].weight.detach(), weight)
            assert torch.equal(model[index].weight != 0, mask)
            error = (inputs @ before[index].weight.T - goal).square().sum() / goal.square().sum()
            assert result.before[str(index)] == pytest.approx(float(error))
            error = (inputs @ weight.T - goal).square().sum() / goal.square().sum()
            assert result.after[str(index)] == pytest.approx(float(error))
            wanted, inputs = dense[index](wanted), model[index](inputs)
            if index == 0:
                wanted, inputs = wanted.relu(), inputs.relu()
        assert (model(X) - dense(X)).square().sum() < (before(X) - dense(X)).square().sum()


def test_reconstruct_in_convolutions_keeps_masks_of_a_pruner_and_layers_without_zeros():
    torch.manual_seed(0)
    first = nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    dense = nn.Sequential(*first, nn.Conv2d(8, 4, 1)).double()
    model = copy.deepcopy(dense)
    images = torch.randn(16, 4, 6, 6, dtype=torch.float64)
    prune(model, sparsity=0.5, ignore="3")
    mask = model[0].weight != 0
    mask[0, 0, 0, 0] = True  # kept, though 0 at the moment
    model[0].register_buffer("weight_mask", mask, persistent=False)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 0
    last = model[3].weight.detach().clone()
    result = sk.reconstruct(model.train(), dense, [images], ridge=0.0, iterations=60)
    assert list(result.after) == ["0"] and result.after["0"] < result.before["0"]
    assert model.training and torch.equal(model[3].weight, last)
    assert bool((model[0].weight[~mask] == 0).all()) and bool(model[0].weight[0, 0, 0, 0] != 0)
    (rows,) = input_rows(Layer("0", dense[0]), images)
    for group in range(2):
        part = slice(4 * group, 4 * group + 4)
        weight = dense[0].weight[part].flatten(1).detach()
        found = solved(rows[group], rows[group] @ weight.T, mask[part].flatten(1), weight, 0.0)
        torch.testing.assert_close(model[0].weight[part].flatten(1).detach(), found)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "channel"])
def test_method_refit_is_the_mask_of_wanda_and_a_regression(pattern):
    dense, model, masked = mlp(), mlp(), mlp()
    options = {"sparsity": 0.5, "pattern": pattern, "data": BATCHES, "ignore": ["2", "3"]}
    prune(masked, "wanda", **options)
    prune(model, "refit", ridge=0.02, iterations=40, **options)
    mask, weight = masked[0].weight != 0, dense[0].weight.detach()
    assert torch.equal(model[0].weight != 0, mask)
    torch.testing.assert_close(
        model[0].weight.detach(), solved(X, X @ weight.T, mask, weight, 0.02)
    )


def test_refitting_helps_every_method():
    dense = mlp()
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt", "refit"):
        model = mlp()
        data = {} if method == "magnitude" else {"data": BATCHES}
        prune(model, method, 0.6, scope="uniform", **data)
        plain = F.mse_loss(model(X), dense(X)).item()
        found = sk.reconstruct(model, dense, BATCHES)
        assert all(found.after[name] < found.before[name] * 1.001 for name in found.before)
        errors[method] = plain, F.mse_loss(model(X), dense(X)).item()
    # Nothing is left to win after SparseGPT, which updates weights itself.
    assert all(after < before * 1.02 for before, after in errors.values())
    assert all(errors[m][1] < 0.7 * errors[m][0] for m in ("magnitude", "wanda"))
    assert errors["refit"][0] < errors["wanda"][0]


def test_errors_leave_the_model_as_it_was():
    dense, model = mlp(), mlp()
    prune(model, sparsity=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    other = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).double()
    bad = X.clone()
    bad[0, 0] = torch.inf
    for arguments, options, message in (
        ((model, model, [X]), {}, "reconstruct: expected dense to be another model, got the prun"),
        ((model, other, [X]), {}, r"reconstruct: expected a dense model with the layers \[\('0', "),
        ((mlp(), dense, [X]), {}, "reconstruct: expected a model with pruned layers, got none wi"),
        ((model, dense, [X]), {"ridge": -1}, "reconstruct: expected ridge >= 0, got -1"),
        ((model, dense, [X]), {"iterations": 0}, "expected iterations to be an int >= 1, got 0"),
        ((model, dense, []), {}, "expected data with at least one batch, got none"),
        ((model, dense, [X, bad]), {}, "reconstruct: expected finite inputs of layer '0', got NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            sk.reconstruct(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    for options, message in (
        ({"ridge": -1}, "prune: expected ridge >= 0, got -1"),
        ({"iterations": 0}, "prune: expected iterations to be an int >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, "refit", data=[X], **options)

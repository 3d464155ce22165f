"""Averages of weights (EMA, SWA) of pruned, sparse and int8 models."""

import copy
import io

import pytest
import torch
from pruner_common import X, Y, backward, make_pruner, mlp, one_thread, sgd, train, weights  # noqa: F401
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    update_bn,
)

import sparsekern as sk
from sparsekern.measure.memory import extra_buffer_bytes, weight_bytes
from sparsekern.prune import Pruner, schedules
from sparsekern.weight_base import HINT

KINDS = {
    "swa": {},
    "swa, buffers": {"use_buffers": True},
    "swa one by one, buffers": {"use_buffers": True, "avg_fn": get_swa_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema, buffers": {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema one by one, buffers": {"use_buffers": True, "avg_fn": get_ema_avg_fn(0.9)},
}
PATTERNS = {"unstructured": 0.8, "2:4": None, "block:4x4": 0.8}


class BySumOfBuffers(nn.Module):
    """The averages that people write themselves: all parameters, then all buffers."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)

    def forward(self, x):
        return self.module(x)

    @torch.no_grad()
    def update_parameters(self, model):
        for mine, theirs in zip(self.module.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(mine * 0.9 + theirs * 0.1)


class ByState(BySumOfBuffers):
    """As timm's ModelEmaV3: the state_dict, floating point averaged and the rest copied."""

    @torch.no_grad()
    def update_parameters(self, model):
        pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        for mine, theirs in pairs:
            mine.lerp_(theirs, 0.1) if mine.is_floating_point() else mine.copy_(theirs)


MAKERS = {name: lambda m, kw=kw: AveragedModel(m, **kw) for name, kw in KINDS.items()}
MAKERS |= {"by hand": BySumOfBuffers, "by state": ByState}


def as_sparse(model, pattern):
    model = nn.Sequential(*[
        sk.SparseLinear.from_dense(m) if isinstance(m, nn.Linear) else m for m in model
    ])  # fmt: skip
    wanted = {"unstructured": "csr", "2:4": "nm", "block:4x4": "block"}[pattern]
    assert model[0].weight.format == wanted
    return model


@pytest.mark.parametrize("average_first", [True, False])
@pytest.mark.parametrize("maker", list(MAKERS))
@pytest.mark.parametrize("method", ["magnitude", "rigl", "srste"])
def test_averages_of_a_model_under_a_pruner(method, maker, average_first):
    model = mlp()
    optimizer = sgd(model)
    average = MAKERS[maker](model) if average_first else None
    pruner = make_pruner(method, model, optimizer)
    average = average or MAKERS[maker](model)
    for _ in range(18):
        train(model, optimizer, pruner, 1)
        average.update_parameters(model)
    before = copy.deepcopy(weights(average))
    pruner.apply_masks(average)
    for mine, old, mask in zip(weights(average), before, pruner.masks.values()):
        assert torch.equal(mine, old.where(mask, 0)) and (mine != 0).any()
    update_bn([X], average)
    average.update_parameters(model)  # goes on
    pruner.finalize()
    pruner.apply_masks(average.module)
    for mine, theirs in zip(weights(average), weights(model)):
        assert not mine[theirs == 0].any()
    average.eval()
    wanted = average(X)
    converted = sk.convert_to_sparse(average.module)
    torch.testing.assert_close(converted(X), wanted)


@pytest.mark.parametrize("pattern", list(PATTERNS))
@pytest.mark.parametrize("maker", list(MAKERS))
def test_averages_of_a_sparse_model_are_those_of_its_dense_twin(maker, pattern):
    dense = mlp()
    sk.prune(dense, sparsity=PATTERNS[pattern], pattern=pattern, scope="uniform")
    sparse = as_sparse(copy.deepcopy(dense), pattern)
    results = []
    for model in (dense, sparse):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        average = MAKERS[maker](model)
        pruner = Pruner(model, optimizer, "keep") if model is dense else None
        for _ in range(6):
            backward(model, optimizer)
            optimizer.step()
            average.update_parameters(model)
        if pruner:
            pruner.finalize()
        results.append(average.eval()(X))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("pattern", list(PATTERNS))
@pytest.mark.parametrize("maker", list(MAKERS))
def test_averages_leave_indices_plans_and_int8_values_alone(maker, pattern):
    model = mlp()
    sk.prune(model, sparsity=PATTERNS[pattern], pattern=pattern, scope="uniform")
    model = as_sparse(model, pattern).eval()
    for quantized in (False, True):
        if quantized:
            sk.quantize(model, X)
        average = MAKERS[maker](model)
        weight, mine = model[0].weight, average.module[0].weight
        for _ in range(3):
            average.update_parameters(model)
        names = (*(n for n in weight.parts if n not in weight._parameters), "plan", "plan_t")
        for name in names:
            assert torch.equal(getattr(weight, name), getattr(mine, name))
        torch.testing.assert_close(average(X), model(X))


def test_a_model_that_was_converted_for_training():
    model = mlp()
    sk.prune(model, sparsity=0.9)
    model = sk.convert_to_sparse(model, mode="training")
    assert sk.report(model).n_sparse == 3
    optimizer, average = sgd(model), AveragedModel(model, use_buffers=True)
    for _ in range(3):
        backward(model, optimizer)
        optimizer.step()
        average.update_parameters(model)
    assert bool(torch.isfinite(average.eval()(X)).all())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_an_average_that_is_older_than_the_masks_converts_by_its_zeros(pattern):
    model = mlp()
    optimizer = sgd(model)
    final = 0.5 if pattern == "2:4" else 0.9
    pruner = Pruner(model, optimizer, pattern=pattern, schedule=schedules.OneShot(final, at=2))
    average = AveragedModel(model)  # a copy, with masks that drop nothing yet
    train(model, optimizer, pruner, 3)
    for _ in range(3):
        train(model, optimizer, pruner, 1)
        average.update_parameters(model)
    average.eval()
    wanted = average(X)
    sparse = sk.convert_to_sparse(average.module)
    row = sk.report(sparse).layers[0]
    assert row.pattern == pattern and row.sparsity >= final - 0.1
    assert sk.report(sparse).n_sparse == (0 if pattern == "2:4" else 3)  # 2:4 is dense untimed
    torch.testing.assert_close(sparse(X), wanted)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:8x8"])
def test_parts_that_are_no_buffers_move_save_and_load_as_such(pattern, int8):
    options = {"pattern": pattern, "sparsity": 0.5}
    layer, x = sk.SparseLinear(32, 16, **options).eval(), torch.randn(3, 32)
    if int8:
        sk.quantize(layer)
    weight = layer.weight
    parts = {name: getattr(weight, name) for name in weight.parts}
    assert [name for name, _ in layer.named_buffers()] == []
    state = layer.state_dict()
    assert set(state) == {"bias", *(f"weight.{part}" for part in (*parts, HINT))}
    moved, other = copy.deepcopy(layer).to("meta"), copy.deepcopy(layer)
    assert all(getattr(moved.weight, name).is_meta for name in (*parts, "plan", "plan_t"))
    moved.load_state_dict(state, assign=True)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x)) and torch.equal(moved(x), layer(x))
    if not int8:
        with torch.device("meta"):
            fresh = sk.SparseLinear(32, 16, **options)
        fresh.load_state_dict(state, assign=True)
        assert torch.equal(fresh(x), layer(x))
    assert extra_buffer_bytes(layer) == weight.plan.nbytes + weight.plan_t.nbytes
    assert weight_bytes(layer) == sum(t.nbytes for t in (*parts.values(), layer.bias))


def test_apply_masks_refuses_other_models_and_changes_nothing():
    model = mlp()
    pruner = Pruner(model, sgd(model), sparsity=0.5)
    other = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 8))
    before = weights(other)[0].clone()
    with pytest.raises(ValueError, match=r"apply_masks: expected layers \['5'\] in the model, got"):
        pruner.apply_masks(other)
    other.append(nn.ReLU()), other.append(nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"of shape \(16, 24\) in layer '3', got \(8, 24\)"):
        pruner.apply_masks(other)
    with pytest.raises(TypeError, match=r"apply_masks: expected a torch.nn.Module, got dict"):
        pruner.apply_masks({})
    assert torch.equal(weights(other)[0], before) and not hasattr(other[0], "weight_mask")


def test_averages_follow_masks_that_change_and_transposed_layers():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.nf, self.weight = 8, nn.Parameter(torch.randn(16, 8))

        def forward(self, x):
            return x @ self.weight

    model = nn.Sequential(Conv1D(), nn.ReLU(), nn.Linear(8, 4))
    optimizer = sgd(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    pruner = Pruner(model, optimizer, "set", schedule=schedules.Constant(0.5, 1, 9))
    for _ in range(10):
        train(model, optimizer, pruner, 1)
        average.update_parameters(model)
        pruner.apply_masks(average)
        for name, mask in pruner.masks.items():
            assert not average.module.get_submodule(name).weight[~mask].any()


def test_a_copy_of_a_model_under_a_pruner_is_free():
    model = mlp()
    optimizer = sgd(model)
    pruner = make_pruner("srste", model, optimizer, "2:4", products=True)
    train(model, optimizer, pruner, 3)
    twin = copy.deepcopy(model)
    backward(twin, sgd(twin))
    assert (twin[0].weight.grad[~pruner.masks["0"]] != 0).any()
    pruner.apply_masks(twin)
    assert type(twin[0]) is nn.Linear
    other = Pruner(twin, sgd(twin), "keep")
    masks = zip(other.masks.values(), pruner.masks.values())
    assert all(torch.equal(a, b) for a, b in masks)


def test_masks_for_compiled_averages_and_for_the_model_itself():
    model = mlp()
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, sparsity=0.5)
    averages = [
        AveragedModel(torch.compile(model, backend="eager")),
        torch.compile(AveragedModel(model), backend="eager"),
    ]
    train(model, optimizer, pruner, 2)
    for average in averages:
        nn.init.ones_(weights(average)[0])
        pruner.apply_masks(average)
        assert torch.equal(weights(average)[0] != 0, pruner.masks["0"])
    pruner.apply_masks(model)
    train(model, optimizer, pruner, 2)
    assert pruner.finalize().sparsity == 0.5

import copy
import io
import math

import pytest
import torch
from pruner_common import (  # noqa: F401
    CASES,
    X,
    Y,
    backward,
    make_pruner,
    mlp,
    one_thread,
    sgd,
    state,
    train,
    weights,
)
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern import patterns
from sparsekern.prune import Pruner, schedules
from sparsekern.prune.bits import drop_, pack, unpack

OPTIMIZERS = [
    sgd,
    lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda m: torch.optim.Adam(m.parameters(), 0.01, weight_decay=0.1),
    lambda m: torch.optim.AdamW(m.parameters(), 0.01, weight_decay=0.5, amsgrad=True),
]


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_momentum_and_decay_do_not_revive_what_is_dropped(make_optimizer):
    model = mlp()
    optimizer = make_optimizer(model)
    for _ in range(3):  # momentum from before the mask
        backward(model, optimizer)
        optimizer.step()
    pruner = Pruner(model, optimizer, sparsity=0.8)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    for _ in range(5):
        backward(model, optimizer)
        assert all((model.get_submodule(n).weight.grad[~m] == 0).all() for n, m in masks.items())
        optimizer.step()
        for name, mask in masks.items():
            weight = model.get_submodule(name).weight
            assert (weight[~mask] == 0).all() and not torch.signbit(weight[~mask]).any()
            for value in optimizer.state[weight].values():
                if value.shape == weight.shape:
                    assert (value[~mask] == 0).all()
        pruner.step()
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())
    assert pruner.report().zeros == 666


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize("method", list(CASES))
def test_resumes_in_the_middle_of_a_schedule_bit_by_bit(method, pattern):
    model = mlp()
    optimizer = sgd(model)
    pruner = make_pruner(method, model, optimizer, pattern)
    train(model, optimizer, pruner, 8)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], file)
    train(model, optimizer, pruner, 12)

    for order in ("pruner last", "model before the pruner is made"):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = mlp(seed=1)
        other = sgd(again)
        if order == "pruner last":
            resumed = make_pruner(method, again, other, pattern)
            again.load_state_dict(saved[0])
        else:
            again.load_state_dict(saved[0])
            resumed = make_pruner(method, again, other, pattern)
        other.load_state_dict(saved[1])
        resumed.load_state_dict(saved[2])
        train(again, other, resumed, 12)
        assert all(torch.equal(a, b) for a, b in zip(state(again), state(model)))
    # Masks obey, not only weights: what grows late may still be 0 behind a dead ReLU.
    parsed, masks = patterns.parse(pattern), pruner.masks
    assert all(parsed.verify(mask) for mask in masks.values())
    assert all((w[~m] == 0).all() for w, m in zip(weights(model), masks.values()))
    kept = sum(int(m.count_nonzero()) for m in masks.values())
    assert kept == pytest.approx(416, abs=16)
    assert pruner.finalize().sparsity >= 0.48


def test_masks_are_saved_as_bits_and_apart_from_the_model():
    model = mlp()
    keys = list(model.state_dict())
    pruner = Pruner(model, sgd(model), sparsity=0.8)
    assert list(model.state_dict()) == keys
    saved = pruner.state_dict()["layers"]["0"]
    assert saved["mask"].dtype == torch.uint8 and saved["mask"].numel() == 24 * 16 // 8
    model.load_state_dict(mlp().state_dict(), strict=True)
    for shape in ((3, 5), (1,), (7, 8, 3)):
        mask = torch.rand(shape) > 0.5
        assert torch.equal(unpack(pack(mask), shape), mask)


def test_masks_change_in_place_and_follow_the_model():
    model = mlp()
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, schedule=schedules.Cubic(0.1, 0.8, 0, 10))
    mask, parameter = model[0].weight_mask, model[0].weight
    before = mask.clone()
    train(model, optimizer, pruner, 10)
    assert model[0].weight_mask is mask and not torch.equal(mask, before)
    assert model[0].weight is parameter and torch.equal(mask, parameter != 0)
    twin = copy.deepcopy(model)
    assert not twin[0].weight._backward_hooks and torch.equal(twin[0].weight_mask, mask)
    Pruner(twin, sgd(twin), sparsity=0.8)  # a copy is free for another pruner
    pruner.finalize()
    assert not hasattr(model[0], "weight_mask") and not parameter._backward_hooks
    backward(model, optimizer)
    assert (parameter.grad[~mask] != 0).any()


def test_gradual_magnitude_pruning_is_the_published_algorithm_and_weights_return():
    """Against a copy with explicit masks in the forward pass, as Zhu & Gupta describe it."""
    schedule = schedules.Cubic(0, 0.7, 2, 20, 3)
    torch.manual_seed(0)
    model = nn.Linear(16, 4)
    dense = [model.weight.detach().clone(), model.bias.detach().clone()]
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    pruner = Pruner(model, optimizer, scope="uniform", schedule=schedule)
    mask, returned = torch.ones(4, 16), 0
    for step in range(1, 26):
        train(model, optimizer, pruner, 1)
        w, b = (t.clone().requires_grad_() for t in dense)
        F.cross_entropy(F.linear(X, w * mask, b), Y).backward()
        dense = [w.detach() - 0.5 * w.grad, b.detach() - 0.5 * b.grad]
        if schedule.is_update(step):
            kept = 64 - math.floor(schedule.sparsity(step) * 64 + 0.5)
            order = dense[0].abs().flatten().argsort(descending=True)
            new = torch.zeros(64).index_fill(0, order[:kept], 1).view(4, 16)
            returned += int((new * (1 - mask)).sum())
            mask = new
        torch.testing.assert_close(model.weight.detach(), dense[0] * mask)
    assert returned > 0 and pruner.report().zeros == 45


def test_exact_counts_at_every_update():
    model = mlp()
    optimizer = sgd(model)
    schedule = schedules.Cubic(0.2, 0.9, 1, 10, 2)
    pruner = make_pruner("magnitude", model, optimizer, schedule=schedule, scope="global")
    total = sum(w.numel() for w in weights(model))
    for step in range(1, 13):
        backward(model, optimizer)
        optimizer.step()
        updated = pruner.step()
        assert updated == schedule.is_update(step) and pruner.steps == step
        if updated:
            zeros = sum(int((~m).sum()) for m in pruner.masks.values())
            assert zeros == math.floor(schedule.sparsity(step) * total + 0.5)
    assert pruner.report().sparsity == pytest.approx(0.9, abs=1e-3)


def test_nm_passes_through_larger_n():
    model = mlp()
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, pattern="2:8", schedule=schedules.Cubic(0, 0.75, 1, 9, 1))
    kept = []
    for _ in range(10):
        train(model, optimizer, pruner, 1)
        kept.append(int(pruner.masks["0"].view(24, 2, 8).sum(2).max()))
    assert kept == sorted(kept, reverse=True) and kept[0] == 8 and kept[-1] == 2
    assert len(set(kept)) > 4 and pruner.report().sparsity == 0.75


def test_a_dict_scope_grows_with_the_schedule():
    model = mlp()
    optimizer = sgd(model)
    scope = {"0": 0.8, "3": 0.4}
    pruner = Pruner(model, optimizer, scope=scope, schedule=schedules.Iterative(0.8, 2, 1))
    train(model, optimizer, pruner, 1)
    half = 1 - 0.2**0.5
    wanted = [half, half / 2, 0]
    assert [la.sparsity for la in pruner.report().layers] == pytest.approx(wanted, abs=2e-3)
    train(model, optimizer, pruner, 1)
    wanted = [0.8, 0.4, 0]
    assert [la.sparsity for la in pruner.report().layers] == pytest.approx(wanted, abs=2e-3)


def test_steps_that_the_optimizer_skips_do_not_count():
    model = mlp()
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, schedule=schedules.OneShot(0.5, at=2))
    assert [pruner.step() for _ in range(5)] == [False] * 5 and pruner.steps == 0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for loss_scale in (math.inf, 1, math.inf, 1):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(X), Y) * loss_scale).backward()
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
    assert pruner.steps == 2 and pruner.report().sparsity == 0.5


def scaled_step(model, optimizer, scaler, factor=1.0):
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(X), Y) * factor).backward()
    scaler.step(optimizer)
    scaler.update()


def test_fused_optimizers_skip_steps_and_scale_gradients_inside():
    """GradScaler calls them with scaled gradients, and with Inf that makes them do nothing."""
    results = {}
    for method in ("magnitude", "movement", "soft_movement", "rigl", "srste"):
        for fused in (False, True):
            model = mlp()
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=fused)
            pruner = make_pruner(method, model, optimizer)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            for step in range(22):
                scaled_step(model, optimizer, scaler, math.inf if step in (2, 9) else 1.0)
                pruner.step()
            assert pruner.steps == 20, method
            results[fused] = pruner.masks, weights(model)
        for name, mask in results[True][0].items():
            assert torch.equal(mask, results[False][0][name]), method
        for mine, other in zip(results[True][1], results[False][1]):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_clipping_does_not_see_dropped_weights():
    model = mlp()
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, sparsity=0.9)
    backward(model, optimizer)
    wanted = math.sqrt(sum(p.grad[p != 0].pow(2).sum() for p in weights_of(model)))
    assert float(nn.utils.get_total_norm([p.grad for p in weights_of(model)])) == pytest.approx(
        wanted
    )
    assert pruner.report().sparsity == pytest.approx(0.9, abs=1e-3)


def weights_of(model):
    return [m.weight for m in model if isinstance(m, nn.Linear)]


def test_tied_weights_and_transposed_layers():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.nf, self.weight = 8, nn.Parameter(torch.randn(16, 8))

        def forward(self, x):
            return x @ self.weight

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = Conv1D(), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = nn.Parameter(self.a.weight.data)  # one memory, two parameters

        def forward(self, x):
            return self.b(self.a(self.first(x)))

    for method in ("magnitude", "rigl", "srste"):
        model = Tied()
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        schedule = schedules.Constant(0.5, 2)
        pruner = Pruner(model, optimizer, method, pattern="2:4", schedule=schedule)
        for _ in range(6):
            optimizer.zero_grad()
            model(X).pow(2).mean().backward()
            optimizer.step()
            pruner.step()
            assert ((model.first.weight.t().reshape(8, 4, 4) != 0).sum(2) <= 2).all()
            assert ((model.a.weight.view(8, 2, 4) != 0).sum(2) <= 2).all()
        assert model.first.weight_mask.shape == (16, 8)
        assert torch.equal(model.a.weight, model.b.weight)


def test_frozen_layers_and_layers_without_gradient_are_masked_too():
    model = mlp()
    model[3].weight.requires_grad_(False)
    model[5].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    pruner = Pruner(model, optimizer, sparsity=0.5, scope="uniform")
    train(model, optimizer, pruner, 2)
    assert [la.sparsity for la in pruner.report().layers] == [0.5, 0.5, 0.5]


def test_set_masks_replaces_masks():
    model = mlp()
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, sparsity=0.5)
    mask = torch.rand(24, 16) > 0.3
    pruner.set_masks({"0": mask})
    train(model, optimizer, pruner, 2)
    assert torch.equal(pruner.masks["0"], mask) and (model[0].weight[~mask] == 0).all()
    for bad, message in (
        ({"9": mask}, r"Pruner.set_masks: expected names of \['0', '3', '5'\], got '9'"),
        ({"0": mask.float()}, "expected a boolean mask of shape .24, 16. for layer '0', got torch"),
        ({"0": mask.t()}, r"for layer '0', got torch.bool \(16, 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pruner.set_masks(bad)


def test_a_finalized_model_converts_to_the_same_outputs():
    model = mlp()
    optimizer = sgd(model)
    pruner = make_pruner("rigl", model, optimizer, pattern="block:4x4")
    train(model, optimizer, pruner, 10)
    assert str(pruner.finalize()).startswith("rigl, block:4x4, erk")
    model.eval()
    with torch.no_grad():
        wanted = model(X)
        sparse = sk.convert_to_sparse(copy.deepcopy(model), X)
        torch.testing.assert_close(sparse(X), wanted)
    for use in (pruner.step, pruner.finalize, pruner.state_dict, lambda: pruner.masks):
        with pytest.raises(
            RuntimeError, match=r"Pruner\..*: expected a pruner in use, got one fin"
        ):
            use()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["plain", "transposed", "channels_last", "strided"])
def test_drop_is_masked_fill_bit_by_bit(dtype, layout):
    values = torch.randn(6, 4, 3, 5).to(dtype)
    values.view(-1)[:4] = torch.tensor([math.nan, -math.inf, -0.0, 1.0])
    tensor = {
        "plain": values.clone(),
        "transposed": values.clone().transpose(0, 1),
        "channels_last": values.to(memory_format=torch.channels_last),
        "strided": values[::2],
    }[layout]
    mask = torch.rand(tensor.shape) < 0.4
    wanted = tensor.clone().masked_fill(~mask, 0)
    version = tensor._version
    assert drop_(tensor, mask) is tensor and tensor._version > version
    torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(tensor[~mask]).any()


def test_drop_keeps_the_graph_of_a_gradient():
    x = torch.randn(8, requires_grad=True)
    mask = torch.arange(8) % 2 == 0
    (gradient,) = torch.autograd.grad(drop_(x * 3, mask).sum(), x)
    assert gradient.tolist() == [3.0, 0.0] * 4

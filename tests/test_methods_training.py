"""Update rules against explicit copies: masks in the forward pass and hand-made optimizers."""

import math

import pytest
import torch
from methods_common import X, Y, mlp, one_thread, weights  # noqa: F401
from torch import nn
from torch.nn import functional as F

from sparsekern import patterns
from sparsekern.prune import Pruner, schedules
from sparsekern.prune.methods import make_method


def regrow_reference(weight, alive, growth, kept, share):
    """Algorithm 1 of RigL on flat lists."""
    weight, alive, growth = weight.flatten(), alive.flatten(), growth.flatten()
    active = sorted(alive.nonzero().flatten().tolist(), key=lambda i: -abs(float(weight[i])))
    held = active[: math.floor(kept * (1 - share) + 0.5)]
    rest = [i for i in range(weight.numel()) if i not in set(held)]
    grown = sorted(rest, key=lambda i: -float(growth[i]))[: kept - len(held)]
    return torch.zeros(weight.numel(), dtype=torch.bool).index_fill(
        0, torch.tensor(held + grown), True
    )


def test_rigl_drops_small_weights_and_grows_by_the_dense_gradient():
    model = mlp(nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    schedule = schedules.Constant(0.7, every=3, end=12)
    pruner = Pruner(model, optimizer, "rigl", scope="uniform", schedule=schedule, fraction=0.4)
    regrown = 0
    for step in range(1, 14):
        before = [m.clone() for m in pruner.masks.values()]
        values = [w.clone() for w in weights(model)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        dense = torch.autograd.grad(loss, [model[i].weight for i in (0, 2, 4)], retain_graph=True) \
            if schedule.is_update(step) else None  # fmt: skip
        loss.backward()
        optimizer.step()
        after_step = [w.clone() for w in weights(model)]
        if not pruner.step():
            assert all(torch.equal(a, b) for a, b in zip(before, pruner.masks.values()))
            continue
        share = 0.4 / 2 * (1 + math.cos(math.pi * step / 12))
        for old, new, gradient, weight, now, value in zip(
            before, pruner.masks.values(), dense, after_step, weights(model), values
        ):
            wanted = regrow_reference(weight, old, gradient.abs(), int(old.sum()), share)
            assert torch.equal(new.flatten(), wanted) and new.sum() == old.sum()
            grown = new & ~old
            regrown += int(grown.sum())
            assert (now[grown] == 0).all() and (value[~old] == 0).all()
    assert regrown > 5
    weight = model[0].weight
    assert (optimizer.state[weight]["momentum_buffer"][~pruner.masks["0"]] == 0).all()


def test_rigl_in_two_of_four_moves_weights_within_their_groups():
    """Against loops: drop the smallest of the layer, then fill every group by its gradients."""
    torch.manual_seed(0)
    model = nn.Linear(16, 6).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    schedule = schedules.Constant(0.5, every=1)
    options = {"pattern": "2:4", "schedule": schedule, "fraction": 0.4}
    pruner = Pruner(model, optimizer, "rigl", **options)
    x, moved = torch.randn(12, 16, dtype=torch.float64), 0
    for _ in range(5):
        old = pruner.masks[""].clone()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), Y)
        (dense,) = torch.autograd.grad(loss, [model.weight], retain_graph=True)
        loss.backward()
        optimizer.step()
        weight = model.weight.detach().clone()
        pruner.step()
        active = sorted(old.nonzero().tolist(), key=lambda at: -abs(float(weight[tuple(at)])))
        held = {tuple(at) for at in active[: math.floor(len(active) * 0.6 + 0.5)]}
        wanted = torch.zeros(6, 16, dtype=torch.bool)
        for row in range(6):
            for start in range(0, 16, 4):
                group = [(row, start + i) for i in range(4)]
                kept = [at for at in group if at in held]
                rest = [at for at in group if at not in held]
                rest.sort(key=lambda at: -abs(float(dense[at])))
                for at in (kept + rest)[:2]:
                    wanted[at] = True
        assert torch.equal(pruner.masks[""], wanted)
        moved += int((wanted & ~old).sum())
    assert moved > 5


def test_rigl_does_nothing_at_the_end_of_its_schedule_and_moves_forever_without_one():
    method = make_method("rigl", {})
    ending = schedules.Constant(0.5, 10, 100)
    shares = [method.at(t, ending).share for t in (0, 50, 100, 200)]
    assert shares == pytest.approx([0.3, 0.15, 0, 0])
    assert method.at(500, schedules.Constant(0.5, 10)).share == 0.3
    assert method.schedule(0.8) == schedules.Constant(0.8, 100)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "vector:1x4", "filter"])
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_regrowing_keeps_pattern_and_count(method, pattern):
    model, parsed = mlp(), patterns.parse(pattern)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    schedule = schedules.Constant(0.5, every=1)
    pruner = Pruner(model, optimizer, method, pattern=pattern, scope="uniform", schedule=schedule)
    first = {n: m.clone() for n, m in pruner.masks.items()}
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()
        for name, mask in pruner.masks.items():
            assert parsed.verify(mask) and mask.sum() == first[name].sum() == mask.numel() // 2
    assert any(not torch.equal(mask, first[name]) for name, mask in pruner.masks.items())


def test_set_keeps_the_largest_and_grows_at_random_by_its_seed():
    masks = []
    for seed in (0, 0, 1):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        schedule = schedules.Constant(0.5, every=1)
        options = {"start": "magnitude", "seed": seed, "fraction": 0.5}
        pruner = Pruner(model, optimizer, "set", scope="uniform", schedule=schedule, **options)
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        values = model[0].weight.detach().abs().flatten()
        pruner.step()
        held = values.topk(24).indices  # half of the 48 kept
        assert pruner.masks["0"].flatten()[held].all() and pruner.masks["0"].sum() == 48
        masks.append(pruner.masks["0"].clone())
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("pattern", ["unstructured", "vector:2x1"])
def test_movement_is_training_scores_straight_through(pattern):
    """Against a copy with explicit score parameters, masks in the forward pass and its own SGD."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4).double()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    scores, mask = torch.zeros(4, 8, dtype=torch.float64), torch.ones(4, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    schedule = schedules.Cubic(0, 0.6, 2, 14, 2)
    pruner = Pruner(model, optimizer, "movement", pattern=pattern, schedule=schedule)
    parsed, returned = patterns.parse(pattern), 0
    for step in range(1, 18):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()
        effective, b = (weight * mask).requires_grad_(), bias.clone().requires_grad_()
        F.cross_entropy(F.linear(X, effective, b), Y).backward()
        scores -= 0.01 * effective.grad * weight  # dL/dS = dL/dW' W
        weight, bias = weight - 0.5 * effective.grad * mask, bias - 0.5 * b.grad
        if schedule.is_update(step):
            new = parsed.mask(scores, schedule.sparsity(step)).double()
            returned += int((new * (1 - mask)).sum())
            mask = new
        torch.testing.assert_close(model.weight.detach(), weight * mask)
    assert abs(pruner.report().zeros - 19) <= 1 and returned > 0


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_srste_is_its_update_rule_with_momentum(pattern, decay):
    torch.manual_seed(0)
    model = nn.Linear(8, 4).double()
    parsed, sparsity = patterns.parse(pattern), 0.5
    w = model.weight.detach().clone().requires_grad_()
    b = model.bias.detach().clone().requires_grad_()
    reference = torch.optim.SGD([w, b], 0.3, momentum=0.9)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    schedule = schedules.Constant(sparsity, every=1, end=10)
    pruner = Pruner(model, optimizer, "srste", pattern=pattern, schedule=schedule, decay=decay)
    moved, first = 0, pruner.masks[""].clone()
    for step in range(1, 15):
        mask = pruner.masks[""].clone()
        with torch.no_grad():
            masked = w * mask
        masked.requires_grad_()
        loss = F.cross_entropy(F.linear(X, masked, b), Y)
        reference.zero_grad()
        gradient, b.grad = torch.autograd.grad(loss, [masked, b])
        w.grad = gradient + decay * ~mask * w.detach() if step <= 10 else gradient * mask
        if step == 11:  # frozen: dropped weights and their momentum are gone
            reference.state[w]["momentum_buffer"].mul_(mask)
        reference.step()
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()
        new = pruner.masks[""]
        if step <= 10:
            assert torch.equal(new, parsed.mask(w.detach().abs(), sparsity))
            moved += int((new != mask).sum())
        else:
            assert torch.equal(new, mask)
        torch.testing.assert_close(model.weight.detach(), (w * new).detach())
    assert moved > 0 and not torch.equal(first, new)


class Straight(torch.autograd.Function):
    """A mask in the forward pass that the gradient does not see (straight-through)."""

    @staticmethod
    def forward(ctx, scores, mask):
        return mask

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2"])
def test_soft_movement_is_training_scores_with_a_regulariser(threshold, pattern):
    """Against a copy with score parameters, autograd through the mask, and torch's Adam."""
    parsed, schedule = patterns.parse(pattern), schedules.Cubic(0, 0.6, 2, 20, 2)
    rate, strength = 1.0, 0.02
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    w, b = (
        [getattr(model[i], name).detach().clone().requires_grad_() for i in (0, 2)]
        for name in ("weight", "bias")
    )
    scores = [torch.zeros_like(x).requires_grad_() for x in w]
    masks = [torch.ones_like(x) for x in w]
    plain, adam = torch.optim.SGD([*w, *b], 0.3), torch.optim.Adam(scores, rate)
    options = {"threshold": threshold, "strength": strength, "lr": rate, "pattern": pattern}
    optimizer, returned = torch.optim.SGD(model.parameters(), 0.3), 0
    pruner = Pruner(model, optimizer, "soft_movement", schedule=schedule, **options)
    for step in range(1, 24):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()
        share = schedule.sparsity(step - 1) / 0.6
        hidden = F.linear(X, w[0] * Straight.apply(scores[0], masks[0]), b[0]).tanh()
        output = F.linear(hidden, w[1] * Straight.apply(scores[1], masks[1]), b[1])
        penalty = strength * share * sum(s.sigmoid().mean() for s in scores)
        for one in (plain, adam):
            one.zero_grad()
        (F.cross_entropy(output, Y) + penalty).backward()
        for x, mask in zip(w, masks):
            x.grad *= mask
        plain.step()
        if step <= schedule.last:
            adam.step()
        if schedule.is_update(step):
            new = choose_softly(parsed, scores, threshold, schedule.sparsity(step), 0.6)
            returned += sum(int((n * (1 - m)).sum()) for n, m in zip(new, masks))
            masks = new
        for index, x, mask in zip((0, 2), w, masks):
            torch.testing.assert_close(model[index].weight.detach(), (x * mask).detach())
    margin = 0.04 if threshold is None else 0.3
    assert pruner.report().sparsity == pytest.approx(0.6, abs=margin) and returned > 0


def choose_softly(pattern, scores, threshold, sparsity, final):
    units = [pattern.unit_scores(s.detach()) for s in scores]
    if threshold is not None:
        chosen = [u.sigmoid() > threshold * sparsity / final for u in units]
    else:
        size, both = scores[0].numel() // units[0].numel(), torch.cat(units)
        count = math.floor(
            (both.numel() * size - round(sparsity * both.numel() * size)) / size + 0.5
        )
        kept = torch.zeros(both.numel(), dtype=torch.bool)
        kept[both.argsort(descending=True, stable=True)[:count]] = True
        chosen = kept.split([u.numel() for u in units])
    return [pattern.expand(c, s.shape).double() for c, s in zip(chosen, scores)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, r"prune: expected threshold in \(0, 1\) or None, got 1.0"),
        ({"threshold": 0}, r"prune: expected threshold in \(0, 1\) or None, got 0"),
        ({"strength": -1}, "prune: expected strength >= 0, got -1"),
        ({"lr": math.nan}, "prune: expected lr > 0, got nan"),
        ({"threshold": 0.1, "pattern": "2:4"}, "with a threshold needs units, got pattern 2:4"),
        ({"threshold": 0.1, "scope": "global"}, "gives each layer a budget .* got 'global'"),
        ({}, "expected training steps before the first update of layer '0' by movement pruning"),
    ],
)
def test_soft_movement_errors(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "soft_movement", **options)


@pytest.mark.parametrize("pattern", ["2:4", "filter"])
def test_soft_movement_meets_the_budget_in_other_patterns(pattern):
    model = mlp()
    optimizer, schedule = torch.optim.SGD(model.parameters(), 0.1), schedules.Cubic(0, 0.5, 1, 5)
    pruner = Pruner(model, optimizer, "soft_movement", pattern=pattern, schedule=schedule)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()
    assert pruner.finalize().sparsity == pytest.approx(0.5, abs=0.03)
    assert all(patterns.parse(pattern).verify(w) for w in weights(model))

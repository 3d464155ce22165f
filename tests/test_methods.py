"""Each method against a small reference of its own: autograd, finite differences or plain loops."""

import copy
import math

import pytest
import torch
from methods_common import (  # noqa: F401
    BATCHES,
    GENERATOR,
    IMAGES,
    LABELS,
    LOSS,
    X,
    Y,
    cnn,
    full_derivatives,
    loss_of,
    measured,
    mlp,
    one_thread,
    weights,
)
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from sparsekern import patterns
from sparsekern.prune import Pruner, prune, slimming_penalty
from sparsekern.prune.allocation import lamp_scores


def gate_gradients(model, batches=BATCHES):
    """Gradients by explicit gates on the weights, summed with their sign over the batches."""
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    names = [n for n, p in tensors.items() if p.ndim > 1]
    gates = {n: torch.ones_like(tensors[n]).requires_grad_() for n in names}
    gated = {n: p * gates[n] if n in gates else p for n, p in tensors.items()}
    sum(loss_of(model, gated, batches)).backward()
    return [gates[n].grad for n in names]


def global_masks(scores, sparsity):
    mask = patterns.Unstructured().mask(torch.cat([s.flatten() for s in scores])[None], sparsity)
    return [m.view_as(s) for m, s in zip(mask[0].split([s.numel() for s in scores]), scores)]


def test_snip_is_the_gradient_of_gates_added_up_with_its_sign():
    model = mlp()
    wanted = [g.abs() / 2 for g in gate_gradients(model)]
    for got, score in zip(measured(model, "snip"), wanted):
        torch.testing.assert_close(got, score)
    before = [w.clone() for w in weights(model)]
    prune(model, "snip", 0.7, **LOSS)
    for w, b, mask in zip(weights(model), before, global_masks(wanted, 0.7)):
        assert torch.equal(w, torch.where(mask, b, 0))


def test_snip_gates_agree_with_finite_differences():
    model, step = mlp(), 1e-6
    (first, *_) = measured(model, "snip")
    for row, col in ((0, 0), (3, 5), (11, 7)):
        losses = []
        for gate in (1 + step, 1 - step):
            tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
            tensors["0.weight"][row, col] *= gate
            losses.append(float(sum(loss_of(model, tensors))) / 2)
        assert float(first[row, col]) == pytest.approx(
            abs(losses[0] - losses[1]) / (2 * step), 1e-5
        )


@pytest.mark.parametrize("pattern", ["block:4x4", "vector:1x4", "filter"])
def test_snip_in_units(pattern):
    parsed, gates = patterns.parse(pattern), gate_gradients(mlp())
    for unit_gates in (False, True):
        got = measured(mlp(), "snip", pattern, unit_gates=unit_gates)
        for scores, gate in zip(got, gates):
            tile = parsed.tile(gate.shape)
            units = gate.unfold(0, tile[0], tile[0]).unfold(1, tile[1], tile[1]).flatten(2)
            mean = units.mean(2).abs() if unit_gates else units.abs().mean(2)
            torch.testing.assert_close(scores, mean.flatten() / 2)


def test_snip_in_blocks_of_32():
    """Blocks at the edges are smaller; each goes by the mean of its gates, and all are ranked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 96), nn.Tanh(), nn.Linear(96, 80), nn.Linear(80, 4)).double()
    units, before = [], [w.clone() for w in weights(model)]
    for layer, gate in enumerate(gate_gradients(model)):
        for row in range(0, gate.shape[0], 32):
            for col in range(0, gate.shape[1], 32):
                block = gate[row : row + 32, col : col + 32].abs()
                units.append((float(block.mean()), block.numel(), layer, row, col))
    report = prune(model, "snip", 0.6, "block:32x32", **LOSS)
    kept = {
        (layer, row, col)
        for _, _, layer, row, col in units
        if weights(model)[layer][row : row + 32, col : col + 32].any()
    }
    out = [unit[0] for unit in units if unit[2:] not in kept]
    best = {max(u for u in units if u[2] == layer)[2:] for layer in range(3)}
    assert max(out) <= min(u[0] for u in units if u[2:] in kept and u[2:] not in best)
    assert abs(report.sparsity - 0.6) < 1024 / report.total
    for now, old in zip(weights(model), before):
        assert bool(((now == old) | (now == 0)).all())


def test_iterative_snip_measures_what_the_last_round_left():
    model, rounds = mlp(), 3
    by_hand = mlp()
    alive = [torch.ones_like(w, dtype=torch.bool) for w in weights(by_hand)]
    for number in range(1, rounds + 1):
        scores = [g.abs().masked_fill(~a, -1) for g, a in zip(gate_gradients(by_hand), alive)]
        alive = global_masks(scores, 1 - 0.1 ** (number / rounds))
        for weight, mask in zip(weights(by_hand), alive):
            weight.masked_fill_(~mask, 0)
    prune(model, "snip", 0.9, iterations=rounds, **LOSS)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(by_hand)))
    once = mlp()
    prune(once, "snip", 0.9, **LOSS)
    assert not all(torch.equal(a, b) for a, b in zip(weights(model), weights(once)))


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_weight_times_hessian_times_gradient(temperature):
    model = mlp()
    flat, gradient, hessian = full_derivatives(model, BATCHES, temperature)
    got = torch.cat([s.flatten() for s in measured(model, "grasp", temperature=temperature)])
    torch.testing.assert_close(got, flat * (hessian @ gradient), rtol=1e-6, atol=1e-12)


def test_synflow_is_the_sum_over_paths():
    model = mlp(nn.ReLU, bias=False)
    a, b, c = (w.abs() for w in weights(model))
    ones = torch.ones(8, dtype=torch.float64)
    wanted = [
        a * (c.sum(0) @ b)[:, None],
        b * c.sum(0)[:, None] * (a @ ones),
        c * (b @ a @ ones),
    ]
    for got, score in zip(measured(model, "synflow"), wanted):
        torch.testing.assert_close(got, score)


def test_synflow_keeps_all_layers_where_one_round_does_not_and_leaves_the_model_alone():
    def narrow():
        torch.manual_seed(0)
        sizes = [(40, 40), (40, 2), (2, 40), (40, 40)]
        return nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in sizes])

    kept = []
    for iterations in (1, 100):
        model = narrow()
        before = copy.deepcopy(model)
        prune(model, "synflow", 0.98, data=[torch.zeros(3, 40)], iterations=iterations)
        kept.append(min(int((w != 0).sum()) for w in weights(model)))
        assert all(((w == 0) | (w == b)).all() for w, b in zip(weights(model), weights(before)))
    assert kept[1] > kept[0] >= 1


def test_taylor_squares_the_sum_over_a_unit_in_every_batch():
    model = mlp()
    for pattern in ("unstructured", "filter", "block:4x4"):
        parsed, sums = patterns.parse(pattern), 0
        for batch in BATCHES:
            gates = gate_gradients(model, [batch])
            sums = [
                (parsed.unit_scores(g) * parsed.unit_sizes(g.shape)) ** 2 + s
                for g, s in zip(gates, sums or [0] * 3)
            ]
        for got, total, weight in zip(measured(model, "taylor", pattern), sums, weights(model)):
            wanted = total / 2 / parsed.unit_sizes(weight.shape)
            torch.testing.assert_close(got.flatten(), wanted)


@pytest.mark.parametrize(("pattern", "axis"), [("channel", 1), ("filter", 0)])
def test_skeletonization_is_the_slope_of_the_absolute_error_by_gates(pattern, axis):
    model, step = mlp(), 1e-6
    targets = torch.randn(12, 4, generator=GENERATOR, dtype=torch.float64)
    batches = [(X[:5], targets[:5]), (X[5:], targets[5:])]
    got = measured(model, "skeletonization", pattern, batches, None)

    def error(layer, unit, gate, batch):
        gated = copy.deepcopy(model)
        with torch.no_grad():
            gated[layer].weight.select(axis, unit).mul_(gate)
            if axis == 0:
                gated[layer].bias[unit].mul_(gate)
            return float((gated(batch[0]) - batch[1]).abs().sum()) / len(batch[0])

    for index, layer, unit in ((0, 0, 3), (1, 2, 7), (2, 4, 1)):
        relevance = 0.0
        for batch in batches:
            slope = error(layer, unit, 1 + step, batch) - error(layer, unit, 1 - step, batch)
            relevance = 0.8 * relevance - 0.2 * slope / (2 * step)
        assert float(got[index][unit]) == pytest.approx(relevance, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("pattern", ["filter", "channel"])
def test_skeletonization_in_grouped_convolutions(pattern):
    model = cnn().eval()
    got = measured(model, "skeletonization", pattern, [(IMAGES, LABELS)], decay=0.0)
    tensors = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    loss = F.cross_entropy(functional_call(model, tensors, (IMAGES,)), LABELS)
    weight, bias = tensors["3.weight"], tensors["3.bias"]
    slope, bias_slope = torch.autograd.grad(loss, [weight, bias])
    product = (slope * weight).detach()
    if pattern == "filter":
        wanted = product.flatten(1).sum(1) + bias_slope * bias.detach()
    else:
        wanted = product.transpose(0, 1).flatten(1).sum(1)
    torch.testing.assert_close(got[1], -wanted)


def test_scoring_leaves_no_trace_in_either_mode():
    for training in (False, True):
        model = nn.Sequential(cnn(), nn.Dropout(0.3))
        model[0][3].weight.requires_grad_(False)
        model.train()
        model[0][1].eval()
        flags, buffers = [m.training for m in model.modules()], copy.deepcopy(list(model.buffers()))
        random = torch.get_rng_state()
        data = {"data": [(IMAGES, LABELS)], "loss_fn": F.cross_entropy}
        prune(model, "snip", 0.5, training=training, **data)
        assert [m.training for m in model.modules()] == flags
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers))
        assert torch.equal(torch.get_rng_state(), random)
        assert not model[0][3].weight.requires_grad and all(
            p.grad is None for p in model.parameters()
        )


def test_training_mode_scores_with_batch_statistics():
    data = [(IMAGES, LABELS)]
    model = cnn()
    scores = [measured(model, "snip", batches=data, training=t)[0] for t in (False, True)]
    by_hand = model.train()
    loss = F.cross_entropy(by_hand(IMAGES), LABELS)
    (slope,) = torch.autograd.grad(loss, [by_hand[0].weight])
    torch.testing.assert_close(scores[1], (slope * by_hand[0].weight.detach()).abs())
    assert not torch.allclose(scores[0], scores[1])


def test_lp_norms_and_their_scale():
    model = cnn()
    for p in (1, 2, 3.5, math.inf):
        got = measured(model, "lp", "filter", p=p, normalize=False)
        for scores, weight in zip(got, weights(model)):
            wanted = torch.linalg.vector_norm(weight.flatten(1), p, dim=1)
            torch.testing.assert_close(scores, wanted)
    scaled = measured(model, "lp", "channel")
    assert all(float(s.norm()) == pytest.approx(1) for s in scaled)


def test_fpgm_sums_distances_to_all_other_units():
    model = cnn()
    for pattern in ("filter", "channel"):
        for got, weight in zip(measured(model, "fpgm", pattern), weights(model)):
            units = weight if pattern == "filter" else weight.transpose(0, 1)
            wanted = [sum(float((a - b).norm()) for b in units) for a in units]
            torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))
    layer = nn.Linear(6, 4)  # small filters stay, doubled ones go first
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4, 6) * torch.tensor([3.0, 3, 3, 0.1])[:, None])
        layer.weight[1] = layer.weight[0]
    prune(layer, "fpgm", 0.25, "filter")
    assert int((layer.weight[3] == 0).all()) + int((layer.weight[:2] == 0).all(1).sum()) == 1


def test_apoz_counts_zeros_after_the_relu():
    model = cnn().eval()
    batches = [(IMAGES[:2], None), (IMAGES[2:], None)]
    model = nn.Sequential(*model[:6])
    with torch.no_grad():
        first = model[:3](IMAGES)
        second = model(IMAGES)
    got = measured(model, "apoz", "filter", batches, None)
    for scores, activity in zip(got, (first, second)):
        wanted = [float((activity[:, c] != 0).double().mean()) for c in range(8)]
        torch.testing.assert_close(scores, torch.tensor(wanted, dtype=torch.float64))
    got = measured(model, "apoz", "channel", batches, None)
    shares = (first != 0).double().mean((0, 2, 3))
    torch.testing.assert_close(got[1], (shares[:4] + shares[4:]) / 2)  # two groups
    torch.testing.assert_close(got[0], torch.ones(4, dtype=torch.float64))


def test_slimming_ranks_by_gamma_and_takes_beta_along():
    model = cnn()
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.copy_(torch.randn(8))
            norm.bias.fill_(1.0)
    gammas = torch.cat([model[1].weight, model[4].weight]).detach().abs()
    report = prune(model, "slimming", 0.5, "filter", ignore="7")
    dead = torch.cat([(w == 0).flatten(1).all(1) for w in weights(model)[:2]])
    # The second layer has half as many weights per filter, so the budget is one in weights.
    assert gammas[dead].max() <= gammas[~dead].min() and abs(report.sparsity - 0.5) < 0.1
    for norm, weight in ((model[1], model[0].weight), (model[4], model[3].weight)):
        gone = (weight == 0).flatten(1).all(1)
        assert torch.equal(norm.weight == 0, gone) and torch.equal(norm.bias == 0, gone)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(model, optimizer, "slimming", 0.7, "filter", ignore="7")
    for _ in range(3):
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
        pruner.step()
    gone = (model[0].weight == 0).flatten(1).all(1)
    assert gone.any() and torch.equal(model[1].bias == 0, gone)


def test_slimming_penalty_and_named_norms():
    model = cnn()
    penalty = slimming_penalty(model, 0.01)
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx(0.16) and model[1].weight.grad.eq(0.01).all()
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(1.0, 9))
        model[4].weight.copy_(torch.arange(8.0, 0, -1))
    prune(model, "slimming", 0.5, "filter", norms={"0": "4"}, targets=nn.Conv2d, ignore="3")
    assert model[0].weight[:4].any() and not model[0].weight[4:].any()
    with pytest.raises(
        ValueError, match="slimming_penalty: expected a model with affine BatchNorm"
    ):
        slimming_penalty(mlp())
    with pytest.raises(ValueError, match="slimming_penalty: expected strength >= 0, got -1"):
        slimming_penalty(model, -1)


def test_lamp_by_its_definition():
    torch.manual_seed(0)
    weight = torch.randn(6, 8, dtype=torch.float64)
    squares = weight.flatten() ** 2
    wanted = torch.stack([u / squares[squares >= u].sum() for u in squares])
    torch.testing.assert_close(lamp_scores(weight, patterns.Unstructured()), wanted)
    model, dense = mlp(), mlp()
    prune(model, "magnitude", 0.8, scope="lamp")
    scores = [lamp_scores(w, patterns.Unstructured()).view_as(w) for w in weights(dense)]
    for got, old, mask in zip(weights(model), weights(dense), global_masks(scores, 0.8)):
        assert torch.equal(got, torch.where(mask, old, 0))
    report = prune(mlp(), "snip", 0.5, "block:4x4", "lamp", **LOSS)
    assert report.sparsity == pytest.approx(0.5, abs=16 / 224) and report.scope == "lamp"

"""Regularisers before pruning."""

import pytest
import torch
from torch import nn

import sparsekern as sk


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 10)).double()


def test_l1_and_l2_by_their_formulas_and_slopes():
    made = model()
    with torch.no_grad():
        made[3].weight[0] = 0
    conv, linear = made[0].weight, made[3].weight
    loss = sk.weight_penalty(made, 0.3)
    torch.testing.assert_close(loss, 0.3 * (conv.abs().sum() + linear.abs().sum()))
    loss.backward()
    torch.testing.assert_close(linear.grad, 0.3 * linear.detach().sign())
    assert made[0].bias.grad is None
    made.zero_grad()
    loss = sk.weight_penalty(made, 0.3, p=2, ignore="0")
    torch.testing.assert_close(loss, 0.3 * (linear**2).sum())
    loss.backward()
    torch.testing.assert_close(linear.grad, 0.6 * linear.detach())
    assert conv.grad is None


@pytest.mark.parametrize("pattern", ["block:4x4", "filter", "channel", "kernel"])
def test_group_lasso_by_loops(pattern):
    made = model()
    with torch.no_grad():
        made[0].weight[:4, :4, 0, 0] = 0
    weight, wanted = made[0].weight.detach(), 0.0
    if pattern == "filter":
        units = list(weight)
    elif pattern == "channel":
        units = list(weight.transpose(0, 1))
    elif pattern == "kernel":
        units = [weight[o, i] for o in range(6) for i in range(4)]
    else:
        bands = slice(0, 4), slice(4, 6)
        units = [weight[band, :, y, x] for band in bands for y in range(3) for x in range(3)]
    wanted = sum(unit.numel() ** 0.5 * float(unit.norm()) for unit in units)
    loss = sk.weight_penalty(made, 2.0, pattern=pattern, ignore="3")
    assert loss.item() == pytest.approx(2 * wanted)
    loss.backward()
    assert bool(torch.isfinite(made[0].weight.grad).all())
    assert bool((made[0].weight.grad[weight == 0] == 0).all())


def test_training_with_the_group_lasso_empties_blocks():
    made = nn.Linear(16, 16, bias=False)
    optimizer = torch.optim.SGD(made.parameters(), 0.01)
    for _ in range(50):
        optimizer.zero_grad()
        sk.weight_penalty(made, 0.6, pattern="block:4x4").backward()
        optimizer.step()
    assert float(made.weight.detach().abs().max()) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1}, "weight_penalty: expected strength >= 0, got -1"),
        ({"strength": 1, "p": 3}, "weight_penalty: expected p 1 or 2, got 3"),
        ({"strength": 1, "pattern": "2:4"}, "weight_penalty: expected a pattern of units, got 2:4"),
        ({"strength": 1, "ignore": "x"}, "expected ignore to match a module, got 'x'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        sk.weight_penalty(model(), **options)

"""Thresholds in standard deviations (Han et al. 2015)."""

import numpy as np
import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.prune import Pruner, prune, schedules, threshold_scope


def model(scale=0.05):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 4))
    with torch.no_grad():
        for layer in made:
            if hasattr(layer, "weight"):
                layer.weight.normal_()
        made[2].weight.mul_(scale)
    return made


def arrays(made):
    return [made[i].weight.detach().double().numpy() for i in (0, 2, 3)]


@pytest.mark.parametrize("quality", [0, 0.7, 1.3])
def test_what_is_below_quality_times_deviation_goes(quality):
    made = model()
    wanted = [np.abs(w) >= quality * w.std() for w in arrays(made)]
    scope = threshold_scope(made, quality)
    assert list(scope) == ["0", "2", "3"]
    prune(made, scope=scope)
    for weight, mask in zip(arrays(made), wanted):
        assert np.array_equal(weight != 0, mask)


def test_blocks_go_by_their_mean_and_a_second_round_by_what_is_left():
    made = model()
    made = nn.Sequential(made[2])
    weight = made[0].weight.detach().double().numpy()
    means = np.abs(weight).reshape(4, 4, 8, 4).mean((1, 3))
    prune(made, pattern="block:4x4", scope=threshold_scope(made, 0.8, "block:4x4"))
    left = made[0].weight.detach().double().numpy()
    assert np.array_equal(left.reshape(4, 4, 8, 4).any((1, 3)), means >= 0.8 * weight.std())
    alive = left[left != 0]
    scope = threshold_scope(made, 0.5)
    prune(made, scope=scope)
    wanted = np.abs(left) >= 0.5 * alive.std()
    assert np.array_equal(made[0].weight.detach().numpy() != 0, wanted)


@pytest.mark.parametrize("pattern", ["unstructured", "vector:1x4", "2:4"])
def test_scope_std_finds_the_quality_of_a_sparsity(pattern):
    made = model()
    before = arrays(made)
    total = sum(w.size for w in before)
    report = prune(made, sparsity=0.5, pattern=pattern, scope="std")
    assert abs(report.zeros - total / 2) <= 2
    if pattern != "unstructured":
        return
    kept = [np.abs(w[v != 0] / w.std()) for w, v in zip(before, arrays(made))]
    gone = [np.abs(w[v == 0] / w.std()) for w, v in zip(before, arrays(made))]
    assert max(map(np.max, gone)) <= min(map(np.min, kept))
    # A global ranking all but empties the layer of small weights.
    globally = prune(model(), sparsity=0.5, scope="global")
    assert globally.layers[1].sparsity > 0.7 > report.layers[1].sparsity


def test_scope_std_while_training():
    made = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(made.parameters(), 0.1)
    schedule = schedules.Iterative(0.75, rounds=2, every=2)
    pruner = Pruner(made, optimizer, scope="std", schedule=schedule)
    for _ in range(4):
        made(torch.ones(2, 16)).square().sum().backward()
        optimizer.step()
        pruner.step()
    assert pruner.finalize().sparsity == 0.75


def test_layers_keep_a_unit_and_equal_weights_stay():
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        made[0].weight.fill_(0.5)
        made[1].weight.zero_()
    scope = sk.threshold_scope(made, 3.0)
    assert scope == {"0": 0.0, "1": 15 / 16}
    assert sk.threshold_scope(nn.Linear(4, 4), 99.0) == {"": 15 / 16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((-1,), "threshold_scope: expected quality >= 0, got -1"),
        ((float("nan"),), "threshold_scope: expected quality >= 0, got nan"),
        ((True,), "threshold_scope: expected quality >= 0, got True"),
        ((1, "2:4"), "threshold_scope: expected a pattern of units, got 2:4, which fixes the spar"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        threshold_scope(nn.Linear(8, 8), *options)

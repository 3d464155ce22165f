"""Masks of a Pruner in the conversion: kept weights that are 0 hide neither pattern nor weight."""

import pytest
import torch
from pruner_common import one_thread  # noqa: F401
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.patterns import Block, Unstructured, detect
from sparsekern.prune import Pruner, schedules

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
X[:, :24] = 0  # like the border of a picture: blocks that grow here stay 0
Y = torch.randint(0, 4, (32,), generator=torch.Generator().manual_seed(2))


def trained(pattern="block:4x4", method="set"):
    """A model of which some kept blocks are all 0, and its pruner."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = schedules.Constant(0.9, 2)
    pruner = Pruner(model, optimizer, method, pattern=pattern, schedule=schedule, fraction=0.5)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()
    mask = model[0].weight_mask.clone()
    assert bool((model[0].weight[mask] == 0).any())
    return model, pruner, mask


@pytest.mark.parametrize("finalized", [True, False])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_blocks_with_kept_zeros_convert_as_blocks(finalized, mode):
    model, pruner, mask = trained()
    with torch.no_grad():
        rows, columns = model[0].weight.nonzero()[:48:7].T
        model[0].weight[rows, columns] = 0  # zeros inside of blocks
    assert detect(model[0].weight) == Unstructured() and detect(mask) == Block(4, 4)
    if finalized:
        pruner.finalize()
    assert torch.equal(model[0].weight_mask, mask)
    wanted = model(X)
    sparse = sk.convert_to_sparse(model, mode=mode)
    row = sk.report(sparse).layers[0]
    assert row.pattern == "block:4x4" and row.format == "block"
    assert row.sparsity == pytest.approx(1 - float(mask.float().mean()))
    assert torch.equal(sparse[0].weight.mask(), mask)
    torch.testing.assert_close(sparse(X), wanted, rtol=1e-4, atol=1e-5)


def test_unstructured_zeros_are_stored_only_to_be_trained():
    for mode in ("inference", "training"):
        model, pruner, mask = trained("unstructured")
        pruner.finalize()
        nonzero = model[0].weight != 0
        sparse = sk.convert_to_sparse(model, mode=mode)
        stored = mask if mode == "training" else nonzero
        assert torch.equal(sparse[0].weight.mask(), stored)
        assert sk.report(sparse).layers[0].pattern == "unstructured"


def test_a_mask_that_no_longer_fits_is_ignored():
    model, pruner, mask = trained()
    pruner.finalize()
    with torch.no_grad():
        dropped = (~mask).nonzero()[0]
        model[0].weight[dropped[0], dropped[1]] = 1
    nonzero = model[0].weight != 0
    sparse = sk.convert_to_sparse(model, mode="training")
    assert torch.equal(sparse[0].weight.mask(), nonzero)


def test_a_mask_that_is_of_no_more_use_goes():
    model, pruner, _ = trained()
    assert hasattr(model[2], "weight_mask")
    with torch.no_grad():
        for layer in pruner.layers:
            layer.module.weight[layer.module.weight_mask] = 1
    pruner.finalize()
    assert not hasattr(model[0], "weight_mask") and not hasattr(model[2], "weight_mask")

"""Transposable N:M masks: N of M along the inputs and along the outputs."""

import pytest
import torch
from pruner_common import X, Y, backward, mlp, one_thread, sgd, weights  # noqa: F401
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern import patterns
from sparsekern.prune import Pruner, prune, schedules

optimize = pytest.importorskip("scipy.optimize")


def best_block(scores, n):
    """Largest sum with n per row and column, by linear programming (its vertices are integral)."""
    m = len(scores)
    rows = torch.kron(torch.eye(m), torch.ones(1, m))
    columns = torch.kron(torch.ones(1, m), torch.eye(m))
    found = optimize.linprog(
        -scores.flatten().numpy(), A_eq=torch.cat([rows, columns]).numpy(), b_eq=[n] * 2 * m,
        bounds=(0, 1),
    )  # fmt: skip
    return -found.fun


@pytest.mark.parametrize("text", ["2:4T", "1:4T", "3:4T", "1:2T", "1:3T"])
def test_the_best_mask_of_every_block(text):
    pattern, generator = patterns.parse(text), torch.Generator().manual_seed(0)
    n, m = pattern.n, pattern.m
    scores = torch.randn(2 * m, 3 * m, generator=generator)
    mask = pattern.mask(scores)
    for i in range(0, 2 * m, m):
        for j in range(0, 3 * m, m):
            block = mask[i : i + m, j : j + m]
            assert bool((block.sum(0) == n).all() and (block.sum(1) == n).all())
            got = scores[i : i + m, j : j + m][block].sum().item()
            assert got == pytest.approx(best_block(scores[i : i + m, j : j + m], n), abs=1e-5)
    assert str(pattern) == text and pattern == patterns.parse(text)
    assert pattern.verify(mask) and pattern.verify(mask.t())
    assert patterns.NM(n, m).verify(mask) and patterns.NM(n, m) != pattern


def test_convolutions_and_verification():
    pattern = patterns.parse("2:4T")
    scores = torch.rand(8, 4, 3, 3)
    mask = pattern.mask(scores)
    for y in range(3):
        for x in range(3):
            assert torch.equal(mask[:, :, y, x], pattern.mask(scores[:, :, y, x]))
    plain = patterns.parse("2:4").mask(torch.eye(4).repeat(1, 2).add(torch.arange(8) * 0.001))
    assert patterns.parse("2:4").verify(plain) and not pattern.verify(plain)


def test_equal_scores_and_scores_that_must_or_must_not():
    pattern = patterns.parse("2:4T")
    first = pattern.mask(torch.ones(4, 4))
    assert first.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    scores = torch.rand(4, 4) * 1e6
    held = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    assert torch.equal(pattern.mask(scores.masked_fill(~held, -torch.inf)), held)
    scores[held & (torch.rand(4, 4) < 0.9)] = torch.inf
    scores[0, 2], scores[2, 0] = torch.inf, torch.inf
    mask = pattern.mask(scores)
    assert bool(mask[torch.isinf(scores)].all())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "snip", "random", "refit"])
def test_one_shot_methods(method):
    model = mlp()
    prune(model, method, pattern="2:4T", data=[(X, Y)], loss_fn=F.cross_entropy)
    assert all(patterns.parse("2:4T").verify(w) for w in weights(model))
    assert all(float((w == 0).double().mean()) == 0.5 for w in weights(model))


@pytest.mark.parametrize("method", ["magnitude", "srste", "rigl", "set"])
def test_while_training(method):
    model = mlp()
    optimizer = sgd(model)
    gradual = method == "magnitude"
    schedule = schedules.Cubic(0, 0.5, 2, 8, 2) if gradual else schedules.Constant(0.5, 2, 8)
    pruner, seen = Pruner(model, optimizer, method, pattern="2:4T", schedule=schedule), set()
    for _ in range(10):
        backward(model, optimizer)
        optimizer.step()
        pruner.step()
        seen |= {int(mask[:4, :4].sum()) for mask in pruner.masks.values()}
    assert all(patterns.parse("2:4T").verify(mask) for mask in pruner.masks.values())
    assert all(int(mask.sum()) * 2 == mask.numel() for mask in pruner.masks.values())
    assert seen == ({16, 12, 8} if gradual else {8})
    pruner.finalize()


def test_stored_as_nm_and_saved(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    layer = sk.SparseLinear.from_dense(model[0], pattern="2:4T")
    assert layer.weight.format == "nm" and layer.pattern == "2:4T"
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert patterns.parse("2:4T").verify(layer.to_dense().weight)
    sparse = nn.Sequential(layer)
    sk.save(sparse, tmp_path / "m.safetensors")
    other = nn.Sequential(sk.SparseLinear(16, 8, pattern="2:4T"))
    sk.load(other, tmp_path / "m.safetensors")
    assert torch.equal(other(x), sparse(x)) and other[0].pattern == "2:4T"


def test_errors():
    with pytest.raises(ValueError, match="N:MT: expected M of at most 4, got 4:8T"):
        patterns.parse("4:8T")
    with pytest.raises(ValueError, match="N:M: expected 1 <= N < M, got 4:4"):
        patterns.parse("4:4T")
    with pytest.raises(ValueError, match="needs an output dimension that is a multiple of 4, got"):
        patterns.parse("2:4T").mask(torch.ones(6, 8))
    with pytest.raises(ValueError, match="needs an input dimension that is a multiple of 4, got 6"):
        patterns.parse("2:4T").mask(torch.ones(8, 6))
    report = prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)), pattern="2:4T")
    assert list(report.skipped) == ["1"] and report.sparsity == 0.5

"""SR-STE whose products run on the N:M weight: the op, the layers, training."""

import copy
import pickle

import pytest
import torch
from pruner_common import X, Y, mlp, one_thread, sgd  # noqa: F401
from torch import nn

import sparsekern as sk
from sparsekern.ops.nm_ste import nm_prune, nm_ste_linear
from sparsekern.patterns import parse
from sparsekern.prune.products import PrunedLinear, mask_by_kernel

PATTERNS = [("2:4", (2, 4, False)), ("2:4T", (2, 4, True)), ("1:4", (1, 4, False))]


@pytest.mark.parametrize(("text", "sizes"), PATTERNS)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (2, 3)], ids=str)
def test_matches_float64(shape, text, sizes):
    weight, bias = torch.randn(16, 24), torch.randn(16)
    mask = parse(text).mask(weight.abs())
    pruned = nm_prune(weight, *sizes)
    assert torch.equal(pruned, torch.where(mask, weight, 0))
    for b in (bias, None):
        x = torch.randn(*shape, 24, dtype=torch.float64)
        wide = [x, weight.double()] + ([b.double()] if b is not None else [])
        wide = [t.requires_grad_() for t in wide]
        y = nm_ste_linear(*wide[:2], wide[2] if b is not None else None, *sizes)
        exact = [t.detach().clone().requires_grad_() for t in wide]
        kept = exact[1] + (torch.where(mask, exact[1], 0) - exact[1]).detach()  # straight-through
        want = nn.functional.linear(exact[0], kept, exact[2] if b is not None else None)
        torch.testing.assert_close(y, want)
        grad = torch.randn_like(y)
        got = torch.autograd.grad(y, wide, grad)
        for have, wanted in zip(got, torch.autograd.grad(want, exact, grad)):
            torch.testing.assert_close(have, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_and_contract(dtype):
    x, weight = torch.randn(5, 8).to(dtype), torch.randn(4, 8).to(dtype)
    for sizes in ((2, 4, True), (2, 4, False)):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        torch.library.opcheck(nm_ste_linear, (*leaves, None, *sizes))
        torch.library.opcheck(nm_prune, (weight, *sizes))
    wide = torch.full((4, 8), -0.0, dtype=dtype)
    assert not bool(torch.signbit(nm_prune(wide, 2, 4, False)).any())
    assert nm_prune(weight[:0], 2, 4, False).shape == (0, 8)


def test_messages():
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    with pytest.raises(RuntimeError, match=r"nm_prune: expected weight with sizes that are multip"):
        nm_prune(weight, 2, 4, True)
    multiple = "nm_ste_linear: expected weight with in_features that are multiples of 3, got"
    with pytest.raises(RuntimeError, match=multiple):
        nm_ste_linear(x, weight, None, 2, 3, False)
    with pytest.raises(RuntimeError, match="nm_prune: expected weight with 2 dimensions, got"):
        nm_prune(weight[0], 2, 4, False)
    with pytest.raises(RuntimeError, match="nm_ste_linear: expected weight of the dtype of x"):
        nm_ste_linear(x.double(), weight, None, 2, 4, False)
    with pytest.raises(ValueError, match="expected products to be a bool, got 1"):
        sk.Pruner(nn.Linear(8, 8), sgd(nn.Linear(8, 8)), "srste", pattern="2:4", products=1)
    with pytest.raises(ValueError, match=r"expected an N:M pattern with products=True, got block:"):
        model = nn.Linear(8, 8)
        sk.Pruner(model, sgd(model), "srste", 0.5, pattern="block:4x4", products=True)


def loss_of(model):
    return nn.functional.cross_entropy(model(X), Y)


@pytest.mark.parametrize("pattern", ["2:4", "2:4T"])
def test_training_is_the_same_with_and_without(pattern):
    """The weight that is multiplied is the pruned one either way: losses agree to rounding."""
    losses, last = {}, {}
    for products in (False, True):
        model = mlp()
        optimizer = sgd(model)
        pruner = sk.Pruner(model, optimizer, "srste", pattern=pattern, products=products)
        assert (type(model[3]) is PrunedLinear) == products
        losses[products] = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            assert int((model[3].weight.grad != 0).sum()) > model[3].weight.numel() // 2
            optimizer.step()
            pruner.step()
            losses[products].append(loss.item())
        pruner.finalize()
        assert type(model[3]) is nn.Linear and not hasattr(model[3], "pruned_to")
        assert parse(pattern).verify(model[3].weight != 0)
        last[products] = loss_of(model).item()
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert last[True] == pytest.approx(last[False], rel=1e-4) and losses[True][-1] < losses[True][0]


@pytest.mark.parametrize("text", ["2:4", "2:4T"])
def test_masks_of_the_kernel(text):
    """As the pattern chooses, also among zeros; on a GPU the op behind it is one kernel."""
    sizes, pattern = torch.rand(16, 24), parse(text)
    sizes[:4], sizes[4, :8] = 0, 1
    assert torch.equal(mask_by_kernel(sizes, pattern), pattern.mask(sizes))
    assert torch.equal(
        mask_by_kernel(sizes.bfloat16(), pattern), pattern.mask(sizes.bfloat16().float())
    )


def test_a_dense_start_and_what_is_left_alone():
    """Products begin with the mask; convolutions and subclasses stay as they are."""

    class Mine(nn.Linear):
        pass

    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 8), Mine(8, 8))
    optimizer = sgd(model)
    schedule = sk.schedules.OneShot(0.5, at=3)
    pruner = sk.Pruner(model, optimizer, "srste", pattern="2:4", schedule=schedule, products=True)
    kinds = []
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(3, 4, 2, 2)).sum().backward()
        optimizer.step()
        pruner.step()
        kinds.append(type(model[2]) is PrunedLinear)
    assert kinds[0] is False and kinds[-1] is True
    assert type(model[0]) is nn.Conv2d and type(model[3]) is Mine
    pruner.finalize()
    assert type(model[2]) is nn.Linear


def test_copies_autocast_and_compile():
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    pruner = sk.Pruner(model, sgd(model), "srste", pattern="2:4T", products=True)
    x = torch.randn(5, 16)
    want = nn.functional.linear(x, model[0].weight, model[0].bias)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, rtol=0.02, atol=0.05)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), want)
    model[0].weight.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).sum().backward()
    assert model[0].weight.grad.dtype == torch.float32
    report = sk.report(sk.convert_to_sparse(copy.deepcopy(model)))
    assert "has a forward of its own" in report.layers[0].reason
    pruner.finalize()


def test_a_failed_start_leaves_the_layers_as_they_were():
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError):
        sk.Pruner(model, sgd(model), "srste", pattern="2:4", products=True)
    assert type(model[0]) is nn.Linear

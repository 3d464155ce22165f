"""Optimal Brain Damage against exact Hessians."""

import copy
import itertools

import pytest
import torch
from methods_common import (  # noqa: F401
    BATCHES,
    X,
    Y,
    full_derivatives,
    measured,
    one_thread,
)
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from sparsekern.prune import prune
from sparsekern.prune.methods import obd


def every_sign_vector(monkeypatch, count):
    """Replace random signs by all sign vectors in turn, so that means are exact expectations."""
    vectors = itertools.cycle(itertools.product((-1.0, 1.0), repeat=count))
    monkeypatch.setattr(
        obd,
        "rademacher",
        lambda shape, generator, like: torch.tensor(next(vectors)).to(like).view(shape),
    )


def test_obd_hutchinson_is_the_diagonal_of_the_hessian(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh()).double()
    batches = [(X[:4, :3], Y[:4] % 3)]
    flat, _, hessian = full_derivatives(model, batches)
    every_sign_vector(monkeypatch, 9)
    (got,) = measured(model, "obd", batches=batches, curvature="hutchinson", samples=512)
    wanted = hessian.diagonal().abs() * flat**2 / 2
    torch.testing.assert_close(got.flatten(), wanted)
    assert (hessian.diagonal() < 0).any()


def test_obd_gauss_newton_is_the_diagonal_of_j_h_j(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = X[:4, :4], Y[:4] % 2
    params = {n: p.detach() for n, p in model.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(params)
    output = model(x).detach()
    curvature = torch.autograd.functional.hessian(lambda o: F.cross_entropy(o, y), output)
    every_sign_vector(monkeypatch, 8)
    got = measured(model, "obd", batches=[(x, y)], samples=256)
    for name, scores in zip(("0.weight", "2.weight"), got):
        j = jacobian[name].flatten(2)
        diagonal = torch.einsum("nap,namb,mbp->p", j, curvature, j)
        wanted = diagonal * params[name].flatten() ** 2 / 2
        torch.testing.assert_close(scores.flatten(), wanted)


def test_obd_with_real_random_signs_is_close_and_ranks_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4)).double()
    flat, _, hessian = full_derivatives(model, BATCHES)  # for a linear model also Gauss-Newton's
    wanted = hessian.diagonal() * flat**2 / 2
    for curvature in ("gauss-newton", "hutchinson"):
        (got,) = measured(model, "obd", curvature=curvature, samples=200)
        assert torch.corrcoef(torch.stack([got.flatten(), wanted]))[0, 1] > 0.97
        assert float(got.sum()) == pytest.approx(float(wanted.sum()), rel=0.1)


@pytest.mark.parametrize("curvature", ["gauss-newton", "hutchinson"])
def test_obd_loses_less_than_magnitude_at_a_minimum(curvature):
    """The exact loss after deletion, in a trained network whose inputs differ in scale."""
    torch.manual_seed(0)
    x = torch.randn(256, 12, dtype=torch.float64) * torch.logspace(-1, 1, 12)
    y = (x @ torch.randn(12, 4, dtype=torch.float64) + torch.randn(256, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        decay = 1e-3 * sum(p.square().sum() for p in model.parameters())
        loss = F.cross_entropy(model(x), y) + decay
        loss.backward()
        return loss

    optimizer.step(closure)
    losses = {}
    for method, options in (("magnitude", {}), ("obd", {"curvature": curvature})):
        pruned = copy.deepcopy(model)
        prune(pruned, method, 0.3, data=[(x, y)], loss_fn=F.cross_entropy, **options)
        losses[method] = float(F.cross_entropy(pruned(x), y).detach())
    dense = float(F.cross_entropy(model(x), y).detach())
    assert losses["obd"] - dense < 0.7 * (losses["magnitude"] - dense)

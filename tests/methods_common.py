"""Models, data and measuring for the tests of pruning methods."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from sparsekern import patterns
from sparsekern.prune.data import read_batches
from sparsekern.prune.methods import make_method
from sparsekern.prune.targets import find_layers
from sparsekern.prune.task import Task


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors on several threads mostly wait, above all where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(12, 8, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(0, 4, (12,), generator=GENERATOR)
BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]
LOSS = {"data": BATCHES, "loss_fn": F.cross_entropy}


def mlp(act=nn.Tanh, bias=True):
    torch.manual_seed(0)
    layers = nn.Linear(8, 12, bias), act(), nn.Linear(12, 8, bias), act(), nn.Linear(8, 4, bias)
    return nn.Sequential(*layers).double()


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
        nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 16, 4),
    ).double()  # fmt: skip


IMAGES = torch.randn(6, 4, 6, 6, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(0, 4, (6,), generator=GENERATOR)


def weights(model):
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def loss_of(model, tensors, batches=BATCHES, loss=F.cross_entropy):
    return [loss(functional_call(model, tensors, (x,)), y) for x, y in batches]


def full_derivatives(model, batches, temperature=1.0):
    """Gradient and Hessian of the mean loss by all weights as one vector."""
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    names = [n for n, p in tensors.items() if p.ndim > 1]
    flat = torch.cat([tensors[n].flatten() for n in names])

    def loss(vector):
        parts = vector.split([tensors[n].numel() for n in names])
        put = {n: part.view_as(tensors[n]) for n, part in zip(names, parts)}
        found = loss_of(
            model, {**tensors, **put}, batches, lambda o, t: F.cross_entropy(o / temperature, t)
        )
        return sum(found) / len(found)

    gradient = torch.autograd.functional.jacobian(loss, flat)
    return flat, gradient, torch.autograd.functional.hessian(loss, flat)


def measured(
    model, method, pattern="unstructured", batches=BATCHES, loss=F.cross_entropy, **options
):
    """What a method measures on every layer, and the scores it makes of it."""
    pattern, method = patterns.parse(pattern), make_method(method, options)
    layers, _ = find_layers(model, (nn.Linear, nn.Conv2d), (), pattern)
    totals = method.measure(Task(model, read_batches(batches), loss), layers, pattern)
    return [
        method.score(layer, total) if pattern == patterns.parse("unstructured")
        else method.unit_scores(layer, pattern, total)
        for layer, total in zip(layers, totals)
    ]  # fmt: skip

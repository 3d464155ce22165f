"""Models and trainings for the tests of the Pruner."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsekern.prune import Pruner, schedules


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors on several threads mostly wait, above all where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


X = torch.randn(48, 16, generator=torch.Generator().manual_seed(7))
Y = torch.randint(0, 4, (48,), generator=torch.Generator().manual_seed(8))


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 24),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)


def backward(model, optimizer):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(X), Y)
    loss.backward()
    return loss.item()


def train(model, optimizer, pruner, steps):
    for _ in range(steps):
        backward(model, optimizer)
        optimizer.step()
        pruner.step()


def weights(model):
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]


def state(model):
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


CASES = {
    "magnitude": schedules.Cubic(0, 0.5, 3, 15, 3),
    "snip": schedules.Cubic(0, 0.5, 3, 15, 3),
    "random": schedules.Iterative(0.5, 3, 4),
    "rigl": schedules.Constant(0.5, 4, 16),
    "set": schedules.Constant(0.5, 4, 16),
    "movement": schedules.Cubic(0, 0.5, 3, 15, 3),
    "soft_movement": schedules.Cubic(0, 0.5, 3, 15, 3),
    "srste": schedules.Constant(0.5, 1, 16),
}


def make_pruner(method, model, optimizer, pattern="unstructured", **options):
    data = {"data": [(X, Y)], "loss_fn": F.cross_entropy} if method == "snip" else {}
    schedule = options.pop("schedule", CASES[method])
    return Pruner(model, optimizer, method, pattern=pattern, schedule=schedule, **data, **options)

"""Models for the tests of conversion, and times that do not come from the clock."""

import torch
from torch import nn

from sparsekern import choose, convert


def sparsified(module, sparsity=0.95):
    for p in module.parameters():
        if p.dim() > 1:
            p.data *= torch.rand_like(p) > sparsity
    return module.eval()


def wide(sparsity=0.95):
    """A model in which sparse wins clearly."""
    return sparsified(
        nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)), sparsity
    )


def forced(monkeypatch, dense_ms=2.0, sparse_ms=1.0, model=None):
    """Decide by given times instead of the clock, so that the rest can be tested exactly."""
    monkeypatch.setattr(choose, "time_layer", lambda *a: (dense_ms, sparse_ms))
    monkeypatch.setattr(convert, "time_model", model or (lambda *a: (2.0, 1.0, 2.0)))


def kinds(model):
    return [type(m).__name__ for m in model.modules() if not list(m.children())]

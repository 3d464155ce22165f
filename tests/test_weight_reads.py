"""Layers whose weight the code of a model may read itself, told without a run."""

import pytest
import torch
import torch.nn.functional as F
from convert_common import forced, sparsified
from torch import nn

import sparsekern as sk
from sparsekern.weight_reads import readers


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(64, 64), nn.Linear(64, 64)


class Function(Base):
    def forward(self, x):
        return F.linear(self.called(x), self.read.weight)


class Method(Base):
    def mix(self, x):
        return x @ self.read.weight.t()

    def forward(self, x):
        return self.mix(self.called(x))


class Property(Base):
    @property
    def matrix(self):
        return self.read.weight

    def forward(self, x):
        return self.called(x) @ self.matrix


class Inherited(Property):
    def forward(self, x):
        return super().forward(x) + 1


class Nested(Base):
    def forward(self, x):
        return next(self.called(x) @ self.read.weight for _ in range(1))


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Plain()

    def forward(self, x):
        return self.block.called(x) @ self.block.read.weight


def multiply(x, layer):
    return x @ layer.weight


class Helper(Base):
    def forward(self, x):
        return multiply(self.called(x), self.read)


class ByName(Base):
    def forward(self, x):
        return self.called(x) @ getattr(self.read, "weight")  # noqa: B009


class ByPath(Base):
    def forward(self, x):
        return self.called(x) @ dict(self.named_parameters())["read.weight"]


class Plain(Base):
    def forward(self, x):
        """Calls both; what sets it up may look at any weight."""
        return self.called(self.read(x))

    def init_weights(self, module):
        module.weight.data.normal_()


@pytest.mark.parametrize("kind", [Function, Method, Property, Inherited, Nested, Outside])
def test_the_layer_that_is_read_is_found(kind):
    model = sparsified(kind())
    found = readers(model)
    assert [name.split(".")[-1] for name, m in model.named_modules() if id(m) in found] == ["read"]
    sk.convert_to_sparse(model)
    rows = {row.name.split(".")[-1]: row for row in sk.report(model).layers}
    assert rows["read"].format == "dense" and rows["called"].format == "csr"
    assert f"{kind.__name__} may read its weight itself" in rows["read"].reason
    assert "pass example_inputs" in rows["read"].reason
    model(torch.randn(2, 64))


@pytest.mark.parametrize("kind", [Helper, ByName, ByPath])
def test_where_it_is_not_clear_which_all_stay(kind):
    model = sparsified(kind())
    sk.convert_to_sparse(model)
    assert sk.report(model).n_sparse == 0
    model(torch.randn(2, 64))


def test_layers_that_are_only_called():
    model = nn.Sequential(sparsified(Plain()), sparsified(nn.Linear(64, 64)))
    assert readers(model) == {}
    assert sk.report(sk.convert_to_sparse(model)).n_sparse == 3


def test_with_inputs_a_run_tells(monkeypatch):
    forced(monkeypatch)
    model, x = sparsified(Helper()), torch.randn(2, 64)
    want = model(x)
    rows = {row.name: row for row in sk.report(sk.convert_to_sparse(model, x)).layers}
    assert rows["called"].format == "csr" and "not called" in rows["read"].reason
    torch.testing.assert_close(model(x), want)

"""An optimizer that was made before a training conversion warns at its first step."""

import warnings

import pytest
import torch
from convert_common import forced, wide
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import sparsekern as sk


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    forced(monkeypatch)


def step(model, optimizer):
    model(torch.randn(2, 512)).sum().backward()
    optimizer.step()


def test_it_warns_once_and_goes_on():
    model = wide().train()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    sk.convert_to_sparse(model, torch.randn(4, 512), mode="training", cache=False)
    with pytest.warns(UserWarning, match="this SGD holds 4 parameters that the conversion repla"):
        step(model, old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, old)


def test_others_have_no_hook_and_do_not_warn():
    model, other = wide().train(), nn.Linear(4, 4)
    bystander = torch.optim.SGD(other.parameters(), lr=0.1)
    sk.convert_to_sparse(model, torch.randn(4, 512), mode="training", cache=False)
    new = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, new)
        bystander.step()
    assert not bystander._optimizer_step_pre_hooks and not new._optimizer_step_pre_hooks
    assert not _global_optimizer_pre_hooks


def test_an_optimizer_that_was_given_the_new_parameters_is_right():
    model = wide().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sk.convert_to_sparse(model, torch.randn(4, 512), mode="training", cache=False)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": list(model.parameters()), "lr": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


def test_nothing_for_inference_or_when_nothing_was_replaced(monkeypatch):
    model = wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sk.convert_to_sparse(model, torch.randn(4, 512), cache=False)
    assert not optimizer._optimizer_step_pre_hooks
    forced(monkeypatch, dense_ms=1.0, sparse_ms=2.0)
    model = wide().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sk.convert_to_sparse(model, torch.randn(4, 512), mode="training", cache=False)
    assert not optimizer._optimizer_step_pre_hooks

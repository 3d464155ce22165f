"""Fixtures that all tests share."""

import os
import sys

import pytest
import torch

import sparsekern as sk
from sparsekern._load import _C


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's tuning cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _own_compilations():
    """The limit of recompilations of a `forward` is per process: no test uses up another's."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture
def one_thread():
    """Two threads on a busy machine wait for each other; timings then say nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=sk.available_isas())
def isa(request):
    """Forces every instruction set this machine can run, one after the other."""
    if _C is None:
        yield request.param
        return
    before = sk.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def pytest_configure(config):
    # Two threads at most: CI machines are small, and results must not depend on the count.
    torch.set_num_threads(min(2, os.cpu_count() or 1))

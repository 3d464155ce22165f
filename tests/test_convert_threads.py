"""Conversion beside threads that serve, train and convert: nothing of the process changes."""

import gc
import os
import threading
import warnings

import pytest
import torch
from convert_common import forced, sparsified, wide
from fuse_common import prepared
from torch import nn

import sparsekern as sk
from sparsekern import convert
from sparsekern.measure import timer


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.b(self.relu(self.a(x))) + x)


def convolutional():
    return prepared(nn.Sequential(nn.Conv2d(3, 8, 3), Block(8), Block(8)), 0.9)


@pytest.fixture
def serving():
    """A thread that calls an unrelated model until the test ends; no call may fail or differ."""
    model, x = Block(8).eval(), torch.randn(1, 8, 8, 8)
    want, stop, calls, failures = model(x), threading.Event(), [], []

    def serve():
        while not stop.is_set():
            try:
                assert torch.equal(model(x), want)
                calls.append(1)
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    yield calls
    stop.set()
    thread.join()
    assert calls and not failures


def test_an_unrelated_model_goes_on(monkeypatch, serving):
    forced(monkeypatch)
    for _ in range(5):
        model = sk.convert_to_sparse(convolutional(), torch.randn(2, 3, 10, 10), cache=False)
        assert sk.report(model).residuals == ["1", "2"]


def test_several_conversions_at_once(monkeypatch, serving):
    forced(monkeypatch)
    x, results = torch.randn(2, 3, 10, 10), []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        model = convolutional()
        for p in model.parameters():
            p.data *= torch.rand(p.shape, generator=generator).round() + 0.5
        with torch.no_grad():
            want = model(x)
            got = sk.convert_to_sparse(model, x)(x)
        results.append((sk.report(model).n_sparse, torch.allclose(got, want, 1e-4, 1e-5)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(5, True)] * 4


def settings():
    return (
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), nn.Module.__call__, nn.Module.__getattr__,
        list(warnings.filters), gc.isenabled(), torch.get_float32_matmul_precision(),
        dict(nn.modules.module._global_forward_hooks), dict(os.environ), os.getcwd(),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_settings_of_the_process_stay(mode):
    model = convolutional().train(mode == "training")
    before = settings()
    sk.convert_to_sparse(model, torch.randn(2, 3, 10, 10), mode=mode, budget_s=0.005, cache=False)
    assert settings() == before


def test_random_numbers_of_others_go_on(monkeypatch):
    """A model in eval mode draws none, so that those of other threads are not set back."""
    forced(monkeypatch)

    def drawing(*args):
        torch.rand(3)  # what another thread does meanwhile
        return 2.0, 1.0, 2.0

    monkeypatch.setattr(convert, "time_model", drawing)
    state = torch.get_rng_state()
    sk.convert_to_sparse(wide(), torch.randn(4, 512), cache=False)
    torch.set_rng_state(state)
    torch.randn(4, 512)
    torch.rand(3)
    want = torch.rand(5)
    torch.set_rng_state(state)
    sk.convert_to_sparse(wide_as_before(state), torch.randn(4, 512), cache=False)
    assert torch.equal(torch.rand(5), want)


def wide_as_before(state):
    model = wide()
    torch.set_rng_state(state)
    return model


def test_random_numbers_that_the_model_draws_come_back(monkeypatch):
    forced(monkeypatch)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            return nn.functional.dropout(self.fc(x))  # in eval mode, too

    model, x = sparsified(Noisy()), torch.randn(4, 64)
    state = torch.get_rng_state()
    sk.convert_to_sparse(model, x, cache=False)
    assert torch.equal(torch.get_rng_state(), state) and sk.report(model).n_sparse == 1


def test_garbage_collection_goes_on_when_timings_overlap():
    inside, leave = threading.Event(), threading.Event()

    def slow():
        inside.set()
        leave.wait(5)

    thread = threading.Thread(
        target=timer.interleaved, args=([slow],), kwargs={"budget_s": 1e-9, "min_rounds": 1}
    )
    thread.start()
    inside.wait(5)
    timer.interleaved([lambda: None], budget_s=1e-9)
    leave.set()
    thread.join()
    assert gc.isenabled()

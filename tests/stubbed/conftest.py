"""The CUDA half on tensors of the CPU, with stand-ins for NVIDIA's libraries (see stubs/stub.h).

tests/test_cuda_build.py builds both and runs this folder in a process of its own; elsewhere it is
not collected.
"""

import ctypes
import importlib.util
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

STUBS = os.environ.get("SPARSEKERN_STUBS")
collect_ignore_glob = [] if STUBS else ["test_*.py"]

if STUBS:
    # The stream of a CUDA torch is in the first, for all to see.
    NAMES = "libcusparse_stand_in.so", "libcusparseLt_stand_in.so"
    SPARSE, LT = (ctypes.CDLL(f"{STUBS}/{name}", mode=ctypes.RTLD_GLOBAL) for name in NAMES)
    SPARSE.stub_count.restype = LT.stub_lt_count.restype = ctypes.c_int64

    from sparsekern import _load
    from sparsekern.ops import (
        block_cuda,
        cslt,
        csr_cuda,
        cuda_choice,
        cuda_support,
        nm_cuda,
        own_check,
    )
    from sparsekern.ops.cuda_libraries import CUSPARSE, CUSPARSELT

    for library, name in zip((CUSPARSE, CUSPARSELT), NAMES):
        object.__setattr__(library, "soname", name)
    spec = importlib.util.spec_from_file_location("sparsekern._C_cuda", f"{STUBS}/_C_cuda.abi3.so")
    sys.modules["sparsekern._C_cuda"] = importlib.util.module_from_spec(spec)
    _load.cuda_half.cache_clear()


class FakeEvent:
    """An event of CUDA by the clock of the host."""

    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def streams(monkeypatch):
    """The current stream, to be changed by a test; `waited` counts the events waited for."""
    stream = SimpleNamespace(cuda_stream=1, waited=0)
    stream.record_event = FakeEvent

    def wait(event):
        stream.waited += 1

    stream.wait_event = wait
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    return stream


@pytest.fixture(autouse=True)
def device(monkeypatch, streams):
    """An H200 without Triton, as far as the Python side can tell."""
    facts = cuda_support.Device("stand-in", (9, 0))
    for module in (block_cuda, csr_cuda, nm_cuda):
        monkeypatch.setattr(module, "device_facts", lambda index: facts)
        monkeypatch.setattr(module, "triton_fault", lambda name: "expected Triton, got none")
    monkeypatch.setattr(own_check, "device_facts", lambda index: facts)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cslt, "float16_fault", lambda index: "")
    monkeypatch.setattr(own_check, "TOKENS", ())  # takes seconds here
    own_check._FOUND.clear()
    for state in (cuda_choice._CHOSEN, cuda_choice._BROKEN, cslt._ALGORITHMS, cslt._FUSED_GELU):
        state.clear()
    cuda_support._STATED.clear()
    yield facts
    SPARSE.stub_refuse_half(0)
    SPARSE.stub_greedy(0)
    LT.stub_lt_gelu(2)


@pytest.fixture
def only(monkeypatch):
    """`only("cusparse 3c")`: allows one way, which then must work."""

    def choose(*names):
        def run(key, ways, like):
            (name,) = [n for n in names if n in ways]
            return ways[name]()

        for module in (csr_cuda, nm_cuda):
            monkeypatch.setattr(module, "run_fastest", run)

    return choose

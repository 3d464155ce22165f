"""What the conversion asks about a device, with devices that are not there."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import choose, device, tune
from sparsekern.candidate import Candidate
from sparsekern.measure import timer
from sparsekern.ops import block_cuda
from sparsekern.ops.cuda_support import Device


def on(where, dtype=torch.float32):
    return SimpleNamespace(device=torch.device(where), dtype=dtype)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with kernels for the names in the returned set, as far as these functions look."""
    kernels = {"csr_linear", "nm_linear", "block_linear", "block_conv2d"}
    monkeypatch.setattr(device, "has_kernel", lambda op, where: op in kernels)
    monkeypatch.setattr(device, "facts_of", lambda where: Device("H200", (9, 0)))
    for name in ("_csr_faults", "_nm_faults", "_block_faults"):
        monkeypatch.setattr(device, name, lambda where: ["cuSPARSE is too old", ""])
    return kernels


@pytest.mark.parametrize(
    ("where", "dtype", "said"),
    [
        ("cpu", torch.float64, ""),
        ("cpu", torch.float16, "no kernel for torch.float16"),
        ("cuda", torch.float16, ""),
        ("cuda", torch.float64, "no kernel for torch.float64"),
        ("mps", torch.float32, "no sparse kernel on mps in this version"),
    ],
)
def test_dtypes_by_device(gpu, where, dtype, said):
    assert device.device_obstacle(on(where, dtype)) == said


def test_what_keeps_a_gpu_dense(gpu, monkeypatch):
    monkeypatch.setattr(device, "facts_of", lambda where: Device("K80", (3, 7)))
    assert device.device_obstacle(on("cuda:1")) == (
        "no sparse kernel on cuda:1: expected a GPU of compute capability 7.0 or newer, "
        "got 3.7 (K80)"
    )
    monkeypatch.setattr(device, "facts_of", lambda where: Device("MI300", (9, 4), hip=True))
    assert "expected an NVIDIA GPU, got MI300 (ROCm)" in device.device_obstacle(on("cuda"))


def test_formats_with_a_kernel(gpu):
    card = torch.device("cuda", 0)
    assert device.format_fault("csr", "Linear", card) == ""
    assert device.format_fault("block", "Conv2d", card) == ""
    assert device.format_fault("nm", "Conv2d", card) == "nm_conv2d has no kernel on cuda"
    assert device.format_fault("nm", "Conv2d", torch.device("cpu")) == ""


def test_a_format_without_any_way_says_why(gpu, monkeypatch):
    monkeypatch.setattr(device, "_csr_faults", lambda where: ["no libcusparse", "no Triton"])
    said = device.format_fault("csr", "Linear", torch.device("cuda"))
    assert said == "csr_linear: no libcusparse; no Triton"


@pytest.mark.parametrize("name", ["csr", "nm", "block"])
def test_faults_come_from_the_ops(name, monkeypatch):
    """An old card has neither libraries nor kernels; the ops say it in their own words."""
    monkeypatch.setattr(device, "facts_of", lambda where: Device("K80", (3, 7)))
    monkeypatch.setattr(block_cuda, "device_facts", lambda index: Device("K80", (3, 7)))
    said = device.format_fault(name, "Linear", torch.device("cuda", 7))
    assert said.startswith(f"{name}_linear: ") and "3.7" in said


def test_a_layer_whose_formats_have_no_kernel_stays_dense(monkeypatch):
    monkeypatch.setattr(choose, "format_fault", lambda name, *a: f"{name}: not on this card")
    model = sk.convert_to_sparse(pruned(), torch.randn(4, 64))
    (row,) = sk.report(model).layers
    assert row.format == "dense" and row.reason == "csr: not on this card"


def test_kernels_are_known_to_the_dispatcher():
    compiled = sk.doctor(quiet=True)["parts"]["CPU kernels (_C)"]["available"]
    assert device.has_kernel("csr_linear", "cpu") == compiled
    assert not device.has_kernel("csr_linear", "mps")


def test_weights_are_timed_cold_where_the_model_is_larger_than_the_l2(monkeypatch):
    l2 = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: l2)
    small, large = nn.Linear(10, 10), nn.Linear(16, 16)
    assert device.cold_bytes(large, torch.device("cpu")) == 0
    assert device.cold_bytes(small, torch.device("cuda")) == 0
    assert device.cold_bytes(large, torch.device("cuda")) == 2000


def test_copies_take_turns_until_they_fill_the_cache():
    layer, seen = nn.Linear(10, 10, bias=False), []
    layers = tune._copies(layer, 1000)
    assert [type(m) for m in layers] == [nn.Linear] * 3 and layers[0] is layer
    assert len({m.weight.data_ptr() for m in layers}) == 3
    assert tune._copies(layer, 0) == [layer]
    assert len(tune._copies(layer, 10**9)) == tune.MAX_COPIES
    call = tune.inference_call([lambda x, i=i: seen.append(i) for i in range(3)], None)
    for _ in range(4):
        call()
    assert seen == [0, 1, 2, 0]


def test_key_of_a_gpu_names_all_a_timing_depends_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (9, 0))
    monkeypatch.setattr(tune, "native_status", lambda: {"_C_cuda": {"loaded": True}})
    monkeypatch.setattr(tune, "build_fault", lambda: "no nvcc")
    key = tune.device_key(torch.device("cuda"))
    for part in (
        "NVIDIA H200, sm_90",
        "with _C_cuda, without kernels",
        "triton ",
        torch.__version__,
    ):
        assert part in key
    assert tune.package_version("no-such-package") == "none"


def test_a_gpu_tells_the_time_between_two_events(monkeypatch):
    """A fake device whose every call takes 2 ms by its clock."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: None)

    def call():
        clock[0] += 2.0

    where = torch.device("cuda")
    (timing,) = timer.interleaved([call], budget_s=1e-9, device=where, on_device=True)
    assert timing.median_ms == pytest.approx(2.0) and timing.rounds == 5


def pruned():
    layer = nn.Linear(64, 64).eval()
    layer.weight.data *= torch.rand(64, 64) > 0.9
    return layer


def test_a_wrong_result_keeps_the_layer_dense(monkeypatch):
    monkeypatch.setattr(choose, "time_layer", lambda *a: (2.0, 1.0))
    monkeypatch.setattr(sk.SparseLinear, "forward", lambda self, x: x.new_full((4, 64), 9.0))
    model = sk.convert_to_sparse(pruned(), torch.randn(4, 64))
    (row,) = sk.report(model).layers
    assert row.format == "dense" and row.dense_ms is None
    assert row.reason.startswith("csr does not run here: its result is off by ")


def test_a_format_that_fails_on_a_gpu_is_named_and_skipped(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("csr_plan: cuSPARSE 11 is too old\nmore")

    monkeypatch.setattr(choose, "build", refuse)
    site = SimpleNamespace(module=SimpleNamespace(weight=on("cuda")))
    said = choose.try_format(None, Candidate([site]), "csr")
    assert said == "csr does not run here: csr_plan: cuSPARSE 11 is too old"
    site.module.weight = on("cpu")
    with pytest.raises(RuntimeError, match="too old"):
        choose.try_format(None, Candidate([site]), "csr")


def test_without_inputs_nothing_becomes_sparse_on_a_gpu():
    module = SimpleNamespace(weight=on("cuda:0"), _parameters={})
    site = SimpleNamespace(module=module, obstacle="", weight=torch.eye(8), kind="Linear")
    candidate = Candidate([site], sparsity=0.9)
    choose.decide(SimpleNamespace(specs=None, mode="inference"), candidate)
    assert not candidate.take
    assert candidate.reason == "not timed: pass example_inputs, no threshold is known for cuda:0"

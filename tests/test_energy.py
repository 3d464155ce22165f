"""Energy: counters from a fake sysfs and a fake NVML, and the modelled estimate by hand."""

import sys
import types

import pytest
import torch
from torch import nn

from sparsekern.measure import energy, energy_model
from sparsekern.measure.energy import NvmlMeter, RaplMeter, find_meter, measure_energy
from sparsekern.measure.energy_model import count_operations, formula_text, modelled_energy
from sparsekern.nn import SparseConv2d, SparseLinear

CPU = torch.device("cpu")


def powercap(root, domains):
    """A fake /sys/class/powercap: {folder: (name, microjoules, range)}."""
    for folder, (name, microjoules, span) in domains.items():
        path = root / folder
        path.mkdir()
        (path / "name").write_text(f"{name}\n")
        (path / "energy_uj").write_text(f"{microjoules}\n")
        (path / "max_energy_range_uj").write_text(f"{span}\n")
    return root


TWO_SOCKETS = {
    "intel-rapl:0": ("package-0", 5_000_000, 100_000_000),
    "intel-rapl:0:0": ("core", 9_000_000, 100_000_000),
    "intel-rapl:0:1": ("dram", 9_000_000, 100_000_000),
    "intel-rapl:1": ("package-1", 7_000_000, 100_000_000),
    "intel-rapl:2": ("psys", 9_000_000, 100_000_000),
    "intel-rapl-mmio:0": ("package-0", 9_000_000, 100_000_000),
}


def test_rapl_counts_each_package_once(tmp_path):
    meter = RaplMeter(powercap(tmp_path, TWO_SOCKETS))
    assert meter.read() == pytest.approx([5.0, 7.0])


def test_rapl_wrap_around(tmp_path):
    meter = RaplMeter(powercap(tmp_path, TWO_SOCKETS))
    before = meter.read()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("8500000\n")
    assert meter.joules(before, meter.read()) == pytest.approx((100 - 5 + 1) + 1.5)


def test_no_powercap_folder_is_not_available(tmp_path):
    meter, reason = find_meter(CPU, tmp_path / "absent")
    assert meter is None
    assert "no RAPL package counter under" in reason
    assert "virtual machines" in reason


def test_unreadable_counter_names_root_as_remedy(tmp_path, monkeypatch):
    powercap(tmp_path, TWO_SOCKETS)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(energy, "_read_microjoules", refuse)  # root reads everything
    meter, reason = find_meter(CPU, tmp_path)
    assert meter is None
    assert "can be read by root only; run as root" in reason
    assert "max_energy_range_uj" in reason


def test_garbage_in_a_counter_is_not_available(tmp_path):
    powercap(tmp_path, {"intel-rapl:0": ("package-0", "rubbish", 10)})
    meter, reason = find_meter(CPU, tmp_path)
    assert meter is None
    assert "expected a count of microjoules" in reason
    assert "'rubbish'" in reason


class FakeMeter:
    """A counter that gains one joule per call of `work` and nothing while idle."""

    source, covers = "fake", "a test"

    def __init__(self):
        self.total = 0.0

    def read(self):
        return [self.total]

    def joules(self, before, after):
        return after[0] - before[0]


def test_measured_energy_is_per_call_and_interleaved():
    meter, order = FakeMeter(), []

    def work(name, joules):
        def call():
            order.append(name)
            meter.total += joules

        return call

    readings = measure_energy(
        [work("dense", 2.0), work("sparse", 0.5)], meter, CPU, window_s=1e-3, idle_s=1e-3
    )
    assert [r.joules for r in readings] == pytest.approx([2.0, 0.5])
    assert [r.net_joules for r in readings] == pytest.approx([2.0, 0.5])  # idles at 0 W
    assert all(r.source == "fake" and r.calls >= 3 for r in readings)
    blocks = [name for i, name in enumerate(order[2:]) if i == 0 or order[i + 1] != name]
    assert blocks == ["dense", "sparse", "dense", "sparse"]  # 1, 2 | 2, 1 | 1, 2 merged


def test_idle_power_is_subtracted(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    fake_time = types.SimpleNamespace(
        perf_counter=lambda: clock.now, sleep=lambda s: setattr(clock, "now", clock.now + s)
    )
    monkeypatch.setattr(energy, "time", fake_time)
    meter = FakeMeter()
    meter.read = lambda: [10.0 * clock.now + meter.total]  # idles at 10 W

    def call():
        clock.now += 1.0
        meter.total += 3.0

    (reading,) = measure_energy([call], meter, CPU, window_s=5.0, idle_s=2.0)
    assert reading.joules == pytest.approx(13.0)
    assert reading.net_joules == pytest.approx(3.0)
    assert "idle power 10.0 W" in reading.reason


def test_measure_energy_refuses_empty_windows():
    with pytest.raises(ValueError, match="measure_energy: expected functions, window_s > 0"):
        measure_energy([lambda: None], FakeMeter(), CPU, window_s=0)


class FakeNvml(types.SimpleNamespace):
    """The five calls of pynvml that are used."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    mig = None

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetMigMode(self, handle):
        if self.mig is None:
            raise self.NVMLError_NotSupported
        return self.mig, self.mig

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.millijoules is None:
            raise self.NVMLError_NotSupported("Not Supported")
        return self.millijoules


@pytest.fixture
def one_gpu(monkeypatch):
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda", 0)


def test_nvml_counter_is_read_in_joules(one_gpu):
    nvml = FakeNvml(millijoules=2000)
    meter = NvmlMeter(one_gpu, nvml)
    before = meter.read()
    nvml.millijoules = 3500
    assert meter.joules(before, meter.read()) == pytest.approx(1.5)


def test_nvml_without_counter_or_with_mig_is_refused(one_gpu):
    with pytest.raises(OSError, match="NVML has no energy counter for cuda:0: Not Supported"):
        NvmlMeter(one_gpu, FakeNvml(millijoules=None))
    with pytest.raises(OSError, match="split by MIG"):
        NvmlMeter(one_gpu, FakeNvml(millijoules=1, mig=1))


def test_gpu_without_pynvml_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter, reason = find_meter(torch.device("cuda", 0))
    assert meter is None
    assert "pip install nvidia-ml-py" in reason and "libnvidia-ml" in reason


def test_operations_of_linear_and_conv_by_hand():
    linear = nn.Linear(8, 4)
    (layer,) = count_operations(linear, torch.randn(2, 3, 8)).layers
    assert layer.macs == 2 * 3 * 8 * 4
    assert (layer.weight_bytes, layer.index_bytes, layer.index_reads) == ((32 + 4) * 4, 0, 0)
    assert layer.activation_bytes == (48 + 24) * 4
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    (layer,) = count_operations(conv, torch.randn(2, 4, 8, 8)).layers
    assert layer.macs == 2 * 6 * 4 * 4 * (2 * 9)
    assert layer.activation_bytes == (2 * 4 * 64 + 2 * 6 * 16) * 4


def sparse_linear():
    """A 4 x 8 layer with five nonzeros."""
    dense = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        dense.weight.zero_()
        dense.weight.view(-1)[[0, 9, 10, 20, 31]] = 1.0
    return SparseLinear.from_dense(dense)


class Conv1D(nn.Module):
    """As in transformers: the weight is (in, out)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_operations_of_sparse_layer_and_conv1d():
    (layer,) = count_operations(sparse_linear(), torch.randn(3, 8)).layers
    assert layer.macs == 3 * 5
    assert (layer.index_reads, layer.index_bytes) == (10, 40)
    (layer,) = count_operations(Conv1D(), torch.randn(3, 8)).layers
    assert layer.macs == 3 * 8 * 4
    conv = nn.Conv2d(4, 6, 3, padding=1)
    with torch.no_grad():
        conv.weight[1:] = 0
    sparse = SparseConv2d.from_dense(conv)
    (layer,) = count_operations(sparse, torch.randn(2, 4, 5, 5)).layers
    assert layer.macs == 2 * 25 * 36
    assert layer.weight_bytes == (36 + 6) * 4


def test_uncounted_layers_are_named_and_repeated_calls_add_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.unused = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(self.linear(self.norm(x)))

    model = Twice().train()
    count = count_operations(model, torch.randn(2, 4))
    assert count.macs == 2 * (2 * 4 * 4)
    assert count.uncounted == {"LayerNorm": 1, "Linear": 1}
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_modelled_energy_by_hand():
    count = count_operations(sparse_linear(), torch.randn(3, 8))
    reading = modelled_energy(count)
    moved = 5 * 4 + 40 + (24 + 12) * 4
    assert reading.source == "modelled"
    assert reading.parts["arithmetic"] == pytest.approx(15 * (3.7 + 0.9) * 1e-12)
    assert reading.parts["index"] == pytest.approx(10 * 0.1 * 1e-12)
    assert reading.parts["memory"] == pytest.approx(moved * 1300 / 8 * 1e-12)
    assert reading.joules == pytest.approx(sum(reading.parts.values()))
    cached = modelled_energy(count, memory="8KB")
    assert cached.parts["memory"] == pytest.approx(moved * 10 / 8 * 1e-12)


def test_no_published_energy_means_no_joules():
    count = count_operations(nn.Linear(4, 4).double(), torch.randn(2, 4).double())
    reading = modelled_energy(count)
    assert reading.joules is None
    assert reading.source == "not available"
    assert reading.reason == "no published energy per operation for torch.float64"


def test_unknown_memory_is_refused():
    count = count_operations(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"modelled_energy: expected memory to be one of .* 'L2'"):
        modelled_energy(count, memory="L2")


def test_formula_states_every_energy_and_the_source():
    text = formula_text()
    assert "Horowitz" in text
    assert "not a measurement" in text
    for table in (energy_model.PICOJOULES, energy_model.PICOJOULES_PER_64_BIT):
        for name, picojoules in table.items():
            assert f"{name} {picojoules:g} pJ" in text

"""What `make gpu` runs, on the CPU: the harness must be right before it meets a card."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import cases
from gpu import __main__ as whole
from gpu import build, clocks, host, machine, sides, suites, sweep, table
from gpu.journal import Journal

from sparsekern.measure.energy import load_nvml
from sparsekern.measure.nvml import NOT_SUPPORTED, SM_CLOCK, Nvml

BENCH = Path(__file__).parents[1] / "bench"
CPU = torch.device("cpu")
PATHS = os.pathsep.join([str(BENCH.parent), str(BENCH)])
TINY = (
    suites.Work(cases.Linear(64, 32, 8), "unstructured", 0.9, "float32", goal=1e-6),
    suites.Work(cases.Linear(64, 64, 8), "2:4", 0.5, "float32", goal=1e6),
    suites.Work(cases.Linear(64, 64, 8), "block:32x32", 0.5, "float32"),
)


@pytest.fixture
def tiny(monkeypatch):
    """One suite of three points instead of the real ones."""
    monkeypatch.setattr(suites, "SUITES", {"tiny": (lambda: iter(TINY), 1)})
    for module in (sweep, table, whole):
        monkeypatch.setattr(module, "SUITES", suites.SUITES)


def run_sweep(path, *extra):
    return sweep.main(["--suite", "tiny", "--out", str(path), "--device", "cpu", "--budget", "0.01",
                       *extra])  # fmt: skip


# Points


def test_suites_are_well_formed():
    for name, (points, share) in suites.SUITES.items():
        keys = [work.key for work in points()]
        assert keys and len(set(keys)) == len(keys) and share > 0, name
    goals = {w.sparsity: w.goal for w in suites.block() if w.pattern == "block:64x64" if w.goal}
    assert goals[0.9] == pytest.approx(8.5)


def test_a_sweep_measures_every_point_once(tiny, tmp_path):
    path = tmp_path / "points.jsonl"
    assert run_sweep(path) == 0
    points = Journal(path).records()
    assert [p["key"] for p in points] == [f"tiny | {w.key}" for w in TINY]
    for p in points:
        assert "failed" not in p, p
        assert p["sides"][p["best_dense"]]["role"] == "dense" and p["best_ours"] == "sparsekern"
        assert p["sides"]["sparsekern"]["clock"] == "wall"
        assert p["speedup"]["p10"] <= p["speedup"]["median"] <= p["speedup"]["p90"]
        assert p["effective_tflops"] > p["real_tflops"] > 0 and p["state"]["sm_mhz"] is None
    size = path.stat().st_size
    assert run_sweep(path) == 0 and path.stat().st_size == size


def test_a_point_that_fails_is_named_and_the_rest_goes_on(tiny, tmp_path, monkeypatch):
    real = sides.ours

    def ours(p):
        if p.pattern == "2:4":
            raise RuntimeError("nm_linear: cuSPARSELt is too old\nmore")
        return real(p)

    makers = [("dense", "dense", sides.cublas), ("sparsekern", "ours", ours)]
    monkeypatch.setitem(sides.MAKERS, "linear", makers)
    run_sweep(tmp_path / "points.jsonl")
    points = Journal(tmp_path / "points.jsonl").records()
    assert [("failed" in p) for p in points] == [False, True, False]
    assert points[1]["failed"] == "sparsekern: nm_linear: cuSPARSELt is too old"
    text = table.report(points, ["tiny"])
    assert "FAILED tiny | linear 64-64 T=8 2:4 0.5 float32: sparsekern: nm_linear" in text
    assert "tiny: 2 of 3 points" in text and "goal met 1 of 2, 1 failed" in text


def test_a_sweep_stops_when_its_time_is_up(tiny, tmp_path):
    run_sweep(tmp_path / "points.jsonl", "--seconds", "-1")
    assert Journal(tmp_path / "points.jsonl").records() == []
    assert table.report([], ["tiny"]).endswith("tiny: 0 of 3 points, 3 not reached in time")


def test_a_wrong_result_is_never_timed(tiny):
    p = cases.build(TINY[0].case, "unstructured", 0.9, torch.float32)
    with pytest.raises(RuntimeError, match=r"expected x to be right to 0\.005, got 1\.0e"):
        sides.checked(torch.zeros(8, 32), "x", p, p.reference())
    with pytest.raises(RuntimeError, match="got inf"):
        sides.checked(torch.full((8, 32), torch.nan), "x", p, p.reference())


def test_no_kernel_of_ours_means_no_figure_of_ours():
    p = cases.build(TINY[0].case, "unstructured", 0.9, torch.float32)
    assert sides.ours(p)[0] == p.nnz * 8 + 33 * 4
    with pytest.raises(RuntimeError, match="csr_linear has no kernel on meta"):
        sides.ours(replace(p, x=p.x.to("meta")))


def test_the_converter_is_timed_as_a_user_runs_it():
    work = suites.Work(cases.Linear(256, 256, 32), "unstructured", 0.95, "float32", 0.95)
    record = sweep.attempt("converter", work, CPU, 0.01, machine.Card(CPU))
    assert "failed" not in record, record
    assert record["format"] in ("csr", "dense") and "faster" in record["reason"]
    assert set(record["sides"]) == {"dense", "converted"} and record["max_rel_error"] < 1e-4
    row = table.report([{"type": "point", "suite": "converter", "key": "k", **record}], [])
    assert f"[{record['format']}]" in row


def test_training_points():
    work = suites.Work(cases.Linear(64, 64, 8, training=True), "block:32x32", 0.5, "float32")
    record = sweep.attempt("training", work, CPU, 0.01, machine.Card(CPU))
    assert "failed" not in record and record["best_dense"] == "autograd", record


def test_convolutions():
    work = suites.Work(cases.Conv(1, 8, 8, 6, 3), "unstructured", 0.5, "float32")
    record = sweep.attempt("conv", work, CPU, 0.01, machine.Card(CPU))
    assert "failed" not in record and record["best_dense"].startswith("cuDNN"), record


def test_joules_without_a_counter_are_missing_with_the_reason():
    work = suites.Work(cases.Linear(64, 64, 8), "unstructured", 0.9, "float32", energy=True)
    record = sweep.attempt("energy", work, CPU, 0.01, machine.Card(CPU))
    if "missing" not in record["energy"]:
        pytest.skip("this machine has a counter")
    assert record["energy"]["missing"] and "speedup" in record


def test_copies_are_counted_by_the_l2(monkeypatch):
    class L2:
        L2_cache_size = 1000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: L2)
    card = torch.device("cuda")
    assert [clocks.copies_needed(n, card) for n in (3000, 900, 10, 0)] == [1, 3, 32, 1]
    assert clocks.copies_needed(10, CPU) == 1


def test_samples_of_a_graph_are_scaled_to_the_calls_asked_for(monkeypatch):
    replays = []
    graph = clocks.Captured(None, 8, torch.device("cuda"))
    monkeypatch.setattr(clocks, "_events", lambda call, device: lambda n: replays.append(n) or n)
    assert graph(32) == 4.0 and graph(1) == pytest.approx(1 / 8) and replays == [4, 1]


def test_calls_that_a_graph_cannot_hold_are_timed_by_events(monkeypatch):
    def refuse(calls, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(clocks, "captured", refuse)
    monkeypatch.setattr(clocks, "_events", lambda call, device: "by events")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = clocks.sampler([int], torch.device("cuda"))
    assert found == ("by events", "events: operation not permitted when stream is capturing")
    assert clocks.sampler([int], torch.device("cuda"), graph=False) == ("by events", "events")


# The machine, the build, the whole


class FakeLibrary:
    """libnvidia-ml with one card."""

    def __init__(self):
        self.nvmlErrorString = lambda code: b"Not Supported"

    def nvmlInit_v2(self):
        return 0

    def nvmlSystemGetDriverVersion(self, text, size):
        text.value = b"580.1"
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        assert uuid == b"GPU-12"
        handle._obj.value = 7
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
        value._obj.value = 2**40
        return 0

    def nvmlDeviceGetClockInfo(self, handle, kind, value):
        value._obj.value = 1980 if kind.value == SM_CLOCK else 3201
        return 0

    def nvmlDeviceGetMigMode(self, handle, now, later):
        return NOT_SUPPORTED

    def nvmlDeviceGetPowerUsage(self, handle, value):
        value._obj.value = 350_500
        return 0

    nvmlDeviceGetMaxClockInfo = nvmlDeviceGetClockInfo

    def nvmlDeviceGetEnforcedPowerLimit(self, handle, value):
        return NOT_SUPPORTED


@pytest.fixture
def card(monkeypatch):
    class Properties:
        uuid = "12"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    return machine.Card(torch.device("cuda"), Nvml(FakeLibrary()))


def test_nvml_without_its_package(card):
    assert card.state() == {"sm_mhz": 1980, "memory_mhz": 3201, "watts": 350.5}
    limits = card.limits()
    assert limits["driver"] == "580.1" and limits["watts_max"] is None and limits["nvml"] == "read"
    nvml = Nvml(FakeLibrary())
    handle = nvml.nvmlDeviceGetHandleByUUID("GPU-12")
    assert handle.value == 7 and nvml.nvmlDeviceGetTotalEnergyConsumption(handle) == 2**40
    with pytest.raises(Nvml.NVMLError_NotSupported, match="Not Supported"):
        nvml.nvmlDeviceGetMigMode(handle)


def test_without_nvml_the_header_says_so(monkeypatch):
    assert machine.Card(CPU).state()["watts"] is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    if not Path("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1").exists():
        with pytest.raises(ImportError, match="NVML, which counts a GPU's energy, cannot be load"):
            load_nvml()
    found = machine.header(CPU)
    assert found["halves"].keys() == {"_C", "_C_cuda"} and "triton" in found["libraries"]
    assert machine.fingerprint() == machine.fingerprint() and len(machine.fingerprint()) == 12


def test_a_build_that_fails_falls_back_to_the_cpu_half(monkeypatch):
    tried = []

    def setup(cuda, seconds):
        tried.append(cuda)
        return (0, "sparsekern: CPU kernels; CUDA half not built: SPARSEKERN_CUDA=0") if cuda else (
            1, "cusparse.cpp:7: error: no such type"
        )  # fmt: skip

    monkeypatch.setattr(build, "_setup", setup)
    record = build.build(60.0)
    assert tried == ["", "0"] and record["said"].endswith("SPARSEKERN_CUDA=0")
    assert "both halves: exit code 1: cusparse.cpp:7: error: no such type" in record["failed"]


def test_everything_in_one_go(tiny, tmp_path, monkeypatch, capsys):
    def in_this_process(name, journal, seconds, left, options):
        run_sweep(journal.path)
        return whole.supervise([sys.executable, "-c", ""], journal, {}, 60.0, 60.0)

    monkeypatch.setattr(whole, "sweep", in_this_process)
    path = tmp_path / "all.jsonl"
    arguments = ["--suite", "tiny", "--device", "cpu", "--no-build", "--out", str(path)]
    assert whole.main(arguments) == 0
    said = capsys.readouterr().out
    assert "tiny: 3 of 3 points, gain " in said and "goal met 1 of 2" in said
    assert " missed" in said and str(path) in said
    first = json.loads(path.read_text().splitlines()[0])
    assert first["type"] == "header" and first["build"]["said"] == "not built"
    assert first["hardware"]["torch"] == torch.__version__


def test_without_a_gpu_it_says_so_at_once():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "gpu"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": PATHS},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == "make gpu: expected a CUDA device, got none that torch can see"


def test_the_way_an_op_went_is_part_of_a_point(monkeypatch):
    p = cases.build(cases.Linear(64, 32, 40), "unstructured", 0.9, torch.float32)
    key = ("csr_linear", 0, torch.float32, 32, 64, 15, 64)
    other = ("csr_linear", 0, torch.float32, 32, 64, 15, 16)
    chosen = {key: "cusparse 2c", other: "decode"}
    monkeypatch.setattr(sweep, "choices", lambda: (chosen, {key: {"triton": "no Triton"}}))
    found = sweep.ways(p)
    assert found["ways"] == {"csr_linear T<=64": "cusparse 2c"}
    lines = table._left_out([found])
    assert lines == ["left out: csr_linear by triton: no Triton (1 points)"]


def test_what_a_call_takes_the_host():
    work = suites.Work(cases.Conv(1, 16, 16, 4, 3), "unstructured", 0.5, "float32")
    record = sweep.attempt("host", work, CPU, 0.01, machine.Card(CPU))
    assert "failed" not in record, record
    assert list(record["sides"]) == ["dense", "ours"]  # there is nothing to replay on a CPU
    for role, side in record["sides"].items():
        assert side["role"] == role and side["clock"] == "host" and side["median_ms"] > 0
        assert side["max_rel_error"] < sides.TOLERANCE[torch.float32]
    assert table._row({"suite": "host", **record})[7] == f"{record['speedup']['median']:.2f}"


def test_the_host_never_waits_for_room_in_the_queue(monkeypatch):
    """Nor does a sample count the waits between."""
    done, queued = [], []

    def wait(device):
        done.append(len(queued))
        queued.clear()

    clock = iter(range(1000))
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(host.time, "perf_counter", lambda: float(next(clock)))
    sample = host.launches(lambda: queued.append(1), torch.device("cuda"))
    assert sample(2 * host.CALLS + 7) == 3.0
    assert done == [0, host.CALLS, host.CALLS] and len(queued) == 7


def test_what_computes_something_else_stands_beside_ours():
    """8 bits and products of the moving mask: measured and told, never taken for ours."""
    work = suites.Work(cases.Linear(64, 64, 8), "2:4", 0.5, "bfloat16")
    record = sweep.attempt(
        "tiny", work, torch.device("cpu"), 0.01, machine.Card(torch.device("cpu"))
    )
    for name in ("sparsekern int8", "sparsekern float8"):
        side = record["sides"][name]
        assert side["role"] == "8 bits" and 0 < side["max_rel_error"] < sides.EIGHT_BITS
    assert record["best_ours"] == "sparsekern"
    work = suites.Work(cases.Linear(64, 64, 8, training=True), "2:4T", 0.5, "float32")
    with torch.enable_grad():
        record = sweep.attempt(
            "tiny", work, torch.device("cpu"), 0.01, machine.Card(torch.device("cpu"))
        )
    assert record["sides"]["sparsekern pruned every step"]["role"] == "on the fly"

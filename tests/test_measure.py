"""Timing, memory, comparison and reports."""

import gc
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections import OrderedDict

import pytest
import torch
from measure_common import compared, mlp
from torch import nn

from sparsekern.measure import compare, hardware, interleaved, speedup
from sparsekern.measure.memory import extra_buffer_bytes, peak_forward_bytes, weight_bytes
from sparsekern.measure.structure import output_error, tensors_of
from sparsekern.measure.table import milliseconds, percent, si
from sparsekern.measure.timer import Timing
from sparsekern.nn import SparseLinear

QUICK = {"budget_s": 0.01, "energy": "none"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def comparison():
    return compared()


# Timing


def test_rounds_alternate_and_are_counted():
    order = []

    def slow(name):
        def call():
            order.append(name)
            end = time.perf_counter() + 2e-3
            while time.perf_counter() < end:
                pass

        return call

    timings = interleaved([slow("a"), slow("b")], budget_s=1e-9, min_rounds=4, max_rounds=4)
    assert order[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [t.rounds for t in timings] == [4, 4]
    assert all(t.calls == 1 and t.min_ms <= t.p10_ms <= t.median_ms <= t.p90_ms for t in timings)
    assert all(2 <= t.min_ms for t in timings)


def test_fast_functions_are_repeated_inside_a_sample():
    (timing,) = interleaved([lambda: None], budget_s=0.02)
    assert timing.calls > 100
    assert timing.median_ms < 1e-2


def test_budget_limits_and_garbage_collection_comes_back():
    timings = interleaved([lambda: sum(range(1000))] * 2, budget_s=0.05)
    assert 5 <= timings[0].rounds <= 60
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "interleaved: expected at least one function in fns, got none"),
        (([int], 0), "interleaved: expected budget_s > 0 seconds, got 0"),
        (([int], 1.0, 5, 4), "expected 1 <= min_rounds <= max_rounds, got min_rounds=5"),
    ],
)
def test_interleaved_refuses(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        interleaved(*arguments)


def test_speedup_is_the_median_of_pairs():
    base, other = Timing.from_samples([2.0, 4.0, 9.0], 1), Timing.from_samples([1.0, 1.0, 3.0], 1)
    assert speedup(base, other).median == 3.0
    with pytest.raises(ValueError, match="one call of interleaved, got 3 and 1 rounds"):
        speedup(base, Timing.from_samples([1.0], 1))


def test_import_is_cheap():
    code = (
        "import sys, torch; before = set(sys.modules); "  # a CUDA torch brings pynvml
        "import sparsekern.measure, sparsekern.cli; "
        "heavy = {'matplotlib', 'rich', 'jinja2', 'transformers', 'pynvml', 'triton'}; "
        "print(sorted(heavy & (set(sys.modules) - before)), torch.cuda.is_initialized())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] False"


def test_hardware_reads_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Test CPU 3000\nflags\t\t: fpu avx2 fma lahf\n"
    )
    found = hardware(cpuinfo)
    assert found["cpu"] == "Test CPU 3000"
    assert found["isa"] == ["fma", "avx2"]
    assert found["threads"] == 1
    assert hardware(tmp_path / "absent")["isa"] == []
    json.dumps(found)


# Memory


def test_weight_bytes_count_shared_storage_once():
    model = mlp(64)
    assert weight_bytes(model) == 4 * (32 * 64 + 64 + 64 * 8 + 8)
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    assert weight_bytes(tied) == 4 * 64


def test_non_persistent_buffers_are_counted_apart():
    model = nn.BatchNorm1d(4)
    model.register_buffer("plan", torch.zeros(10, dtype=torch.int32), persistent=False)
    assert weight_bytes(model) == 4 * 4 * 4 + 8
    assert extra_buffer_bytes(model) == 40


def test_weight_bytes_of_torch_sparse_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support a beta
        csr = torch.sparse_csr_tensor(torch.arange(5), torch.arange(4), torch.ones(4))
    model = nn.Module()
    model.register_buffer("csr", csr)
    model.register_buffer("coo", torch.sparse_coo_tensor(torch.zeros(2, 4).long(), torch.ones(4)))
    assert weight_bytes(model) == (5 * 8 + 4 * 8 + 4 * 4) + (2 * 4 * 8 + 4 * 4)
    model.register_buffer("packed", torch.ones(4, 4).to_mkldnn())
    with pytest.raises(ValueError, match=r"a strided or sparse tensor, got torch\._mkldnn"):
        weight_bytes(model)


def test_peak_memory_of_a_forward_pass(capfd):
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(16, 32)
    with torch.inference_mode():
        peak = peak_forward_bytes(lambda: model(x), torch.device("cpu"))
    hidden = 16 * 64 * 4
    assert 2 * hidden <= peak <= 2 * hidden + 16 * 8 * 4 + 64  # ReLU reads one and writes one
    assert "USDT" not in capfd.readouterr().err


def test_other_messages_survive_the_memory_profile(capfd):
    peak_forward_bytes(lambda: os.write(2, b"a warning\n"), torch.device("cpu"))
    assert "a warning" in capfd.readouterr().err


def test_peak_memory_refuses_other_devices():
    with pytest.raises(ValueError, match="expected a cpu or cuda device, got meta"):
        peak_forward_bytes(lambda: None, torch.device("meta"))


# Outputs


def test_nested_outputs_are_flattened():
    one = torch.ones(2)
    tree = OrderedDict(logits=one, hidden=(one, [one, None]), loss=3.0)
    assert list(tensors_of(tree)) == ["logits", "hidden[0]", "hidden[1][0]"]


def test_output_error_takes_the_worst_tensor():
    dense = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([10.0])}
    sparse = {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([12.0])}
    assert output_error(dense, sparse, "t") == (2.0, 0.25)


def test_output_error_of_non_finite_values():
    inf, nan = math.inf, math.nan
    assert output_error(torch.tensor([inf, nan]), torch.tensor([inf, nan]), "t") == (0.0, 0.0)
    assert output_error(torch.tensor([1.0]), torch.tensor([nan]), "t") == (inf, inf)
    assert output_error(torch.tensor([0.0]), torch.tensor([1.0]), "t") == (1.0, inf)
    assert output_error(torch.tensor([1, 2]), torch.tensor([1, 4]), "t") == (2.0, 1.0)
    assert output_error(torch.empty(0), torch.empty(0), "t") == (0.0, 0.0)


# Comparison


class Structured(nn.Module):
    """Returns whatever `build` makes of its input."""

    def __init__(self, build):
        super().__init__()
        self.linear, self.build = nn.Linear(4, 4), build

    def forward(self, x, scale=None):
        return self.build(self.linear(x))


def test_comparison_holds_every_figure(comparison):
    c = comparison
    assert c.dense.weight_bytes / c.sparse.weight_bytes == c.size_ratio > 1
    assert c.dense.throughput == pytest.approx(4 / c.dense.latency.median_ms * 1e3)
    assert c.speedup.p10 <= c.speedup.median <= c.speedup.p90
    assert c.dense.peak_bytes > c.sparse.peak_bytes > 0
    assert c.batch == 4
    assert c.max_abs_error > 0
    assert c.dense.energy.source in ("modelled", "rapl")
    assert c.energy_ratio > 1


def test_table_and_json(comparison):
    table = comparison.table()
    assert str(comparison) == table
    for word in ("latency, median", "throughput", "weights", "energy per pass", "peak memory"):
        assert word in table
    data = json.loads(comparison.to_json())
    assert data["format"] == "sparsekern comparison"
    assert data["dense"]["latency"]["median_ms"] > 0
    assert data["hardware"]["torch"] == torch.__version__


def test_json_has_no_bare_infinity():
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x) * math.nan

    c = compare(nn.Linear(4, 4), Broken(4, 4), torch.randn(2, 4), **QUICK)
    assert json.loads(c.to_json())["max_abs_error"] == "inf"


def test_inputs_may_be_tuple_or_dict_and_identical_models_agree():
    model, x = Structured(lambda y: {"logits": y, "all": (y, y + 1)}), torch.randn(3, 4)
    for inputs in ((x,), (x, None), {"x": x, "scale": None}):
        c = compare(model, model, inputs, **QUICK)
        assert c.max_abs_error == 0 and c.batch == 3


def test_training_flags_and_threads_come_back():
    dense, sparse = mlp().train(), mlp().train()
    dense[0].eval()
    compare(dense, sparse, torch.randn(2, 32), threads=2, **QUICK)
    assert [m.training for m in dense.modules()] == [True, False, True, True]
    assert all(m.training for m in sparse.modules())
    assert torch.get_num_threads() == 1


def test_tokens_as_unit():
    c = compare(mlp(), mlp(), torch.randn(2, 5, 32), unit="tokens", **QUICK)
    assert c.dense.throughput == pytest.approx(10 / c.dense.latency.median_ms * 1e3)


def test_energy_without_counter_says_so_and_measured_uses_the_counter(tmp_path):
    x = torch.randn(2, 32)
    c = compare(mlp(), mlp(), x, budget_s=0.01, powercap=tmp_path)
    assert c.dense.energy.joules is None and c.dense.energy.source == "not available"
    assert "not available" in c.table() and "no RAPL package counter" in c.table()
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    for name, text in (("name", "package-0"), ("energy_uj", "5"), ("max_energy_range_uj", "9")):
        (package / name).write_text(text)
    for choice in ("measured", "modelled"):  # a counter always comes first
        c = compare(
            mlp(), mlp(), x, budget_s=0.01, energy=choice, energy_window_s=0.01, powercap=tmp_path
        )
        assert c.dense.energy.source == "rapl"


X = torch.randn(2, 4)
META = nn.Linear(4, 4, device="meta")
MIXED = nn.Sequential(nn.Linear(4, 4), META)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((3, nn.Linear(4, 4), X), {}, TypeError, "expected dense to be a torch.nn.Module, got int"),
        ((nn.ReLU(), nn.Linear(4, 4), X), {}, ValueError,
         "expected dense to have parameters, got ReLU with none"),
        ((nn.Linear(4, 4), MIXED, X), {}, ValueError,
         "expected sparse to be on one device, got cpu, meta"),
        ((META, META, X), {}, ValueError, "expected dense to hold data, got a model on the meta"),
        ((nn.Linear(4, 4), nn.Linear(4, 4), "x"), {}, TypeError,
         "expected example_inputs to be a tensor, a tuple of arguments or a dict"),
        ((nn.Linear(4, 4), nn.Linear(4, 4), (1,)), {}, ValueError,
         "expected at least one tensor in example_inputs, got none"),
        ((nn.Linear(4, 4), nn.Linear(4, 4), {"x": X.to("meta")}), {}, ValueError,
         "expected example_inputs on cpu like the models, got x on meta"),
        ((nn.Linear(4, 4), nn.Linear(4, 3), X), {}, ValueError,
         "expected output output of the same shape"),
        ((nn.Linear(4, 4), Structured(lambda y: (y, y)), X), {}, ValueError,
         "expected both models to return the same structure, got ['output'] from dense and "
         "['[0]', '[1]'] from sparse"),
        ((Structured(lambda y: 1), Structured(lambda y: 1), X), {}, ValueError,
         "expected a tensor in the models' output, got int"),
        ((nn.Linear(4, 4), nn.Linear(4, 4), X[:0]), {}, ValueError,
         "expected a non-empty first input, got (0, 4)"),
        ((nn.Linear(4, 4), nn.Linear(4, 4), X[0]), {"unit": "tokens"}, ValueError,
         "expected the first input tensor to have at least 2 dimensions to count tokens, "
         "got shape (4,)"),
        ((nn.Linear(4, 4), nn.Linear(4, 4), X), {"unit": "words"}, ValueError,
         "expected unit to be one of ('samples', 'tokens'), got 'words'"),
        ((nn.Linear(4, 4), nn.Linear(4, 4), X), {"energy": "guess"}, ValueError,
         "expected energy to be one of ('measured', 'modelled', 'none'), got 'guess'"),
        ((nn.Linear(4, 4), nn.Linear(4, 4), X), {"budget_s": 0}, ValueError,
         "expected budget_s > 0 seconds, got 0"),
        ((nn.Linear(4, 4), nn.Linear(4, 4), X), {"energy_window_s": -1}, ValueError,
         "expected energy_window_s > 0 seconds, got -1"),
        ((nn.Linear(4, 4), nn.Linear(4, 4), X), {"threads": 0}, ValueError,
         "expected threads >= 1 or None, got 0"),
    ],
)  # fmt: skip
def test_compare_refuses(arguments, options, kind, message):
    with pytest.raises(kind, match=re.escape(f"compare: {message}")):
        compare(*arguments, **{**QUICK, **options})


def test_failed_comparison_leaves_flags_alone():
    dense = mlp().train()
    with pytest.raises(RuntimeError):
        compare(dense, mlp().train(), torch.randn(2, 31), **QUICK)
    assert all(m.training for m in dense.modules())


def test_sparse_layers_are_counted_and_listed():
    dense = mlp()
    sparse = mlp()
    sparse[0] = SparseLinear.from_dense(dense[0], sparsity=0.9)
    c = compare(dense, sparse, torch.randn(2, 32), budget_s=0.01, energy="modelled")
    assert (c.layers_sparse, c.layers_dense, c.reverted) == (1, 0, False)
    assert c.layers[0]["name"] == "0" and c.layers[0]["format"] == "csr"
    assert c.size_ratio > 1 and c.sparse.extra_buffer_bytes > 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (si(0.0123, "J"), "12.3 mJ"), (si(999.96, "B"), "1.00 kB"), (si(0, "B"), "0 B"),
        (si(4.2e-10, "J"), "0.420 nJ"), (si(None, "J"), "\u2013"), (si(123456, "B"), "123 kB"),
        (milliseconds(1.5), "1.50 ms"), (percent(0.9), "90 %"), (percent(0.98765), "98.77 %"),
    ],
)  # fmt: skip
def test_numbers_read_well(text, wanted):
    assert text == wanted

"""The benchmark frame in a tiny setting: cases, one run end to end, table and figures."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import baselines
import cases
import figures
import peaks
import plot
import run
from peers import install

from sparsekern.patterns import parse

LIMITS = {"threads": 1, "fma_gflops": 100.0, "fma_l1_gflops": 60.0, "load_memory_gb_s": 10.0}
START, END = plot.markers(plot.LAYERS)
ALL_CASES = {case.name: case for suite in cases.SUITES.values() for case in suite.cases}


def shrunk(case):
    """The same kind of case, small enough for a test."""
    if isinstance(case, cases.Linear):
        size = {"in_features": 32, "out_features": 32, "tokens": 19}
    else:
        size = {"batch": 2, "in_channels": 8, "out_channels": 16, "size": 9}
    if getattr(case, "groups", 1) > 1:
        size |= {"in_channels": 8, "out_channels": 8, "groups": 8}
    return replace(case, **{key: min(getattr(case, key), most) for key, most in size.items()})


SMALL_CASES = {small.name: small for small in map(shrunk, ALL_CASES.values())}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Limits without compiling and running for them, and no engine but torch and scipy."""
    monkeypatch.setattr(peaks, "measure", lambda threads: LIMITS)
    monkeypatch.setattr(install, "FOLDER", tmp_path)


def run_bench(out, *arguments):
    status = run.main(["--budget", "0.002", "--out", str(out), *arguments])
    return status, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_every_case_has_the_shapes_it_says(case):
    x = torch.empty(case.input_shape, device="meta")
    layer = case.layer()
    y = layer(x)
    assert tuple(layer.weight.shape) == case.weight_shape
    assert y.numel() == case.tokens * case.weight_shape[0]
    assert case.apply(x, layer.weight, layer.bias).shape == y.shape


def test_every_pattern_fits_the_cases_of_its_suite():
    for suite in cases.SUITES.values():
        for case, pattern, sparsity in suite.points(None, None):
            assert parse(pattern).misfit(case.weight_shape) is None
            depthwise = getattr(case, "groups", 1) > 1  # measured without zeros
            assert sparsity == 0 if depthwise else 0 < sparsity < 1


@pytest.mark.parametrize("case", SMALL_CASES.values(), ids=SMALL_CASES)
def test_every_kind_of_case_builds_and_all_sides_agree(case):
    problem = cases.build(case, "unstructured", 0.5, torch.float32)
    assert problem.nnz == problem.mask.numel() // 2
    with torch.set_grad_enabled(case.training):
        sides, left_out = baselines.sides(problem, peers=True, int8=True)
    assert sides[-1].role == "ours" and sides[0].role == "dense"
    key = f"{case.kind}{' training' if case.training else ''}"
    known = {*baselines.DENSE[key], *baselines.PEERS.get(key, {}), baselines.OURS}
    known |= set(baselines.QUANTIZED.get(key, {}))
    assert {side.name for side in sides} | set(left_out) == known
    assert all(side.error < (0.03 if "int8" in side.role else 1e-5) for side in sides)
    assert baselines.DYNAMIC not in left_out or "format csr" in left_out[baselines.DYNAMIC]


def test_suites_are_filtered_by_pattern_and_sparsity():
    suite = cases.SUITES["linear"]
    assert {p for _, p, _ in suite.points(None, [0.9])} == {p for p, _ in suite.grid} - {"2:4"}
    assert {s for _, _, s in suite.points(["2:4"], [0.5, 0.9])} == {0.5}


def test_a_run_writes_a_header_and_every_point(tmp_path, quick, capsys):
    before = torch.get_num_threads()
    status, lines = run_bench(
        tmp_path / "new" / "out.jsonl",
        *("--suite", "overhead", "--dtype", "float32", "bfloat16", "--threads", "1", "2"),
        *("--sparsity", "0.5", "0.9", "--peers"),
    )
    assert status == 0 and torch.get_num_threads() == before
    header, *points = lines
    assert header["type"] == "header" and header["peaks"] == {"1": LIMITS, "2": LIMITS}
    assert {"date", "commit", "isa", "hardware"} <= set(header)
    assert len(points) == 8
    assert {(p["dtype"], p["threads"], p["sparsity"]) for p in points} == {
        (d, t, s) for d in ("float32", "bfloat16") for t in (1, 2) for s in (0.5, 0.9)
    }
    shown = capsys.readouterr().err
    assert shown.count("linear 64-64 T=1") == 8 and "8 points written" in shown


def test_a_point_has_all_fields_and_they_agree(tmp_path, quick):
    _, (_, point) = run_bench(tmp_path / "out.jsonl", "--suite", "overhead", "--peers", "--int8")
    assert point["type"] == "point" and point["shape"] == [64, 64] and point["tokens"] == 1
    assert point["nnz"] == 410 and point["pattern"] == "unstructured" and not point["training"]
    roles = {side["role"] for side in point["sides"].values()}
    assert roles - {"dense int8"} == {"dense", "peer", "int8", "ours"}
    for side in point["sides"].values():
        assert 0 < side["min_ms"] <= side["p10_ms"] <= side["median_ms"] <= side["p90_ms"]
    dense = {n: s["median_ms"] for n, s in point["sides"].items() if s["role"] == "dense"}
    assert point["best_dense"] == min(dense, key=dense.get)
    assert point["speedup"]["p10"] <= point["speedup"]["median"] <= point["speedup"]["p90"]
    ours_s = point["sides"]["sparsekern"]["median_ms"] / 1e3
    assert point["real_gflops"] == pytest.approx(2 * 410 / ours_s / 1e9, rel=1e-4)
    assert point["effective_gflops"] == pytest.approx(2 * 4096 / ours_s / 1e9, rel=1e-4)
    assert point["percent_fma_peak"] == pytest.approx(point["real_gflops"], abs=0.01)
    assert point["weight_gb_s"] == pytest.approx(410 * 8 / ours_s / 1e9, rel=1e-4)


def test_training_counts_three_products():
    case = cases.Linear(8, 4, 3, training=True)
    problem = cases.build(case, "unstructured", 0.5, torch.float32)
    assert problem.flops(10) == 3 * 2 * 10 * 3
    y, dx, dw = problem.grad, *problem.reference()[:2]
    assert dx.shape == problem.x.shape and dw.shape == problem.weight.shape and y.shape == (3, 4)


def test_the_default_file_is_named_after_suite_and_time():
    path = run.default_path(["conv3x3", "decode"])
    assert path.parent.name == "results" and path.name.startswith("conv3x3-decode-")


def test_without_limits_percentages_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(peaks, "measure", lambda threads: {"unavailable": "no compiler"})
    _, (header, point) = run_bench(tmp_path / "out.jsonl", "--suite", "overhead")
    assert header["peaks"]["1"] == {"unavailable": "no compiler"}
    assert point["percent_fma_peak"] is None and point["real_gflops"] > 0


def test_our_wrong_result_stops_the_run(monkeypatch):
    wrong = torch.zeros(19, 32)
    monkeypatch.setattr(baselines, "sparse_call", lambda problem: lambda: wrong)
    problem = cases.build(cases.Linear(32, 32, 19), "2:4", 0.5, torch.float32)
    wanted = r"bench: expected sparsekern to be right to 0.0001 at linear 32-32 T=19, got a relat"
    with pytest.raises(RuntimeError, match=wanted):
        baselines.sides(problem, peers=False)


def test_a_wrong_or_broken_dense_side_is_left_out_with_its_reason(monkeypatch):
    def broken(problem):
        raise NotImplementedError("no such kernel here\nand a long tail")

    wrong = torch.full((19, 32), float("nan"))
    makers = {"broken": broken, "wrong": lambda p: lambda: wrong, "right": baselines.f_linear}
    monkeypatch.setitem(baselines.DENSE, "linear", makers)
    problem = cases.build(cases.Linear(32, 32, 19), "unstructured", 0.5, torch.float32)
    sides, left_out = baselines.sides(problem, peers=False)
    assert [side.name for side in sides] == ["right", "sparsekern"]
    assert left_out["broken"] == "no such kernel here" and "got a relative" in left_out["wrong"]
    del makers["right"]
    with pytest.raises(RuntimeError, match="bench: expected a dense side for linear 32-32 T=19"):
        baselines.sides(problem, peers=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sparsity", "1.2"], "expected a share of zeros in [0, 1), got 1.2"),
        (["--threads", "0"], "expected a whole number of at least 1, got 0"),
        (["--budget", "many"], "expected a time above 0, got many"),
        (["--pattern", "3x3"], "parse: expected a pattern"),
        (["--suite", "gpu"], "invalid choice: 'gpu'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as leave:
        run.main(arguments)
    assert leave.value.code == 2 and message in capsys.readouterr().err


def test_filters_that_leave_nothing_are_refused(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run.main(["--case", "no such case", "--out", str(out)]) == 2
    assert "bench: expected at least one point, got none" in capsys.readouterr().err
    assert not out.exists()


def test_peaks_are_measured_here():
    found = peaks.measure(1, seconds=0.002)
    if "unavailable" in found:
        pytest.skip(found["unavailable"])
    assert found["isa"] == peaks.isas()[0]
    assert found["fma_gflops"] > 0 and found["load_memory_gb_s"] > 0
    assert 0 < found["fma_l1_gflops"] and 0 < found["fma_l2_gflops"]


def test_peaks_say_why_they_are_missing(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in peaks.measure(1)["unavailable"]
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler found" in peaks.measure(1)["unavailable"]


def _point(case="a", sparsity=0.5, gain=1.5, suite="summary", pattern="unstructured", threads=1):
    sides = {
        "F.linear": {"role": "dense", "median_ms": gain},
        "sparsekern": {"role": "ours", "median_ms": 1.0},
    }
    return {
        "type": "point", "suite": suite, "case": case, "pattern": pattern, "sparsity": sparsity,
        "dtype": "float32", "threads": threads, "sides": sides, "best_dense": "F.linear",
        "speedup": {"median": gain, "p10": 0.9 * gain, "p90": 1.1 * gain}, "kind": "linear",
        "effective_gflops": 100.0, "tokens": 512, "percent_l1_limit": 40.0,
    }  # fmt: skip


def _header(cpu="a CPU"):
    return {
        "type": "header", "date": "2026-01-02T03:04:05", "commit": "abc", "isa": "avx2",
        "hardware": {"cpu": cpu, "torch": "2.13.0"},
    }  # fmt: skip


def _write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def results(tmp_path):
    points = [_point(c, s, g * s) for c, g in (("a", 3.0), ("b", 1.2)) for s in (0.5, 0.7, 0.9)]
    points += [_point("a", 0.9, 2.0, suite="tails"), _point("a", 0.5, 1.1, pattern="2:4")]
    return _write(tmp_path / "results.jsonl", _header(), *points)


def test_the_table_shows_losses_like_wins(results, capsys):
    assert plot.main([str(results), "--table"]) == 0
    text = capsys.readouterr().out
    assert "**float32, 1 thread, unstructured**" in text and "**float32, 1 thread, 2:4**" in text
    assert "| layer | best dense | 50 % | 70 % | 90 % |" in text
    assert "| a | 2.10 ms, F.linear | 1.50x | 2.10x | 2.70x |" in text
    assert "| b | 840 µs, F.linear | 0.60x | 0.84x | 1.08x |" in text
    assert "(2 of 7 cells)" in text and "a CPU, avx2, torch 2.13.0, 2026-01-02, commit abc" in text


def test_the_table_is_written_between_the_markers(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    assert plot.main([str(results), "--update", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{START}\n**float32") and "old" not in text
    assert text.endswith(f"{END}\nafter\n")


@pytest.mark.parametrize("text", ["", START, f"{END} {START}", START * 2])
def test_a_readme_without_markers_stays_as_it_is(results, tmp_path, capsys, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert plot.main([str(results), "--update", str(readme)]) == 2
    assert f"plot: expected one {START} before one {END}" in capsys.readouterr().err
    assert readme.read_text() == text


@pytest.mark.parametrize("form", ["png", "svg"])
def test_figures_are_drawn(results, tmp_path, form):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "figures"
    assert plot.main([str(results), "--out", str(folder), "--format", form]) == 0
    names = {path.name for path in folder.iterdir()}
    wanted = ("summary-unstructured", "limit-summary-unstructured", "summary-24",
              "tails-unstructured", "crossover")  # fmt: skip
    assert names == {f"{name}-float32-1t.{form}" for name in wanted}
    assert all(path.stat().st_size > 1000 for path in folder.iterdir())


def test_crossover_is_interpolated_between_loss_and_win():
    def at(*gains):
        return figures.crossover([_point(sparsity=s, gain=g) for s, g in gains])

    assert at((0.5, 0.5), (0.7, 2.0)) == pytest.approx(0.6)
    assert at((0.5, 1.1), (0.7, 2.0)) == float("-inf")
    assert at((0.5, 0.5), (0.7, 0.9)) == float("inf")
    assert at((0.5, 1.5), (0.7, 0.5), (0.9, 2.0)) == pytest.approx(0.8)


def test_the_limit_that_binds_is_drawn():
    point = {"percent_memory_bandwidth": 80.0, "percent_l1_limit": 9.0}
    assert figures.percent_of_limit({**point, "tokens": 1}) == 80.0
    assert figures.percent_of_limit({**point, "tokens": 2}) == 9.0
    known = [_point(sparsity=s) for s in (0.5, 0.9)]
    figure = figures.limit_figure([*known, {**_point("b"), "percent_l1_limit": None}])
    lines = figure.axes[0].get_lines()
    assert lines[0].get_label() == "a" and list(lines[0].get_ydata()) == [40, 40]
    assert len(lines) == 2  # and the limit itself


def test_a_torn_line_is_skipped_and_the_later_of_two_points_counts(tmp_path):
    path = _write(tmp_path / "r.jsonl", _header(), _point(gain=1.5), _point(gain=2.5))
    path.write_text(path.read_text() + '{"type": "poi')
    writer = run.Writer(path)
    writer.write(_point(case="b"))
    with pytest.warns(UserWarning, match=r"plot: skipped .*r.jsonl, line 4: not JSON"):
        _, points = plot.read_results([path])
    assert [(p["case"], p["speedup"]["median"]) for p in points] == [("a", 2.5), ("b", 1.5)]


def test_results_that_cannot_be_used_are_refused(tmp_path, capsys):
    def refused(message, *files, arguments=("--table",)):
        paths = [str(_write(tmp_path / f"{i}.jsonl", *f)) for i, f in enumerate(files)]
        assert plot.main([*paths, *arguments]) == 2
        assert message in capsys.readouterr().err

    refused("plot: expected results with at least one point, got none", [_header()])
    refused("plot: expected a header first in", [_point()])
    refused("plot: expected results of one CPU, got X, Y",
            [_header("X"), _point()], [_header("Y"), _point()])  # fmt: skip
    refused("plot: expected points of suite 'decode', got suites summary",
            [_header(), _point()], arguments=("--table", "--suite", "decode"))  # fmt: skip
    assert plot.main([str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capsys.readouterr().err

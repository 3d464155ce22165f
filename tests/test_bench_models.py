"""Whole models: sides, resume, table. Tiny models, and mostly no real torch.compile."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import contestants
import models
import peaks
import plot
import run
import tables
import zoo
from peers import install

START, END = plot.markers(plot.MODELS)


def tiny_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 8),
    )  # fmt: skip


def tiny_text():
    return nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


class Tiny(zoo.Model):
    """Images of 8 x 8 instead of 224 x 224."""

    def inputs(self, batch):
        return torch.randn(batch, 3, 8, 8) if self.tokens is None else super().inputs(batch)


TINY = {"cnn": Tiny(tiny_cnn), "text": Tiny(tiny_text, 7, 50)}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Tiny models, no peaks, no engines, no compiler."""
    monkeypatch.setattr(models, "MODELS", TINY)
    monkeypatch.setattr(peaks, "measure", lambda threads: {"unavailable": "not asked"})
    monkeypatch.setattr(install, "FOLDER", tmp_path)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)


def bench(out, *arguments):
    status = models.main(["--budget", "0.001", "--out", str(out), *arguments])
    return status, [json.loads(line) for line in out.read_text().splitlines()]


def test_every_model_of_the_zoo_gives_one_tensor_and_is_pruned():
    pytest.importorskip("transformers")
    model = zoo.MODELS["mobilenetv2"]
    pruned, again = model.load(0.9), model.load(0.9)
    weights = dict(pruned.named_parameters())
    assert all(torch.equal(w, weights[name]) for name, w in again.named_parameters())
    zeros = {name: float((w == 0).float().mean()) for name, w in weights.items() if w.dim() == 4}
    left = [n for n, share in zeros.items() if share < 0.5]
    assert left and all("first_conv" in n or "conv_3x3" in n for n in left)
    with torch.inference_mode():
        assert pruned(model.inputs(2)).shape == (2, 1000)


def test_a_run_writes_points_and_prints_the_table(tiny, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    status, (header, *points) = bench(out, "--sparsity", "0.9", "--batch", "1", "2", "--peers")
    assert status == 0 and header["type"] == "header" and len(points) == 4
    assert [p["case"] for p in points] == ["cnn b1", "cnn b2", "text b1", "text b2"]
    cnn, text = points[0], points[2]
    assert "eager folded channels_last" in cnn["sides"]
    assert "eager folded channels_last" not in text["sides"]
    assert set(contestants.IN_PARTS) <= set(points[1]["sides"])
    assert not set(contestants.IN_PARTS) & (set(cnn["sides"]) | set(points[3]["sides"]))
    assert list(cnn["sides"])[-2:] == [contestants.COMPILED, "sparsekern"]
    # The made-up compiler knows no options, but each engine says how to get it.
    assert (
        cnn["left_out"]["deepsparse"] == "not installed: python bench/peers/install.py deepsparse"
    )
    assert "onnxruntime dense" in cnn["left_out"] and "sparseprop" not in cnn["left_out"]
    assert "layers" in cnn["layers"] and 0.5 < cnn["zeros"] / cnn["parameters"] < 0.95
    for role, best in (("dense", "best_dense"), ("ours", "best_ours")):
        times = {n: s["median_ms"] for n, s in cnn["sides"].items() if s["role"] == role}
        assert cnn[best] == min(times, key=times.get)
    assert "| cnn b1 | 90 % |" in capsys.readouterr().out


def test_a_run_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    arguments = ["--sparsity", "0.9", "--batch", "1"]
    bench(out, "--model", "text", *arguments)
    with open(out, "a") as file:
        file.write('{"torn')
    bench_again = [json.loads(line) for line in _whole_lines(out, arguments)]
    assert [r["case"] for r in bench_again if r["type"] == "point"] == ["text b1", "cnn b1"]
    size = out.stat().st_size
    with pytest.warns(UserWarning, match="not JSON"):
        assert models.main([*arguments, "--out", str(out)]) == 0
    assert out.stat().st_size == size  # nothing left to do
    monkeypatch.setattr(run, "commit", lambda: "another")
    _whole_lines(out, [*arguments, "--model", "text"])
    assert out.stat().st_size > size  # other code: measured again


def _whole_lines(out, arguments):
    with pytest.warns(UserWarning, match="not JSON"):
        assert models.main(["--budget", "0.001", "--out", str(out), *arguments]) == 0
    return [line for line in out.read_text().splitlines() if line != '{"torn']


def test_no_point_starts_after_the_time_is_up(tiny, tmp_path, capsys):
    status, lines = bench(tmp_path / "o.jsonl", "--sparsity", "0.9", "--minutes", "1e-9")
    assert status == 2 and len(lines) == 1
    assert "time is up, 4 points left: run again with --out" in capsys.readouterr().err


def test_a_model_that_needs_a_package_is_left_out(tiny, tmp_path, monkeypatch, capsys):
    def absent():
        raise ImportError("No module named 'elsewhere'")

    monkeypatch.setitem(TINY, "cnn", Tiny(absent))
    status, lines = bench(tmp_path / "o.jsonl", "--sparsity", "0.9", "--batch", "1")
    assert status == 1 and [r["case"] for r in lines[1:]] == ["text b1"]
    assert "cnn left out: No module named 'elsewhere'" in capsys.readouterr().err


def test_a_side_that_fails_or_is_wrong_is_left_out_but_ours_stops_the_run(tiny, monkeypatch):
    def broken(contest):
        raise RuntimeError("no compiler\nand a long tail")

    makers = {"eager": contestants.eager, "broken": broken, "wrong": lambda c: lambda: c.x + 1}
    monkeypatch.setattr(contestants, "DENSE", makers)
    contest, said = contestants.Contest(TINY["text"], 0.9, 1), []
    with ExitStack() as stack, torch.no_grad():
        found, left_out = contestants.sides(contest, [], stack, said.append)
    assert [side.name for side in found] == ["eager", contestants.COMPILED, "sparsekern"]
    assert left_out["broken"] == "no compiler" and said == [
        *makers,
        "sparsekern",
        contestants.COMPILED,
    ]
    assert left_out["wrong"].startswith(
        "bench: expected wrong to be right to 0.001, got a relative"
    )
    monkeypatch.setattr(contestants, "converted", lambda c: lambda x: torch.zeros(1, 7, 16))
    with ExitStack() as stack, torch.no_grad(), pytest.raises(RuntimeError, match="expected spars"):
        contestants.sides(contest, [], stack, said.append)
    monkeypatch.setattr(contestants, "DENSE", {"broken": broken})
    with ExitStack() as stack, torch.no_grad():
        with pytest.raises(RuntimeError, match=r"bench: expected a dense side, got \{'broken'"):
            contestants.sides(contest, [], stack, said.append)


@pytest.mark.slow
def test_the_two_compiled_sides_share_no_code():
    """Else the frozen side would be the other one under a new name."""
    contest = contestants.Contest(Tiny(lambda: nn.Sequential(nn.Linear(8, 8)), 5, 9), 0.0, 1)
    contest.x = torch.randn(5, 8)
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        a, b = contestants.compiled(contest)(), contestants.frozen(contest)()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 2
    torch.testing.assert_close(a, b)
    torch.compiler.reset()


def test_without_the_onnx_package_the_export_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "FOLDER", tmp_path)
    before = list(sys.path)
    with pytest.raises(contestants.PeerError, match=r"onnx not installed: python bench/peers/inst"):
        contestants.export(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "m.onnx")
    assert sys.path == before


def _point(case="bert b1", gain=2.0, **others):
    sides = {
        "eager": {"role": "dense", "median_ms": 9.0},
        "torch.compile": {"role": "dense", "median_ms": 8.0},
        "deepsparse": {"role": "peer", "median_ms": 5.0},
        "sparsekern": {"role": "ours", "median_ms": 4.5},
        "sparsekern + torch.compile": {"role": "ours", "median_ms": 4.0},
    }
    return {
        "type": "point", "suite": "models", "kind": "model", "case": case, "sparsity": 0.9,
        "pattern": "unstructured", "dtype": "float32", "threads": 1, "sides": sides,
        "left_out": {}, "best_dense": "torch.compile", "best_ours": "sparsekern + torch.compile",
        "speedup": {"median": gain, "p10": 0.9 * gain, "p90": 1.1 * gain}, **others,
    }  # fmt: skip


HEADER = {
    "type": "header", "date": "2026-01-02T03:04:05", "commit": "abc", "isa": "avx2",
    "hardware": {"cpu": "a CPU", "torch": "2.13.0"},
}  # fmt: skip


def test_the_table_of_models_shows_every_engine_and_losses():
    lost = _point("llama b8", 0.5, left_out={"deepsparse": "died"})
    lost["sides"] = {k: v for k, v in lost["sides"].items() if k != "deepsparse"}
    text = tables.models_markdown(HEADER, [_point(), lost])
    assert "**whole models, float32, 1 thread**" in text
    assert (
        "| bert b1 | 90 % | 8.00 ms, torch.compile | 4.00 ms + torch.compile "
        "| 2.00x, 1.80 to 2.20 | 5.00 ms |"
    ) in text
    assert "| 0.50x, 0.45 to 0.55 | \u2013 |" in text and "(1 of 2 rows)" in text
    assert "Not measured: llama b8: deepsparse." in text and "a CPU, avx2, torch 2.13.0" in text
    with pytest.raises(
        tables.ResultsError, match="plot: expected points of whole models, got none"
    ):
        tables.models_markdown(HEADER, [])


def test_the_table_of_models_has_a_region_of_its_own(tmp_path, capsys):
    results = tmp_path / "models.jsonl"
    results.write_text(json.dumps(HEADER) + "\n" + json.dumps(_point()) + "\n")
    readme = tmp_path / "README.md"
    layers = "".join(plot.markers(plot.LAYERS))
    readme.write_text(f"{layers}\n{START}\nwas here\n{END}\n")
    assert plot.main([str(results), "--update", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"{layers}\n{START}\n**whole models") and "was here" not in text
    assert plot.main([str(results), "--table"]) == 0 and "| bert b1 |" in capsys.readouterr().out
    assert plot.main([str(results), "--out", str(tmp_path / "figures")]) == 0
    assert not list((tmp_path / "figures").iterdir())  # a table, no figures


def test_the_readme_has_both_regions():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    for region in (plot.LAYERS, plot.MODELS):
        assert [text.count(marker) for marker in plot.markers(region)] == [1, 1]

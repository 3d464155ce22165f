"""The check on random models: what it draws, and one of each kind end to end."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from convert_common import forced

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import never_slower


def test_draws_are_models_of_every_kind_that_run():
    kinds = set()
    for seed in range(12):
        what, model, x = never_slower.draw(random.Random(seed))
        kinds.add(what["kind"])
        assert not model.training and list(x.shape) == what["input"]
        if x.numel() < 10_000:
            with torch.no_grad():
                assert model(x).isfinite().all()
    assert kinds == {"mlp", "conv", "transformer"}


def test_a_run_writes_ratios_and_the_worst(monkeypatch, tmp_path):
    forced(monkeypatch)
    out = tmp_path / "out.jsonl"
    small = iter([s for s in range(100) if never_slower.draw(random.Random(s))[2].numel() < 1000])
    draw = never_slower.draw
    monkeypatch.setattr(never_slower, "draw", lambda rng: draw(random.Random(next(small))))
    arguments = ["", "--models", "2", "--budget", "0.001", "--out", str(out), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit):
        never_slower.main()
    torch.set_num_threads(threads)
    head, *rows, last = (json.loads(line) for line in out.read_text().splitlines())
    assert head["goal"] == 0.95 and len(rows) == 2
    assert set(last["worst"]) <= {"inference_mode", "no_grad", "gradients"}
    assert all(row["sparse_layers"] == 0 or min(row["ratios"].values()) > 0 for row in rows)

"""The tuning cache of convert_to_sparse: used, merged, and never trusted."""

import json
import warnings

import pytest
import torch
from convert_common import forced, wide

import sparsekern as sk
from sparsekern import choose, convert, tuning_cache


def test_cache_is_used_and_merged(monkeypatch):
    calls = []
    monkeypatch.setattr(choose, "time_layer", lambda *a: calls.append(1) or (2.0, 1.0))
    monkeypatch.setattr(convert, "time_model", lambda *a: (2.0, 1.0, 2.0))
    x = torch.randn(4, 512)
    sk.convert_to_sparse(wide(), x)
    assert len(calls) == 2
    sk.convert_to_sparse(wide(), x)
    assert len(calls) == 2
    sk.convert_to_sparse(wide(), x, cache=False)
    assert len(calls) == 4
    path = tuning_cache.cache_folder() / "tuning.json"
    (entries,) = json.loads(path.read_text())["devices"].values()
    assert len(entries) == 2


@pytest.mark.parametrize("text", ["not json", '{"version": 2}', '{"version": 2, "devices": [1]}',
                                  '{"version": 2, "devices": {"a": {"b": [1, -1]}}}'])  # fmt: skip
def test_corrupt_cache_is_ignored_with_a_warning(monkeypatch, text):
    forced(monkeypatch)
    tuning_cache.cache_folder().mkdir(parents=True)
    path = tuning_cache.cache_folder() / "tuning.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="ignoring the tuning cache .*tuning.json"):
        sk.convert_to_sparse(wide(), torch.randn(4, 512))
    assert json.loads(path.read_text())["version"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.convert_to_sparse(wide(), torch.randn(4, 512))


def test_cache_of_another_version_is_left_out(monkeypatch):
    forced(monkeypatch)
    tuning_cache.cache_folder().mkdir(parents=True)
    (tuning_cache.cache_folder() / "tuning.json").write_text('{"version": 99, "devices": 5}')
    assert sk.report(sk.convert_to_sparse(wide(), torch.randn(4, 512))).n_sparse == 2


def test_cache_that_cannot_be_written(monkeypatch):
    forced(monkeypatch)
    tuning_cache.cache_folder().parent.mkdir(parents=True, exist_ok=True)
    tuning_cache.cache_folder().write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="tuning results were not kept, cannot write"):
        model = sk.convert_to_sparse(wide(), torch.randn(4, 512))
    assert sk.report(model).n_sparse == 2

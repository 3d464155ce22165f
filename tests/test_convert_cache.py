"""The tuning cache of convert_to_sparse: used, merged, and never trusted."""

import json
import os
import threading
import warnings

import pytest
import torch
from convert_common import forced, wide

import sparsekern as sk
from sparsekern import choose, convert, tune, tuning_cache


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


def times(text):
    return '{"version": 2, "devices": {"a": {"b": ' + text + "}}}"


@pytest.mark.parametrize(
    "text",
    [
        times("[NaN, 1]"), times("[Infinity, 1]"), times("[true, 1]"), times('"ab"'),
        times("[1, 2, 3]"), times("[1" + "0" * 400 + ", 1]"), times("[1" + "0" * 5000 + ", 1]"),
        times("{}"), times("[[1], 1]"), times("null"), "[" * 100_000, "{}", "[]", "5", "null", "",
        '{"version": 2, "devices": {"a": 3}}', b"\xed\xa0\x80", b"\xff\x00",
    ],
)  # fmt: skip
def test_hostile_files_are_ignored_and_replaced(monkeypatch, text):
    forced(monkeypatch)
    path = tuning_cache.cache_folder() / "tuning.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match="ignoring the tuning cache") as seen:
        sk.convert_to_sparse(wide(), torch.randn(4, 512))
    assert all(len(str(w.message)) < 500 for w in seen)
    assert len(json.loads(path.read_text())["devices"]) == 1


def test_a_huge_file_is_not_read(monkeypatch):
    forced(monkeypatch)
    monkeypatch.setattr(tuning_cache, "MAX_BYTES", 100)
    path = tuning_cache.cache_folder() / "tuning.json"
    path.parent.mkdir(parents=True)
    path.write_text(" " * 101)
    with pytest.warns(UserWarning, match="101 bytes, more than 100"):
        sk.convert_to_sparse(wide(), torch.randn(4, 512))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir] if hasattr(os, "mkfifo") else [os.mkdir])
def test_what_is_no_file_is_left_alone(monkeypatch, make):
    """Nobody waits for a writer of a pipe."""
    forced(monkeypatch)
    path = tuning_cache.cache_folder() / "tuning.json"
    path.parent.mkdir(parents=True)
    make(path)
    with pytest.warns(UserWarning, match="no regular file"):
        sk.convert_to_sparse(wide(), torch.randn(4, 512))
    assert not path.is_file() and os.listdir(path.parent) == ["tuning.json"]


def test_without_a_home_there_is_no_cache(monkeypatch, tmp_path):
    """As in a container whose user has no entry in the system; a relative folder is none."""
    forced(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tuning_cache.cache_folder() is None
            assert sk.report(sk.convert_to_sparse(wide(), torch.randn(4, 512))).n_sparse == 2
    assert os.listdir(tmp_path) == []


def test_without_the_cache_no_path_is_asked_for(monkeypatch):
    forced(monkeypatch)

    def refuse(*a, **k):
        raise AssertionError("the folder was asked for")

    monkeypatch.setattr(tuning_cache, "cache_folder", refuse)
    monkeypatch.setattr(convert, "device_key", refuse)
    sk.convert_to_sparse(wide(), torch.randn(4, 512), cache=False)
    sk.convert_to_sparse(wide())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(monkeypatch, error):
    forced(monkeypatch)

    def full(*a):
        raise error

    monkeypatch.setattr(os, "replace", full)
    folder = tuning_cache.cache_folder()
    if isinstance(error, OSError):
        with pytest.warns(UserWarning, match="not kept, .*No space left"):
            sk.convert_to_sparse(wide(), torch.randn(4, 512))
    else:
        with pytest.raises(KeyboardInterrupt):
            sk.convert_to_sparse(wide(), torch.randn(4, 512))
    assert os.listdir(folder) == []


def test_leftovers_of_killed_writers_go(monkeypatch):
    forced(monkeypatch)
    folder = tuning_cache.cache_folder()
    folder.mkdir(parents=True)
    (folder / "tuning-killed.tmp").write_text("half")
    (folder / "other.tmp").write_text("not ours")
    sk.convert_to_sparse(wide(), torch.randn(4, 512))
    assert sorted(os.listdir(folder)) == ["other.tmp", "tuning.json"]


def test_writers_at_once_lose_nothing():
    caches = [tuning_cache.TuningCache("device") for _ in range(20)]

    def write(index):
        caches[index].put(f"layer {index}", 1.0, 2.0)
        caches[index].save()

    threads = [threading.Thread(target=write, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tuning_cache.TuningCache("device").entries) == 20
    assert os.listdir(tuning_cache.cache_folder()) == ["tuning.json"]


def test_a_lock_that_somebody_keeps_stops_nobody(monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(tuning_cache, "LOCK_WAIT_S", 0.05)
    folder = tuning_cache.cache_folder()
    folder.mkdir(parents=True)
    (folder / "tuning-other.tmp").write_text("being written")
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        cache = tuning_cache.TuningCache("device")
        cache.put("layer", 1.0, 2.0)
        cache.save()
    finally:
        os.close(handle)
    assert sorted(os.listdir(folder)) == ["tuning-other.tmp", "tuning.json"]


def test_a_folder_that_cannot_be_written(monkeypatch):
    """Root may write anywhere, so the system's answer is given by hand."""

    def refuse(*a, **k):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tuning_cache.tempfile, "mkstemp", refuse)
    cache = tuning_cache.TuningCache("device")
    cache.put("layer", 1.0, 2.0)
    with pytest.warns(UserWarning, match="not kept, cannot write .*Permission denied"):
        cache.save()


def test_timings_of_frozen_layers_and_under_autocast_are_kept_apart():
    layer = sk.SparseLinear.from_dense(wide()[0])
    keys = [tune.layer_key(layer, tune.InputSpec((4, 64), torch.float32), "no_grad")]
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(tune.layer_key(layer, tune.InputSpec((4, 64), torch.float32), "no_grad"))
    layer.weight.values.requires_grad_(False)
    keys.append(tune.layer_key(layer, tune.InputSpec((4, 64), torch.float32), "no_grad"))
    assert len(set(keys)) == 3


@pytest.mark.parametrize("name", ["min_gain", "budget_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "1", None])
def test_what_is_no_gain_and_no_time_is_refused(name, value):
    with pytest.raises(ValueError, match=f"convert_to_sparse: expected {name} > 0"):
        sk.convert_to_sparse(wide(), torch.randn(2, 64), cache=False, **{name: value})


def test_a_layer_that_loses_is_not_called_faster(monkeypatch):
    forced(monkeypatch)
    monkeypatch.setattr(choose, "time_layer", lambda *a: (1.0, 2.0))
    model = wide()
    size = next(model.parameters()).shape[1]
    converted = sk.convert_to_sparse(model, torch.randn(2, size), cache=False, min_gain=0.1)
    reasons = [row.reason for row in sk.report(converted).layers if row.format != "dense"]
    assert reasons and all("slower, which min_gain=0.1 allows: 0.50x" in why for why in reasons)

"""load refuses damaged and hostile files, and then changes nothing."""

import copy
import json
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparsekern.nn import SparseLinear
from sparsekern.storage import load, save
from sparsekern.storage_codec import check_header, decode, encode


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


def hostile(tmp_path, change, sparsity=0.97) -> Path:
    """A file of SparseLinear(200, 20) after `change(tensors, header)`."""
    path = tmp_path / "hostile"
    torch.manual_seed(0)
    save(SparseLinear(200, 20, sparsity=sparsity), path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sparsekern"])
    tensors = load_file(path)
    text = change(tensors, header)
    save_file(tensors, path, metadata={"sparsekern": text or json.dumps(header)})
    return path


def put(where, key, value):
    def change(tensors, header):
        place = {"t": tensors, "h": header, "l": header["layers"].get("weight")}[where]
        place[key] = value(place.get(key)) if callable(value) else value

    return change


def changed(at, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[at] = value
        return tensor

    return change


HOSTILE = {
    "header no JSON": (lambda t, h: "{", "header is no JSON"),
    "header too deep": (lambda t, h: "[" * 100_000, "header is no JSON"),
    "header a list": (lambda t, h: "[1]", "has no version"),
    "future version": (put("h", "version", 3), "expected format version 1 or 2, got 3"),
    "layers a list": (put("h", "layers", []), "no layers or aliases"),
    "alias to nowhere": (put("h", "aliases", {"x": "y"}), "alias 'x' refers to 'y'"),
    "alias of a stored name": (put("h", "aliases", {"bias": "weight"}), "alias 'bias'"),
    "alias to a list": (put("h", "aliases", {"x": []}), "alias 'x' refers to"),
    "description a number": (lambda t, h: h["layers"].update(weight=3), "got 3"),
    "unknown encoding": (put("l", "encoding", "zip"), "nm_float8, nm_float8_dynamic, got 'zip'"),
    "encoding a list": (put("l", "encoding", []), "encoding one of csr, block, nm, mask"),
    "unknown pattern": (put("l", "pattern", "spiral"), "expected a pattern"),
    "pattern a number": (put("l", "pattern", 4), "pattern as a string"),
    "negative shape": (put("l", "shape", [-20, 200]), "shape of 2 or 4 sizes"),
    "shape of three": (put("l", "shape", [20, 200, 1]), "shape of 2 or 4 sizes"),
    "shape too large": (put("l", "shape", [20, 2**40]), "sizes below"),
    "more rows than crow": (put("l", "shape", [21, 200]), r"size mismatch for weight: \(21, 200\)"),
    "no such part": (put("l", "encoding", "mask"), "it lacks weight.mask"),
    "dense too": (put("t", "weight", torch.zeros(20, 200)), "there twice"),
    "values integer": (put("t", "weight.values", lambda v: v.int()), "floating point"),
    "too few values": (put("t", "weight.values", lambda v: v[1:].clone()), "like values"),
    "col too wide": (put("t", "weight.col", lambda c: c.int()), "col of dtype torch.uint8"),
    "col out of range": (put("t", "weight.col", changed(3, 200)), r"columns in \[0, 200\)"),
    "col repeated": (put("t", "weight.col", lambda c: c * 0), "rise strictly"),
    "crow int64": (put("t", "weight.crow", lambda c: c.long()), "crow int32"),
    "crow negative": (put("t", "weight.crow", changed(0, -1)), "crow from 0"),
    "crow falls": (put("t", "weight.crow", changed(3, 119)), "never falls"),
    "crow past the end": (put("t", "weight.crow", changed(20, 999)), "crow from 0"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_and_changes_nothing(tmp_path, case):
    change, message = HOSTILE[case]
    path = hostile(tmp_path, change)
    for model in (SparseLinear(200, 20, sparsity=0.9), nn.Linear(200, 20)):
        before = copy.deepcopy(model)
        with pytest.raises((ValueError, RuntimeError), match=message) as error:
            load(model, path, strict=False)
        assert str(path) in str(error.value)
        assert same_state(model, before)


MASKS = {
    "too short": (lambda m: m[1:].clone(), "expected mask"),
    "of another dtype": (lambda m: m.int(), "expected mask"),
    "with another count": (lambda m: m | 1, "nnz|like values"),
}


@pytest.mark.parametrize("case", MASKS)
def test_hostile_mask(tmp_path, case):
    change, message = MASKS[case]
    path = hostile(tmp_path, put("t", "weight.mask", change), sparsity=0.5)
    with pytest.raises(ValueError, match=message):
        load(nn.Linear(200, 20), path)


def test_mask_with_padding_bits(tmp_path):
    model = SparseLinear(3, 3, sparsity=0.5)
    save(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m")
    with safe_open(tmp_path / "m", framework="pt") as file:
        metadata = file.metadata()
    tensors["weight.mask"][1] |= 128
    save_file(tensors, tmp_path / "m", metadata=metadata)
    with pytest.raises(ValueError, match="padding bits of mask to be 0"):
        load(model, tmp_path / "m")


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255))))
def test_damaged_bytes_never_crash_or_half_load(cut, flips):
    torch.manual_seed(0)
    model = SparseLinear(200, 20, sparsity=0.97)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        save(model, path)
        data = bytearray(path.read_bytes())
        data = data[: int(len(data) * cut)] if not flips else data
        for where, bits in flips:
            data[min(int(where * len(data)), len(data) - 1)] ^= bits
        path.write_bytes(data)
        fresh = SparseLinear(200, 20, sparsity=0.5)
        before = copy.deepcopy(fresh)
        try:
            load(fresh, path)
        except (ValueError, RuntimeError):
            assert same_state(fresh, before)


def test_not_a_safetensors_file(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(pickle.dumps({"weight": [1, 2]}))
    with pytest.raises(ValueError, match=r"no valid safetensors file"):
        load(nn.Linear(2, 2), path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no valid safetensors file"):
        load(nn.Linear(2, 2), path)


@pytest.mark.parametrize(
    ("pattern", "part", "change", "message"),
    [
        ("2:4", "index", lambda t: t * 0, "positions that rise inside each group"),
        ("2:4", "index", lambda t: t.int(), "in uint8, got torch.int32"),
        ("2:4", "values", lambda t: t[:, 1:].clone(), "in floating point"),
        ("block:4x4", "block_col", lambda t: t + 9, "BlockWeight: expected columns in"),
        ("block:4x4", "block_crow", lambda t: t[1:].clone(), "crow of"),
        ("block:4x4", "values", lambda t: t[:, 0].clone(), "values .n_blocks, R, C."),
    ],
)
def test_hostile_parts_of_block_and_nm(pattern, part, change, message):
    sparsity = None if pattern == "2:4" else 0.5
    layer = SparseLinear(16, 12, pattern=pattern, sparsity=sparsity)
    header, parts = encode(layer.weight)
    assert torch.equal(decode(header, parts).to_dense(), layer.weight.to_dense())
    with pytest.raises(ValueError, match=message):
        decode(header, {**parts, part: change(parts[part])})


def test_nm_encoding_needs_an_nm_pattern():
    header, _ = encode(SparseLinear(16, 12, pattern="2:4").weight)
    with pytest.raises(ValueError, match="an N:M pattern with encoding nm, got 'unstructured'"):
        check_header({**header, "pattern": "unstructured"})


def test_a_block_larger_than_the_layer(tmp_path):
    model = SparseLinear(64, 64, sparsity=0.5, pattern="block:4x4")
    path, before, x = tmp_path / "m", copy.deepcopy(model), torch.randn(40, 64)
    header = {"shape": [64, 64], "pattern": "block:4x4", "encoding": "block"}
    tensors = {
        "bias": torch.zeros(64),
        "weight.values": torch.empty(0, 2**58, 1),
        "weight.block_crow": torch.zeros(2, dtype=torch.int32),
        "weight.block_col": torch.zeros(0, dtype=torch.int32),
    }
    text = json.dumps({"version": 2, "layers": {"weight": header}, "aliases": {}})
    save_file(tensors, path, metadata={"sparsekern": text})
    with pytest.raises(
        ValueError, match=r"load: .*/m is damaged: layer 'weight': .*R in \[1, 64\]"
    ):
        load(model, path)
    assert same_state(model, before) and torch.equal(model(x), before(x))


def test_a_header_out_of_proportion(tmp_path):
    text = json.dumps({"version": 2, "layers": {}, "aliases": {}, "folded": ["x"] * 300_000})
    save_file({"bias": torch.zeros(2)}, tmp_path / "m", metadata={"sparsekern": text})
    with pytest.raises(ValueError, match=r"header has \d+ bytes, more than"):
        load(nn.Linear(2, 2), tmp_path / "m")


def test_complex_values_do_not_lose_their_imaginary_parts(tmp_path):
    save_file({"weight": torch.ones(2, 2, dtype=torch.complex64)}, tmp_path / "m")
    model = nn.Linear(2, 2, bias=False)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"load: .*/m: expected 'weight' .* got torch.complex64"):
        load(model, tmp_path / "m")
    assert same_state(model, before)

"""load_state_dict of sparse layers: all of a layer or nothing, and errors that say what to do."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import sparsekern as sk


def layer(pattern="unstructured") -> sk.SparseLinear:
    torch.manual_seed(0)
    sparsity = None if pattern == "2:4" else 0.5
    return sk.SparseLinear(64, 64, sparsity=sparsity, pattern=pattern)


def refused(module, state, match, **options):
    before, x = copy.deepcopy(module.state_dict()), torch.randn(40, 64)
    want = module(x)
    with pytest.raises(RuntimeError, match=match):
        module.load_state_dict(state, **options)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert torch.equal(module(x), want)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
def test_an_incomplete_weight_copies_nothing(pattern, strict):
    module = layer(pattern)
    for part in module.weight.parts:
        state = {"bias": torch.ones(64), **{f"weight.{part}": getattr(module.weight, part) * 0 + 7}}
        refused(module, state, "weight: expected all of values, .*, got no", strict=strict)


BOMB = torch.zeros(1).expand(2**40)
BAD = {
    "huge block": ("block:4x4", "values", torch.empty(0, 2**58, 1), r"R in \[1, 64\]"),
    "too many values": ("unstructured", "values", BOMB, "like values|at most"),
    "imaginary": ("unstructured", "values", torch.zeros(2048, dtype=torch.complex64), "floating"),
    "no tensor": ("unstructured", "values", [1.0], "values to be a dense tensor, got list"),
    "sparse": ("unstructured", "values", torch.ones(4).to_sparse(), "got torch.sparse_coo"),
    "on meta": ("unstructured", "col", torch.empty(4, dtype=torch.int32, device="meta"), "device"),
    "int index": ("2:4", "index", torch.zeros(64, 8, dtype=torch.int32), "uint8"),
}


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_part_changes_nothing(case, assign):
    pattern, part, bad, match = BAD[case]
    module = layer(pattern)
    state = {**module.state_dict(), f"weight.{part}": bad, "bias": torch.ones(64)}
    refused(module, state, f"weight: .*{match}|{match}", assign=assign)


def test_a_bad_bias_leaves_the_weight():
    module = layer()
    state = {**layer().state_dict(), "bias": torch.ones(3)}
    state["weight.values"] = state["weight.values"] * 2
    refused(module, state, "size mismatch for bias")


def test_a_plan_that_cannot_be_made_changes_nothing():
    module = sk.SparseConv2d(16, 4, (70, 70), pattern="2:4")
    x = torch.randn(1, 16, 71, 71)
    before, want = copy.deepcopy(module.state_dict()), module(x)
    evil = {"values": torch.ones(4, 4900), "index": torch.zeros(4, 2450, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="nm_plan: expected at most 65535"):
        module.weight.with_parts(evil, "1:16")
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert module.weight.pattern == "2:4" and torch.equal(module(x), want)


def test_errors_between_dense_and_sparse_say_what_to_do():
    sparse, dense = nn.Sequential(layer()), nn.Sequential(nn.Linear(64, 64))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"0.weight: .* sk.load\(.* sk.to_dense\("):
            sparse.load_state_dict(dense.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=r"0.weight.needs_sk_load_or_sk_to_dense"):
        dense.load_state_dict(sparse.state_dict())
    keys = dense.load_state_dict(sparse.state_dict(), strict=False)
    assert "0.weight.needs_sk_load_or_sk_to_dense" in keys.unexpected_keys


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4"])
def test_load_takes_state_dicts(pattern):
    module, x = nn.Sequential(layer(pattern)), torch.randn(3, 64)
    for other in (nn.Sequential(nn.Linear(64, 64)), nn.Sequential(layer(pattern))):
        assert sk.load(other, module.state_dict()) == ([], [])
        assert torch.equal(other(x), module(x))
    plain = sk.to_dense(copy.deepcopy(module))
    with torch.no_grad():
        module[0].weight.values.zero_()
    sk.load(module, plain.state_dict())
    torch.testing.assert_close(module(x), plain(x))
    with pytest.raises(TypeError, match="expected 'epoch' of the state_dict to be a tensor"):
        sk.load(module, {"epoch": 3})
    with pytest.raises(ValueError, match=r"load: the state_dict: expected 'weight' .*complex64"):
        sk.load(nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2, dtype=torch.complex64)})


def test_blocks_of_another_size_bring_their_pattern():
    module, other = layer("block:4x4"), layer("block:8x8")
    module.load_state_dict(other.state_dict())
    assert module.pattern == "block:8x8"
    assert torch.equal(module.weight.to_dense(), other.weight.to_dense())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_state_dicts_of_torch_distributed_checkpoint(pattern, full, tmp_path):
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    model, other = (nn.Sequential(layer(pattern), nn.ReLU()) for _ in range(2))
    with torch.no_grad():
        other[0].weight.values.zero_()
    save({"model": get_model_state_dict(model, options=options)}, checkpoint_id=tmp_path)
    state = {"model": get_model_state_dict(other, options=options)}
    load(state, checkpoint_id=tmp_path)
    set_model_state_dict(other, state["model"], options=options)
    x = torch.randn(3, 64)
    assert torch.equal(other(x), model(x))


def test_data_parallel_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"CSRWeight: expected .*Parallel, got"):
        layer().weight._replicate_for_data_parallel()

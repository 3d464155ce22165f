"""Convolutions like one before go straight to the way that was chosen then."""

import gc
import sys
from types import SimpleNamespace

import pytest
import torch
from samples import csr_of, random_blocks, random_nm, random_weight
from test_conv import fold, unfold

from sparsekern.ops import (
    block_conv,
    block_cuda,
    conv,
    conv_cuda,
    csr_conv_cuda,
    csr_cuda,
    cuda_choice,
    cuda_support,
    nm_conv,
    nm_conv_cuda,
    nm_cuda,
)

ROWS, CHANNELS, KERNEL = 32, 16, (3, 3)
GEOMETRY = [[3, 3], [2, 1], [1, 1], [1, 1], 1]  # lists, as the dispatcher gives them


def case(name):
    """Module, function, values, what comes before and after the bias, and the exact function."""
    if name == "nm":
        values, index = random_nm(ROWS, CHANNELS * 9, 2, 4)
        plan = nm_cuda._plan(index, ROWS, CHANNELS, 2, 4, 1, 9)
        reference = nm_conv._conv_reference
        return nm_conv_cuda, nm_conv_cuda._conv, values, (index,), (plan, None, 2, 4), reference
    if name == "csr":
        values, crow, col = csr_of(random_weight(ROWS, CHANNELS * 9, 0.7))
        plan, reference = csr_cuda._plan(crow, col, CHANNELS * 9, 1, 9), conv._conv_reference
        return csr_conv_cuda, csr_conv_cuda._conv, values, (crow, col), (plan, None), reference
    values, crow, col = random_blocks(ROWS, CHANNELS * 9, (16, 16), 0.5)
    plan = block_cuda._plan(crow, col, ROWS, CHANNELS, 16, 16, 1, 9)
    function, reference = conv_cuda._block_conv, block_conv._conv_reference
    return conv_cuda, function, values, (crow, col), (plan, None, ROWS), reference


class Layer:
    """One weight, called as the op is; knows what is right."""

    def __init__(self, name):
        self.module, self.function, values, self.index, self.rest, self.reference = case(name)
        self.values, self.bias = values.bfloat16(), torch.randn(ROWS).bfloat16()

    def __call__(self, x, activation="none", geometry=None):
        arguments = (*self.index, self.bias, *self.rest, *(geometry or GEOMETRY), activation)
        return self.function(x, self.values, *arguments)

    def check(self, x, activation="none", geometry=None):
        x64, values, bias = (t.double() for t in (x, self.values, self.bias))
        rest = (*self.rest, *(geometry or GEOMETRY), activation)
        want = self.reference(x64, values, *self.index, bias, *rest)
        got = self(x, activation, geometry)
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=0.3)


def image(*shape):
    return torch.randn(shape or (2, CHANNELS, 7, 8)).bfloat16()


@pytest.fixture(params=["nm", "csr", "block"])
def layer(request, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(
        sys.modules, "sparsekern.ops.unfold_triton", SimpleNamespace(unfold=unfold, fold=fold)
    )
    for module in (csr_conv_cuda, nm_conv_cuda):
        monkeypatch.setattr(module, "_kernels", lambda op, x: True)
    return Layer(request.param)


@pytest.fixture(params=["dense", "library"])
def long_way(request, layer, monkeypatch):
    """How often the long way was taken; it takes a library's product where there is one."""
    calls, wanted = [], ("cusparselt", "unfolded cusparse") if request.param == "library" else ()

    def counted(key, ways, like):
        calls.append(key)
        name = next((n for n in ways if n.startswith(wanted)), "dense") if wanted else "dense"
        cuda_choice._CHOSEN[key] = name
        return ways[name]()

    monkeypatch.setattr(layer.module, "run_fastest", counted)
    return calls


def test_only_the_first_call_takes_the_long_way(layer, long_way):
    for _ in range(3):
        layer.check(image())
    assert len(long_way) == 1
    layer.check(image(1, CHANNELS, 7, 8))
    layer.check(image(), "relu")
    layer.check(image(2, CHANNELS, 8, 7))
    layer.check(image(), geometry=[[3, 3], [1, 1], [1, 1], [1, 1], 1])
    layer.check(image(), geometry=[[3, 3], [2, 1], [1, 1], [2, 1], 1])
    assert len(long_way) == 6


def test_new_contents_new_tensors_and_other_strides_are_seen(layer, long_way):
    layer.check(image())
    layer.values.mul_(-2)
    layer.check(image())
    layer.values, layer.bias = torch.randn_like(layer.values), torch.randn_like(layer.bias)
    layer.check(image())
    layer.check(torch.randn(2, CHANNELS, 7, 9).bfloat16()[..., 1:])
    assert len(long_way) == 1
    layer.check(image().contiguous(memory_format=torch.channels_last))  # may have another winner
    layer.check(image().contiguous(memory_format=torch.channels_last))
    assert len(long_way) == 2


def test_values_that_have_to_be_copied_take_the_long_way(layer, long_way):
    layer.check(image())
    shape = layer.values.shape
    layer.values = torch.randn(shape.numel() + 1).bfloat16()[1:].view(shape)
    layer.check(image())
    assert len(long_way) == 2


def test_arguments_that_differ_are_checked(layer, long_way):
    layer.check(image())
    with pytest.raises(RuntimeError, match="expected values"):
        layer(image().half())
    with pytest.raises(RuntimeError, match="x with 4 dimensions"):
        layer(image()[0])
    layer.bias = torch.randn(ROWS + 1).bfloat16()
    with pytest.raises(RuntimeError, match="bias of shape"):
        layer(image())


def test_a_way_that_fails_later_is_left(layer, long_way):
    layer.check(image())
    record = cuda_support.recall(layer.rest[0])
    (key,) = record.quick

    def broken(x, values, bias, plan):
        raise RuntimeError("out of memory")

    record.quick[key] = broken
    cuda_support._STATED.clear()
    said = r"(csr|nm|block)_conv2d was computed anew after an error: out of memory$"
    with pytest.warns(RuntimeWarning, match=said):
        layer.check(image())
    assert len(long_way) == 2 and record.quick[key] is not broken


def test_what_is_kept_goes_with_the_plan(layer, long_way):
    layer(image())
    kept = cuda_support.recall(layer.rest[0]).quick
    assert len(kept) == 1
    layer.rest = layer.index = None
    gc.collect()
    Layer("nm")(image())  # whoever comes next cleans up
    assert not kept

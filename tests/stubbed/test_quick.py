"""Calls like one before go straight to the way that was chosen then."""

import gc
import weakref

import pytest
import torch
from samples import csr_of, random_blocks, random_nm, random_weight

from sparsekern.ops import block_cuda, csr_cuda, cuda_quick, cuda_support, nm_cuda
from sparsekern.ops.block import _linear_reference as block_reference
from sparsekern.ops.csr import _linear_reference as csr_reference
from sparsekern.ops.nm import _linear_reference as nm_reference

ROWS, COLS = 48, 64


def case(name, dtype=torch.bfloat16):
    """Module, arguments of its `_linear` besides x, values and bias, values, exact result."""
    if name == "nm":
        values, index = random_nm(ROWS, COLS, 2, 4)
        plan = nm_cuda._plan(index, ROWS, COLS, 2, 4)
        return nm_cuda, values.to(dtype), (index,), (plan, None, 2, 4), nm_reference
    if name == "csr":
        values, crow, col = csr_of(random_weight(ROWS, COLS, 0.7))
        plan = csr_cuda._plan(crow, col, COLS)
        return csr_cuda, values.to(dtype), (crow, col), (plan, None), csr_reference
    values, crow, col = random_blocks(ROWS, COLS, (16, 16), 0.5)
    plan = block_cuda._plan(crow, col, ROWS, COLS, 16, 16)
    return block_cuda, values.to(dtype), (crow, col), (plan, None, ROWS), block_reference


class Layer:
    """One weight, called as the op is; knows what is right."""

    def __init__(self, name):
        self.module, self.values, self.index, self.rest, self.reference = case(name)
        self.bias = torch.randn(ROWS).bfloat16()

    def __call__(self, x, activation="none"):
        arguments = (*self.index, self.bias, *self.rest, activation)
        return self.module._linear(x, self.values, *arguments)

    def check(self, x, activation="none"):
        wide = (t.double() for t in (x, self.values, self.bias))
        x64, values, bias = wide
        want = self.reference(x64, values, *self.index, bias, *self.rest, activation)
        torch.testing.assert_close(self(x, activation).double(), want, rtol=2e-2, atol=0.2)


@pytest.fixture(params=["nm", "csr", "block"])
def layer(request):
    torch.manual_seed(0)
    return Layer(request.param)


@pytest.fixture
def long_way(layer, monkeypatch):
    """How often the long way was taken."""
    calls, run = [], layer.module.run_fastest

    def counted(key, ways, like):
        calls.append(key)
        return run(key, ways, like)

    monkeypatch.setattr(layer.module, "run_fastest", counted)
    return calls


def test_only_the_first_call_takes_the_long_way(layer, long_way):
    for _ in range(3):
        layer.check(torch.randn(3, COLS).bfloat16())
    assert len(long_way) == 1
    layer.check(torch.randn(5, COLS).bfloat16())
    layer.check(torch.randn(3, COLS).bfloat16(), "relu")
    assert len(long_way) == 3
    layer.check(torch.randn(5, 1, COLS).bfloat16())
    layer.check(torch.randn(5, 1, COLS).bfloat16())
    assert len(long_way) == 4


def test_new_contents_and_new_tensors_are_seen(layer, long_way):
    x = torch.randn(3, COLS).bfloat16()
    layer.check(x)
    layer.values.mul_(-2)
    layer.check(x)
    layer.values, layer.bias = torch.randn_like(layer.values), torch.randn_like(layer.bias)
    layer.check(x)
    assert len(long_way) == 1


def test_what_is_not_plain_takes_the_long_way(layer, long_way, monkeypatch):
    x = torch.randn(3, COLS).bfloat16()
    layer.check(x)
    strided = torch.randn(3, COLS, 2).bfloat16()[..., 0]
    layer.check(strided)
    shifted = torch.randn(3 * COLS + 1).bfloat16()[1:].view(3, COLS)
    layer.check(shifted)
    assert len(long_way) == 3
    torch.use_deterministic_algorithms(True)
    try:
        layer.check(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(long_way) == 4


def test_arguments_that_differ_are_checked(layer):
    x = torch.randn(3, COLS).bfloat16()
    layer.check(x)
    with pytest.raises(RuntimeError, match="expected values"):
        layer(x.half())
    layer.bias = torch.randn(ROWS + 1).bfloat16()
    with pytest.raises(RuntimeError, match="bias of shape"):
        layer(x)


def broken(message):
    def way(x, values, bias, plan):
        raise RuntimeError(message)

    return way


def test_a_way_that_fails_later_is_left(layer, long_way):
    x = torch.randn(3, COLS).bfloat16()
    layer.check(x)
    record = cuda_support.recall(layer.rest[0])
    (key,) = record.quick
    bad = record.quick[key] = broken("out of memory\nand more")
    cuda_support._STATED.clear()
    said = r"sparsekern: (csr|nm|block)_linear was computed anew after an error: out of memory$"
    with pytest.warns(RuntimeWarning, match=said) as warned:
        layer.check(x)
        assert len(long_way) == 2 and record.quick[key] is not bad
        record.quick[key] = bad  # once more: it is said once
        layer.check(x)
    assert len([w for w in warned if "anew" in str(w.message)]) == 1


def test_the_first_error_comes_with_that_of_the_long_way(layer, monkeypatch):
    x = torch.randn(3, COLS).bfloat16()
    layer.check(x)
    record = cuda_support.recall(layer.rest[0])
    (key,) = record.quick
    record.quick[key] = broken("an illegal memory access")
    monkeypatch.setattr(layer.module, "run_fastest", lambda *a: broken("lost")(*[None] * 4))
    with pytest.raises(RuntimeError, match=r"^lost$") as raised:
        layer(x)
    assert str(raised.value.__context__) == "an illegal memory access"
    assert raised.value.__context__.__traceback__ is not None
    assert not record.quick


def test_what_a_failed_way_has_allocated_is_let_go_before_the_next(layer, monkeypatch):
    x = torch.randn(3, COLS).bfloat16()
    layer.check(x)
    record = cuda_support.recall(layer.rest[0])
    (key,) = record.quick
    seen = []

    def way(x, values, bias, plan):
        large = torch.empty(1000)
        seen.append(weakref.ref(large))
        raise RuntimeError("out of memory")

    run = layer.module.run_fastest

    def after(*arguments):
        assert seen[0]() is None
        return run(*arguments)

    record.quick[key] = way
    monkeypatch.setattr(layer.module, "run_fastest", after)
    layer.check(x)


def test_calls_are_bounded_and_go_with_the_plan(layer, monkeypatch):
    monkeypatch.setattr(cuda_quick, "MAX_CALLS", 2)
    for tokens in (1, 2, 3):
        layer(torch.randn(tokens, COLS).bfloat16())
    record = cuda_support.recall(layer.rest[0])
    assert len(record.quick) == 1
    kept = record.quick
    layer.rest = layer.index = None
    del record
    gc.collect()
    Layer("nm")(torch.randn(1, COLS).bfloat16())  # whoever comes next cleans up
    assert not kept


def test_without_a_plan_nothing_is_kept(layer, long_way):
    layer.rest = (None, *layer.rest[1:])
    for _ in range(2):
        layer.check(torch.randn(3, COLS).bfloat16())
    assert len(long_way) == 2

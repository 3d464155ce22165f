"""Sizes up to 2^63 - 1, geometries, and tensors on several devices: right, or an error in words."""

import pytest
import torch
from fuzz.valid import OPS, schema, valid
from torch import nn

import sparsekern as sk
from sparsekern._load import _C
from sparsekern.ops._library import REFERENCES

native = pytest.mark.skipif(_C is None, reason="tests the sizes of the compiled ops")
FORMATS = {"unstructured": 0.5, "block:2x2": 0.5, "2:4": None}
formats = pytest.mark.parametrize("pattern", FORMATS)


class _First:
    """Takes the first of everything where random choices are asked for."""

    def __init__(self, place=0):
        self.place = place

    def randrange(self, n):
        self.place += 1
        return self.place % n

    def choice(self, values):
        return values[0]


def conv(pattern, **geometry):
    torch.manual_seed(0)
    options = {"padding": 1, **geometry}
    return sk.SparseConv2d(4, 4, 3, sparsity=FORMATS[pattern], pattern=pattern, **options)


@formats
@pytest.mark.parametrize("stride", [10, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strides_beyond_the_image(pattern, stride, dtype):
    layer = conv(pattern, stride=stride).to(dtype)
    x = torch.randn(2, 4, 9, 9, dtype=dtype, requires_grad=True)
    dense = layer.to_dense()
    dense.stride = (10, 10)  # the same, and torch's own gradient dies of larger ones
    y = layer(x)
    torch.testing.assert_close(y, dense(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(dense(x).sum(), x)[0]
    )


@formats
@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"padding": 2**62}, "padded input below 2|stay below 2"),
        ({"padding": 2**63 - 1}, "padded input below 2|stay below 2"),
        ({"padding": 2**31}, "padded input below 2"),
        ({"dilation": 2**62, "padding": 2**62}, "padded input below 2|stay below 2"),
        ({"dilation": 2**63 - 1}, "at least as large as the kernel|stay below 2"),
        ({"dilation": 2**40}, "at least as large as the kernel"),
        ({"stride": 2**29, "padding": 2**30 - 100}, "stay below 2|memory"),
    ],
)
@native
def test_geometries_without_a_result(pattern, geometry, message):
    layer = conv(pattern, **geometry)
    with pytest.raises(RuntimeError, match=rf"conv2d: expected .*({message}).*, got"):
        layer(torch.randn(1, 4, 9, 9))


@formats
@pytest.mark.parametrize("name", ["stride", "dilation", "padding", "kernel_size"])
@pytest.mark.parametrize("value", [[0, 1], [-1, 1], [-(2**63), 1], [1], [1, 1, 1], []])
def test_fakes_refuse_the_geometries_that_kernels_refuse(pattern, name, value):
    op = {"unstructured": "csr", "block:2x2": "block", "2:4": "nm"}[pattern] + "_conv2d"
    if name == "padding" and value == [0, 1]:
        value = [0, 1, 1]
    words = rf"{op}: expected {name} of two( or four)? integers >= "
    for device in ("cpu", "meta"):
        a = valid(op, _First())
        a[name] = value
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in a.items()}
        with pytest.raises(RuntimeError, match=words):
            getattr(torch.ops.sparsekern, op)(**moved)


@native
@pytest.mark.parametrize("tokens", [2**33, 2**40, 2**55])
@formats
def test_more_tokens_than_memory(pattern, tokens):
    layer = sk.SparseLinear(64, 64, sparsity=FORMATS[pattern], pattern=pattern)
    with pytest.raises(RuntimeError, match=r"_linear: expected memory for a copy .*, got none"):
        layer(torch.empty(1).expand(tokens, 64))


@pytest.mark.parametrize("op", OPS)
def test_each_argument_on_another_device(op):
    """The dispatcher takes the fake where any tensor is on meta: numbers would be made up."""
    a = valid(op, _First())
    names = [s.name for s in schema(op) if isinstance(a[s.name], torch.Tensor)]
    first, call = names[0], getattr(torch.ops.sparsekern, op)
    for name in names if len(names) > 1 else ():
        moved = {**a, name: a[name].to("meta")}
        culprit, want, got = (name, "cpu", "meta") if name != first else (names[1], "meta", "cpu")
        message = rf"{op}: expected {culprit} on the device of {first} \({want}\), got {got}"
        with pytest.raises(RuntimeError, match=message):
            call(**moved)
        rest = {k: v.to("meta") if k in names and k != name else v for k, v in a.items()}
        with pytest.raises(RuntimeError, match=rf"{op}: expected \w+ on the device of {first} "):
            call(**rest)


@pytest.mark.parametrize("op", OPS)
def test_meta_alone_and_fake_tensors(op):
    a = valid(op, _First())
    if op.endswith("_plan"):
        return  # its size depends on the indices
    call = getattr(torch.ops.sparsekern, op)
    want = call(**a)
    meta = call(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in a.items()})
    with torch._subclasses.FakeTensorMode() as mode:
        fake = call(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
                       for k, v in a.items()})  # fmt: skip
    for results, device in ((meta, "meta"), (fake, "cpu")):
        pairs = zip(*((r if isinstance(r, tuple) else (r,)) for r in (results, want)))
        for have, real in pairs:
            assert (have.shape, have.dtype) == (real.shape, real.dtype)
            assert have.device.type == device


@formats
def test_layers_on_meta(pattern):
    layer = sk.SparseLinear(64, 64, sparsity=FORMATS[pattern], pattern=pattern, device="meta")
    with pytest.raises(RuntimeError, match=r"on the device of x \(cpu\), got meta"):
        layer(torch.randn(4, 64))
    cpu = sk.SparseLinear(64, 64, sparsity=FORMATS[pattern], pattern=pattern)
    with pytest.raises(RuntimeError, match=r"on the device of x \(meta\), got cpu"):
        cpu(torch.randn(4, 64, device="meta"))


@pytest.mark.parametrize("op", OPS)
def test_tensors_that_are_not_plain(op):
    name = schema(op)[0].name
    a = valid(op, _First())
    with pytest.raises(RuntimeError, match=rf"{op}: expected {name} as a plain dense tensor, got"):
        getattr(torch.ops.sparsekern, op)(**{**a, name: a[name].to_sparse()})
    with pytest.raises(RuntimeError, match=rf"{op}"):
        getattr(torch.ops.sparsekern, op)(**{**a, name: None})


def test_references_name_their_op():
    a = valid("nm_linear_int8", _First())
    a["index"], a["plan"] = a["index"] | 255, None
    with pytest.raises(RuntimeError, match="nm_linear_int8: expected index with positions"):
        REFERENCES["nm_linear_int8"](*a.values())


def test_a_dense_layer_agrees_about_groups_without_outputs():
    with pytest.raises(RuntimeError):
        nn.functional.conv2d(torch.randn(1, 4, 5, 5), torch.randn(0, 2, 3, 3), groups=2)
    a = valid("csr_conv2d", _First())
    a.update(crow=a["crow"][:1], col=a["col"][:0], values=a["values"][:0], plan=None, plan_t=None)
    a.update(bias=None, residual=None, groups=2**62)
    with pytest.raises(RuntimeError, match="csr_conv2d: expected groups that divide"):
        torch.ops.sparsekern.csr_conv2d(**a)

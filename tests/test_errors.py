"""Every message of the native ops, the weights and the layers."""

import pytest
import torch
from samples import csr_of, random_blocks, random_nm, random_weight

import sparsekern as sk
from sparsekern._load import _C
from sparsekern.ops import block, nm
from sparsekern.ops.conv import csr_conv2d, csr_conv2d_grad_input, csr_conv2d_grad_values
from sparsekern.ops.csr import (
    csr_linear,
    csr_linear_grad_input,
    csr_linear_grad_values,
    csr_plan,
)

native = pytest.mark.skipif(_C is None, reason="tests the messages of the compiled ops")


def parts(rows=4, cols=6):
    values, crow, col = csr_of(random_weight(rows, cols, 0.3).float())
    return values, crow, col


def changed(t, index, value):
    t = t.clone()
    t[index] = value
    return t


def refuses(message, function, *arguments):
    with pytest.raises((RuntimeError, ValueError), match=message):
        function(*arguments)


@native
def test_linear_arguments():
    v, r, c = parts()
    x = torch.randn(3, 6)
    dtypes = "x of dtype float32 or bfloat16 or float64, got int8"
    refuses(f"csr_linear: expected {dtypes}", csr_linear, x.to(torch.int8), v, r, c)
    refuses("got float16", csr_linear, x.half(), v, r, c)
    same = r"values of the dtype of x \(float32\), got float64"
    refuses(f"csr_linear: expected {same}", csr_linear, x, v.double(), r, c)
    refuses("expected values with 1 dimensions, got shape", csr_linear, x, v[None], r, c)
    refuses(r"crow of dtype int32, got int64", csr_linear, x, v, r.long(), c)
    refuses("col with 1 dimensions, got shape", csr_linear, x, v, r, c[None])
    refuses(r"crow of shape \(rows \+ 1,\), got \(0,\)", csr_linear, x, v, r[:0], c)
    refuses(r"col.size\(0\) = values.size\(0\) = \d+, got", csr_linear, x, v, r, c[:-1])
    refuses("x of shape .*in_features.*, got a scalar", csr_linear, torch.tensor(1.0), v, r, c)
    bias = r"bias.size\(0\) = out_features = 4, got 5"
    refuses(bias, csr_linear, x, v, r, c, torch.zeros(5))
    refuses("bias of the dtype of x", csr_linear, x, v, r, c, torch.zeros(4).double())
    acts = "activation to be none, relu, relu6, gelu or gelu_tanh, got 'swish'"
    refuses(acts, csr_linear, x, v, r, c, None, None, None, "swish")


@native
def test_indices_that_are_no_csr():
    v, r, c = parts()
    x = torch.randn(3, 6)
    nnz = v.numel()
    bad = "crow to start at 0 and end at nnz = {}, got start {}, end {}"
    refuses(bad.format(nnz, 1, nnz), csr_linear, x, v, changed(r, 0, 1), c)
    refuses(bad.format(nnz, 0, nnz + 7), csr_linear, x, v, changed(r, -1, nnz + 7), c)
    refuses("crow to be non-decreasing, got", csr_linear, x, v, changed(r, 1, nnz + 3), c)
    refuses("crow to be non-decreasing, got", csr_linear, x, v, changed(r, 2, -5), c)
    rising = r"col to rise strictly inside each row and stay in \[0, 6\), got col\[0\] = {}"
    refuses(rising.format(-1), csr_linear, x, v, r, changed(c, 0, -1))
    refuses(rising.format(6), csr_linear, x, v, r, changed(c, 0, 6))
    refuses("col to rise strictly", csr_linear, x, v, r, changed(c, 1, int(c[0])))
    refuses("stay in", csr_linear, x[:, :2].contiguous(), v, r, c)


@native
def test_plans_of_another_pattern():
    v, r, c = parts()
    x = torch.randn(3, 6)
    other = csr_plan(*csr_of(random_weight(9, 6, 0.3))[1:], 6)
    plan = csr_plan(r, c, 6)
    wrong = "plan made by csr_plan for this pattern, got a plan of another pattern"
    refuses(wrong, csr_linear, x, v, r, c, None, other)
    refuses("plan of dtype int32, got float32", csr_linear, x, v, r, c, None, plan.float())
    narrow = r"x.size\(-1\) = in_features = 6, got 5"
    refuses(narrow, csr_linear, torch.randn(3, 5), v, r, c, None, plan)
    wrong = r"plan_t made by csr_plan\(transpose=True\)"
    refuses(wrong, csr_linear_grad_input, torch.randn(3, 4), v, r, c, plan, 6)
    refuses("cols >= 0, got -1", csr_plan, r, c, -1)
    refuses("groups and taps >= 1, got 0", csr_plan, r, c, 6, 0)
    refuses("rows divisible by groups = 3, got 4", csr_plan, r, c, 6, 3)
    refuses("cols divisible by taps = 4, got 6", csr_plan, r, c, 6, 1, 4)
    refuses(r"number of columns in \[0, 2\^31\), got 2147483648", csr_plan, r, c, 2**31)


@native
def test_gradient_arguments():
    v, r, c = parts()
    x, g = torch.randn(3, 6), torch.randn(3, 4)
    out = r"grad.size\(-1\) = out_features = 4, got 5"
    refuses(out, csr_linear_grad_input, torch.randn(3, 5), v, r, c, None, 6)
    refuses(out, csr_linear_grad_values, torch.randn(3, 5), x, r, c, None)
    refuses("grad of the dtype of x", csr_linear_grad_values, g.double(), x, r, c, None)
    refuses("tokens of grad = tokens of x = 3, got 2", csr_linear_grad_values, g[:2], x, r, c, None)


@native
def test_conv_arguments():
    v, r, c = parts(4, 18)  # 2 channels, 3x3
    x = torch.randn(1, 2, 5, 5)
    one, none = [1, 1], [0, 0]

    def conv(x=x, kernel=(3, 3), stride=one, padding=none, dilation=one, groups=1, bias=None,
             residual=None):  # fmt: skip
        geometry = [list(a) for a in (kernel, stride, padding, dilation)]
        return csr_conv2d(x, v, r, c, bias, None, None, *geometry, groups, "none", residual)

    assert conv().shape == (1, 4, 3, 3)
    refuses("csr_conv2d: expected x with 4 dimensions, got shape", lambda: conv(x[0]))
    refuses(r"kernel_size of two integers >= 1, got \(3\)", lambda: conv(kernel=[3]))
    refuses(r"stride of two integers >= 1, got \(0, 1\)", lambda: conv(stride=[0, 1]))
    refuses(r"padding of two or four integers >= 0, got \(-1, 0\)", lambda: conv(padding=[-1, 0]))
    refuses(
        r"padding of two or four integers >= 0, got \(1, 0, 1\)", lambda: conv(padding=[1, 0, 1])
    )
    refuses(r"dilation of two integers >= 1", lambda: conv(dilation=[1, 0]))
    refuses(
        "groups that divide in_channels = 2 and out_channels = 4, got 3", lambda: conv(groups=3)
    )
    large = "an input at least as large as the kernel, got input size 5 with kernel_size 7"
    refuses(large, lambda: conv(kernel=[7, 7]))
    refuses(r"bias.size\(0\) = out_channels = 4, got 2", lambda: conv(bias=torch.zeros(2)))
    result = r"residual.size\(1\) = that of the result = 4, got 2"
    refuses(result, lambda: conv(residual=torch.zeros(1, 2, 3, 3)))
    refuses("residual with 4 dimensions, got", lambda: conv(residual=torch.zeros(4, 3, 3)))
    refuses("residual of the dtype of x", lambda: conv(residual=torch.zeros(1, 4, 3, 3).double()))
    refuses("stay in", lambda: conv(kernel=[2, 2]))
    geometry = ([3, 3], one, none, one, 1)
    g = torch.randn(1, 4, 4, 4)
    height = r"grad.size\(2\) = output height = 3, got 4"
    refuses(height, csr_conv2d_grad_values, g, x, r, c, None, *geometry)
    refuses(height, csr_conv2d_grad_input, g, v, r, c, None, 2, 5, 5, *geometry)
    g = torch.randn(1, 5, 3, 3)
    channels = r"grad.size\(1\) = out_channels = 4, got 5"
    refuses(channels, csr_conv2d_grad_values, g, x, r, c, None, *geometry)


@native
def test_block_arguments():
    v, r, c = random_blocks(8, 6, (4, 3), 0.0)
    v, x = v.float(), torch.randn(3, 6)

    def linear(v=v, r=r, c=c, x=x, bias=None, plan=None, out=8):
        return block.block_linear(x, v, r, c, bias, plan, None, out)

    assert linear().shape == (3, 8)
    refuses("block_linear: expected values with 3 dimensions, got", lambda: linear(v=v[0]))
    refuses(r"values.size\(0\) = col.size\(0\) = 3, got 4", lambda: linear(c=c[:3]))
    refuses(r"crow.size\(0\) = rows of blocks \+ 1 = 4, got 3", lambda: linear(out=9))
    refuses("blocks of at least 1 x 1, got 0 x 3", lambda: linear(v=v[:, :0]))
    refuses(r"bias.size\(0\) = out_features = 8, got 4", lambda: linear(bias=torch.zeros(4)))
    refuses("x of shape .*in_features.*, got a scalar", lambda: linear(x=torch.tensor(1.0)))
    refuses("crow to start at 0 and end at nnz = 4", lambda: linear(r=changed(r, 0, 1)))
    refuses(r"stay in \[0, 2\), got col\[1\] = 2", lambda: linear(c=changed(c, 1, 2)))
    plan = block.block_plan(r, c, 8, 6, 4, 3)
    narrow = r"x.size\(-1\) = in_features = 6, got 5"
    refuses(narrow, lambda: linear(x=torch.randn(3, 5), plan=plan))
    refuses("plan made by block_plan for this pattern", lambda: linear(plan=plan[:-1]))
    refuses("plan of dtype int32, got float32", lambda: linear(plan=plan.float()))
    g = torch.randn(3, 8)
    wrong = r"plan_t made by block_plan\(transpose=True\)"
    refuses(wrong, block.block_linear_grad_input, g, v, r, c, plan, 6)
    tokens = "tokens of grad = tokens of x = 3, got 2"
    refuses(tokens, block.block_linear_grad_values, g[:2], x, r, c, None, 4, 3)
    refuses("groups and taps >= 1, got 0", block.block_plan, r, c, 8, 6, 4, 3, 0)
    refuses("rows divisible by groups = 3, got 8", block.block_plan, r, c, 8, 6, 4, 3, 3)


@native
def test_nm_arguments():
    v, i = random_nm(8, 6, 2, 4)
    v, x = v.float(), torch.randn(3, 6)

    def linear(v=v, i=i, x=x, plan=None, n=2, m=4):
        return nm.nm_linear(x, v, i, None, plan, None, n, m)

    assert linear().shape == (3, 8)
    refuses("nm_linear: expected index of dtype uint8, got int32", lambda: linear(i=i.int()))
    refuses("values with 2 dimensions, got", lambda: linear(v=v[0]))
    refuses(r"values.size\(0\) = rows = 8, got 4", lambda: linear(v=v[:4]))
    refuses(r"values.size\(1\) = values of a row = 4, got 3", lambda: linear(v=v[:, :3]))
    refuses(r"index.size\(1\) = bytes of a row = 1, got 2", lambda: linear(i=i.repeat(1, 2)))
    refuses("1 <= n < m <= 16, got 4:4", lambda: linear(n=4))
    refuses("groups of 5 that hold 2 each, got 6 columns", lambda: linear(m=5))
    refuses("rise strictly inside each group and stay in .*position 3", lambda: linear(i=i | 15))
    refuses("stay in \\[0, 2\\)", lambda: linear(i=i | 240))
    plan = nm.nm_plan(i, 8, 6, 2, 4)
    refuses("plan made by nm_plan for this pattern", lambda: linear(plan=plan[:-1]))
    g = torch.randn(3, 8)
    wrong = r"plan_t made by nm_plan\(transpose=True\)"
    refuses(wrong, nm.nm_linear_grad_input, g, v, i, plan, 6, 2, 4)
    tokens = "tokens of grad = tokens of x = 3, got 2"
    refuses(tokens, nm.nm_linear_grad_values, g[:2], x, i, None, 2, 4)
    refuses("groups and taps >= 1, got 0", nm.nm_plan, i, 8, 6, 2, 4, 0)
    refuses("rows divisible by groups = 3, got 8", nm.nm_plan, i, 8, 6, 2, 4, 3)
    wide = torch.zeros(1, 4096 * 8, dtype=torch.uint8)
    refuses("at most 65535 weights in a group", nm.nm_plan, wide, 1, 16, 8, 16, 1, 8192)


def test_isa_names():
    if _C is not None:
        refuses("set_cpu_isa: expected one of scalar.*, got 'mmx'", _C.set_cpu_isa, "mmx")


def weight(values=None, crow=None, col=None, shape=(4, 6)):
    v, r, c = parts()
    return sk.CSRWeight.from_parts(
        v if values is None else values(v),
        r if crow is None else crow(r),
        c if col is None else col(c),
        shape,
    )


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("a shape of 2 or 4 dimensions, got \\(4, 6, 1\\)", {"shape": (4, 6, 1)}),
        ("sizes below 2\\^31, got", {"shape": (4, 2**31)}),
        ("values \\(nnz,\\) in floating point, got torch.int32", {"values": lambda v: v.int()}),
        ("crow int32 with one dimension, got torch.int64", {"crow": lambda r: r.long()}),
        ("col int32 with one dimension", {"col": lambda c: c[None]}),
        ("crow of 5 entries \\(out \\+ 1\\), got 4", {"crow": lambda r: r[:-1]}),
        ("col of \\d+ entries like values, got", {"col": lambda c: c[:-1]}),
        ("crow from 0 to nnz = \\d+, got from 2", {"crow": lambda r: changed(r, 0, 2)}),
        ("crow that never falls, got 1 falling", {"crow": lambda r: changed(r, 1, int(r[2]) + 1)}),
        ("columns in \\[0, 6\\), got", {"col": lambda c: changed(c, 0, 99)}),
        ("rise strictly inside each row, got 1", {"col": lambda c: changed(c, 1, int(c[0]))}),
    ],
)
def test_weight_parts(message, change):
    weight()
    refuses(f"CSRWeight: expected .*{message}", lambda: weight(**change))


def test_weight_from_dense():
    build = sk.CSRWeight.from_dense
    refuses("a weight of 2 or 4 dimensions, got", build, torch.randn(3))
    refuses("a floating point weight, got torch.int64", build, torch.ones(2, 2, dtype=torch.long))
    refuses("a boolean mask, got torch.float32", build, torch.ones(2, 2), torch.ones(2, 2))
    refuses("got one on the meta device", build, torch.ones(2, 2, device="meta"))
    refuses("fewer than 2\\^31 weights", build, torch.ones(1).expand(2**16, 2**16))


def test_block_and_nm_weight_parts():
    v, r, c = random_blocks(8, 6, (4, 3), 0.0)
    build = sk.BlockWeight
    shape, pattern = (8, 6), "block:4x3"
    refuses("BlockWeight: expected values \\(n_blocks, R, C\\)", build, v[0], r, c, shape, pattern)
    refuses("crow of 3 entries", build, v, r[:2], c, shape, pattern)
    refuses(r"columns in \[0, 2\), got", build, v, r, changed(c, 1, 7), shape, pattern)
    inside = "blocks that stay inside a group of the convolution, got 4 rows in groups of 2"
    refuses(f"BlockWeight: expected {inside}", build, v, r, c, (4, 6, 1, 1), pattern, 2)
    fits = "a pattern of blocks or vectors that fits, got 2:4"
    refuses(fits, sk.BlockWeight.from_dense, torch.ones(4, 4), None, "2:4")
    v, i = random_nm(8, 6, 2, 4)
    build = sk.NMWeight
    refuses("NMWeight: expected an N:M pattern, got unstruct", build, v, i, shape, "unstructured")
    refuses(r"values \(8, 4\) in floating point", build, v[:, :3], i, shape, "2:4")
    refuses(r"index \(8, 1\) in uint8, got torch.int32", build, v, i.int(), shape, "2:4")
    refuses("positions that rise inside each group", build, v, i * 0, shape, "2:4")
    refuses("stay in it, got a position past the end", build, v, i | 240, shape, "2:4")
    most = "NMWeight: expected at most 2 weights in each group of 4, got 4"
    refuses(most, sk.NMWeight.from_dense, torch.ones(4, 4), None, "2:4")
    fits = "an N:M pattern that fits, got 2:4 with 5 inputs"
    refuses(fits, sk.NMWeight.from_dense, torch.ones(4, 5), None, "2:4")


def test_formats():
    have = "SparseLinear: expected format to be auto, csr, block, nm, got 'coo'"
    refuses(have, lambda: sk.SparseLinear(4, 4, format="coo"))
    stores = r"a format that stores pattern unstructured for shape \(4, 4\) \(csr\), got 'nm'"
    refuses(stores, lambda: sk.SparseLinear(4, 4, format="nm"))
    conv = torch.nn.Conv2d(4, 4, 3)
    stores = "SparseConv2d.from_dense: expected a format that stores pattern 2:4 .*got 'block'"
    refuses(stores, lambda: sk.SparseConv2d.from_dense(conv, pattern="2:4", format="block"))


@pytest.mark.parametrize(
    ("pattern", "name", "index", "message"),
    [
        ("block:2x2", "block_col", 0, r"BlockWeight: expected columns in \[0, 4\)"),
        ("2:4", "index", (0, 0), "NMWeight: expected positions that rise inside each group"),
    ],
)
def test_state_dict_of_other_formats_with_hostile_indices(pattern, name, index, message):
    sparsity = None if pattern == "2:4" else 0.5
    layer = sk.SparseLinear(8, 4, sparsity=sparsity, pattern=pattern)
    bad = {k: v.clone() for k, v in layer.state_dict().items()}
    bad[f"weight.{name}"][index] = 255 if name == "index" else 1000
    refuses(message, layer.load_state_dict, bad)
    assert torch.equal(layer(torch.zeros(2, 8)), layer.bias.expand(2, 4))


def test_layers():
    refuses(
        "SparseLinear: expected in_features to be a positive integer, got 0", sk.SparseLinear, 0, 4
    )
    refuses("out_features to be a positive integer, got 2.5", sk.SparseLinear, 4, 2.5)
    names = "none, relu, relu6, gelu, gelu_tanh"
    acts = f"SparseLinear: expected activation to be one of {names}, got 'tanh'"
    refuses(acts, lambda: sk.SparseLinear(4, 4, activation="tanh"))
    refuses("sparsity", lambda: sk.SparseLinear(4, 4, sparsity=1.2))
    refuses("pattern", lambda: sk.SparseLinear(4, 4, pattern="blocky:3"))
    need = "SparseLinear.from_dense: expected sparsity= with pattern block:2x2, got none"
    refuses(need, lambda: sk.SparseLinear.from_dense(torch.nn.Linear(4, 4), pattern="block:2x2"))
    layer = sk.SparseLinear(6, 4, sparsity=0.5)
    refuses(r"csr_linear: expected x.size\(-1\) = in_features = 6, got 7", layer, torch.randn(2, 7))
    conv = sk.SparseConv2d(4, 4, 3, sparsity=0.5)
    refuses("SparseConv2d: expected x with 4 channels, got 3", conv, torch.randn(1, 3, 8, 8))


def test_state_dict_with_hostile_indices():
    layer = sk.SparseLinear(6, 4, sparsity=0.5)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    bad = dict(before)
    bad["weight.col"] = changed(bad["weight.col"], 0, 1000)
    refuses(r"weight: CSRWeight: expected columns in \[0, 6\), got", layer.load_state_dict, bad)
    for key, value in layer.state_dict().items():
        if key.startswith("weight"):
            assert torch.equal(value, before[key])

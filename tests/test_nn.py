"""SparseLinear and SparseConv2d against their dense twins, and as citizens of PyTorch."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.weight_base import HINT as NAME

HINT = f"weight.{NAME}"

LINEAR = [
    {"sparsity": 0.8},
    {"sparsity": 0.0, "bias": False},
    {"pattern": "2:4"},
    {"pattern": "2:4", "format": "csr"},
    {"pattern": "4:16", "activation": "gelu"},
    {"sparsity": 0.75, "pattern": "block:4x4", "activation": "relu"},
    {"sparsity": 0.5, "pattern": "block:4x4", "format": "csr"},
    {"sparsity": 0.5, "pattern": "block:5x7"},
    {"sparsity": 0.5, "pattern": "vector:1x8", "format": "block"},
    {"sparsity": 0.5, "pattern": "vector:8x1"},
    {"sparsity": 0.9, "activation": "gelu"},
    {"sparsity": 0.9, "activation": "gelu_tanh"},
]
CONV = [
    {"sparsity": 0.7, "padding": 1},
    {"sparsity": 0.5, "stride": (2, 1), "padding": (0, 2), "bias": False},
    {"sparsity": 0.5, "padding": "same", "dilation": 2},
    {"sparsity": 0.5, "kernel_size": 4, "padding": "same"},
    {"sparsity": 0.6, "groups": 4, "padding": 1, "padding_mode": "reflect"},
    {"sparsity": 0.6, "padding": 1, "padding_mode": "circular", "activation": "relu"},
    {"pattern": "filter", "sparsity": 0.5},
    {"pattern": "2:4", "padding": 1},
    {"pattern": "1:2", "groups": 2, "stride": 2},
    {"pattern": "block:4x3", "sparsity": 0.5, "padding": 1},
    {"pattern": "block:3x2", "sparsity": 0.5, "groups": 2, "activation": "relu"},
    {"pattern": "vector:8x1", "sparsity": 0.5, "padding": 1},
]


def make(kind, options):
    options = dict(options)
    if kind == "linear":
        return sk.SparseLinear(32, 24, **options), torch.randn(5, 7, 32)
    layer = sk.SparseConv2d(8, 12, options.pop("kernel_size", 3), **options)
    return layer, torch.randn(2, 8, 11, 9)


cases = [("linear", o) for o in LINEAR] + [("conv", o) for o in CONV]


@pytest.mark.parametrize(("kind", "options"), cases, ids=str)
def test_matches_the_dense_twin_forward_and_backward(kind, options):
    layer, x = make(kind, options)
    twin = layer.to_dense()
    inner = twin[0] if isinstance(twin, nn.Sequential) else twin
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = layer(a), twin(b)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(y)
    y.backward(grad)
    z.backward(grad)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    dense_grad = layer.weight.gather(inner.weight.grad)
    torch.testing.assert_close(layer.weight.values.grad, dense_grad, rtol=1e-4, atol=2e-5)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, inner.bias.grad, rtol=1e-4, atol=2e-5)


def test_from_dense_keeps_exactly_the_zeros_that_are_there():
    dense = nn.Linear(20, 10)
    dense.weight.data[:, ::3] = 0
    layer = sk.SparseLinear.from_dense(dense)
    assert layer.weight.nnz == int((dense.weight != 0).sum())
    assert torch.equal(layer.to_dense().weight, dense.weight)
    assert torch.equal(layer.to_dense().bias, dense.bias)


def test_from_dense_prunes_when_asked():
    dense = nn.Linear(64, 32)
    layer = sk.SparseLinear.from_dense(dense, sparsity=0.75)
    assert layer.weight.nnz == 32 * 64 // 4
    kept = dense.weight[layer.weight.mask()].abs().min()
    assert kept >= dense.weight[~layer.weight.mask()].abs().max()
    assert sk.SparseLinear.from_dense(dense, pattern="2:4").sparsity == 0.5
    conv = nn.Conv2d(8, 8, 3)
    assert sk.SparseConv2d.from_dense(conv, sparsity=0.5, pattern="kernel").sparsity == 0.5


def test_frozen_weights_stay_frozen():
    dense = nn.Linear(8, 8)
    dense.weight.requires_grad_(False)
    layer = sk.SparseLinear.from_dense(dense.eval())
    assert not layer.weight.values.requires_grad and layer.bias.requires_grad
    assert not layer.training and not layer.to_dense().weight.requires_grad


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_copies_and_files(kind):
    layer, x = make(kind, {"sparsity": 0.8})
    want = layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other, _ = make(kind, {"sparsity": 0.3})  # another number of nonzeros
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), want)
        twin(x).sum().backward()
    assert set(layer.state_dict()) == {"bias", HINT, "weight.values", "weight.crow", "weight.col"}


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"pattern": "2:4"}, {"weight.index"}),
        ({"pattern": "block:4x4", "sparsity": 0.5}, {"weight.block_crow", "weight.block_col"}),
    ],
    ids=["nm", "block"],
)
def test_copies_and_files_of_other_formats(kind, options, parts):
    layer, x = make(kind, options)
    want = layer(x)
    more = dict(options, sparsity=0.25) if "sparsity" in options else options
    other, _ = make(kind, more)  # blocks: another number of them
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), want)
        twin(x).sum().backward()
    assert set(layer.state_dict()) == {"bias", HINT, "weight.values", *parts}
    low = copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16())
    torch.testing.assert_close(low.float(), want, rtol=0.05, atol=0.05)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), want)


def test_from_dense_finds_the_format_in_the_zeros():
    for pattern, sparsity, format in (
        ("block:16x16", 0.5, "block"),
        ("vector:4x1", 0.5, "block"),
        ("vector:1x8", 0.5, "csr"),
        ("2:4", None, "nm"),
        ("unstructured", 0.5, "csr"),
    ):
        dense = sk.SparseLinear(64, 48, pattern=pattern, sparsity=sparsity).to_dense()
        layer = sk.SparseLinear.from_dense(dense)
        assert layer.weight.format == format
        assert torch.equal(layer.to_dense().weight, dense.weight)
        assert sk.SparseLinear.from_dense(dense, format="csr").weight.format == "csr"


def test_a_kept_block_keeps_its_zeros_and_its_size_is_ragged():
    weight = torch.randn(10, 7)
    weight[4, 4] = 0
    made = sk.BlockWeight.from_dense(weight, None, "block:4x4")
    assert tuple(made.values.shape) == (6, 4, 4) and made.nnz == 70 and made.sparsity == 0
    assert torch.equal(made.to_dense(), weight) and bool(made.mask().all())


def test_nm_fills_groups_up_with_zeros():
    weight = torch.zeros(3, 8)
    weight[0, 1], weight[1, 6] = 2.0, 3.0
    made = sk.NMWeight.from_dense(weight, None, "2:4")
    assert torch.equal(made.to_dense(), weight) and bool((made.mask().sum(1) == 4).all())
    kept = sk.NMWeight.from_dense(torch.ones(3, 8), weight != 0, "2:4")
    assert torch.equal(kept.to_dense(), (weight != 0).float())


def test_load_state_dict_with_assign():
    layer, x = make("linear", {"sparsity": 0.8})
    other, _ = make("linear", {"sparsity": 0.5})
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x), layer(x))


def test_meta_device_then_load():
    layer, x = make("linear", {"sparsity": 0.8})
    meta = sk.SparseLinear(32, 24, sparsity=0.8, device="meta")
    assert meta.weight.nnz == layer.weight.nnz
    assert meta(x.to("meta")).shape == (5, 7, 24)
    real = meta.to_empty(device="cpu")
    real.load_state_dict(layer.state_dict())
    assert torch.equal(real(x), layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dtypes_and_autocast(kind):
    layer, x = make(kind, {"sparsity": 0.8})
    want = layer.double()(x.double())
    low = layer.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), want, rtol=0.05, atol=0.05)
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (x, x.bfloat16()):
            y = layer(given.requires_grad_())
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.double(), want, rtol=0.05, atol=0.05)
        y.float().sum().backward()
    assert layer.weight.values.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_compile_and_export(kind):
    layer, x = make(kind, {"sparsity": 0.8, "activation": "relu"})
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_compiled_training_step():
    layer, x = make("linear", {"sparsity": 0.8})
    twin = copy.deepcopy(layer)
    step = torch.compile(lambda m, x: m(x).square().mean(), fullgraph=True)
    step(twin, x).backward()
    layer(x).square().mean().backward()
    torch.testing.assert_close(twin.weight.values.grad, layer.weight.values.grad)


def test_trains():
    """Recovers a sparse teacher with the same pattern."""
    teacher = sk.SparseLinear(64, 32, sparsity=0.8)
    student = copy.deepcopy(teacher)
    nn.init.zeros_(student.weight.values)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    for _ in range(300):
        x = torch.randn(128, 64)
        loss = (student(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-4


def test_shared_memory_between_processes():
    layer, x = make("linear", {"sparsity": 0.8})
    layer.share_memory()
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_unbatched_image():
    layer, x = make("conv", {"sparsity": 0.5})
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_initial_scale_follows_the_fan_in_that_is_left():
    dense, sparse = nn.Linear(512, 512, bias=False), sk.SparseLinear(512, 512, False, sparsity=0.9)
    x = torch.randn(256, 512)
    with torch.no_grad():
        assert 0.8 < float(sparse(x).std() / dense(x).std()) < 1.25
    assert "sparsity=0.9" in repr(sparse) and "in_features=512" in repr(sparse)


@pytest.mark.parametrize("size", [(512, 512), (513, 509)])
def test_large_images_are_written_whole(size):
    """From 8 MiB on results are written around the caches, where lines are whole."""
    conv = nn.Conv2d(2, 9, 1)
    x = torch.randn(1, 2, *size)
    sparse = sk.SparseConv2d.from_dense(conv, sparsity=0.5)
    torch.testing.assert_close(sparse(x), sparse.to_dense()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "size"), [(1, (112, 96)), (3, (96, 112)), (3, (100, 111))], ids=str
)
def test_large_results_of_lines_are_written_whole(kernel, size, stride, isa):
    """From 4 MiB on, without panels; surplus lanes of a row that is no whole line stay ordinary."""
    conv = nn.Conv2d(4, 128 * stride**2, kernel, stride, kernel // 2)
    x = torch.randn(1, 4, *size)
    sparse = sk.SparseConv2d.from_dense(conv, sparsity=0.8, activation="relu6")
    want = sparse.to_dense()(x)
    assert want.numel() * 4 >= 4 << 20
    torch.testing.assert_close(sparse(x), want, rtol=1e-4, atol=1e-5)
    residual = torch.randn_like(want)
    want = nn.functional.relu6(sparse.to_dense()[0](x) + residual)
    torch.testing.assert_close(sparse(x, residual), want, rtol=1e-4, atol=1e-5)

"""Block products and convolutions on CUDA, as far as a machine without a GPU can go: every sample.

The functions that are registered for CUDA run here on CPU tensors, kernels on the interpreter.
"""

import pytest
import torch
from samples import SAMPLES, random_blocks

from sparsekern.ops import block, block_conv, block_cuda, conv_cuda
from sparsekern.ops.block_triton import Index, sddmm, spmm
from sparsekern.ops.block_tuning import GradConfig, SpmmConfig, candidates

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _kernels_run_here(monkeypatch):
    monkeypatch.setattr(block_cuda, "kernel_fault", lambda device: "")
    monkeypatch.setenv("SPARSEKERN_TUNE", "0")


def close(got, want, dtype):
    assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
    if got.numel():
        scale = max(1.0, float(want.abs().max()))
        assert float((got.double() - want).abs().max()) <= TOLERANCE[dtype] * scale


def double(arguments):
    floating = lambda a: isinstance(a, torch.Tensor) and a.is_floating_point()  # noqa: E731
    return [a.double() if floating(a) else a for a in arguments]


def samples(name):
    even = [s for s in SAMPLES[name] if not s.uneven]  # the others are padded before they get here
    return pytest.mark.parametrize("sample", even, ids=lambda s: s.id)


@pytest.mark.filterwarnings("ignore:.*is computed with the dense weight")
@samples("block_linear")
def test_linear_and_its_gradients(sample):
    x, values, crow, col, bias, plan, _, rows, act = sample.build(torch.float32)
    plans, size, cols = (None, None), values.shape[1:], x.shape[-1]
    if plan is not None:
        plans = [block_cuda._plan(crow, col, rows, cols, *size, transpose=t) for t in (False, True)]
    got = block_cuda._linear(x, values, crow, col, bias, *plans, rows, act)
    exact = double((x, values, crow, col, bias, None, None))
    close(got, block._linear_reference(*exact, rows, act), torch.float32)
    grad = torch.randn(*x.shape[:-1], rows)
    got = block_cuda._grad_input(grad, values, crow, col, plans[1], cols)
    exact = double((grad, values, crow, col, None))
    close(got, block._grad_input_reference(*exact, cols), torch.float32)
    got = block_cuda._grad_values(grad, x, crow, col, plans[0], *size)
    exact = double((grad, x, crow, col, None))
    close(got, block._grad_values_reference(*exact, *size), torch.float32)


@pytest.mark.filterwarnings("ignore:.*is computed with the dense weight")
@samples("block_conv2d")
def test_conv_and_its_gradients(sample):
    arguments = sample.build(torch.float32)
    x, values, crow, col, bias, plan, _, outputs, *geometry, act = arguments
    plans, size = (None, None), values.shape[1:]
    if plan is not None:
        taps, groups = geometry[0][0] * geometry[0][1], geometry[4]
        sizes = (outputs, x.shape[1] // groups, *size, groups, taps)
        plans = [block_cuda._plan(crow, col, *sizes, transpose=t) for t in (False, True)]
    got = conv_cuda._block_conv(x, values, crow, col, bias, *plans, outputs, *geometry, act)
    exact = double((x, values, crow, col, bias, None, None))
    close(got, block_conv._conv_reference(*exact, outputs, *geometry, act), torch.float32)
    grad = torch.randn_like(got)
    got = conv_cuda._block_conv_grad_input(
        grad, values, crow, col, plans[1], *x.shape[1:], *geometry
    )
    exact = double((grad, values, crow, col, None))
    want = block_conv._grad_input_reference(*exact, *x.shape[1:], *geometry)
    close(got, want, torch.float32)
    got = conv_cuda._block_conv_grad_values(grad, x, crow, col, plans[0], *size, *geometry)
    exact = double((grad, x, crow, col, None))
    close(got, block_conv._grad_values_reference(*exact, *size, *geometry), torch.float32)


def parts(tokens, cols, rows, size, sparsity, dtype):
    """x, values, bias and indices in both directions."""
    values, crow, col = random_blocks(rows, cols, size, sparsity)
    plans = [block_cuda.make_plan(crow, col, cols, size[1], 1, t) for t in (False, True)]
    order, row, chunks = block_cuda.forward_parts("test", plans[0], crow, col, cols, size[1])
    turned = block_cuda.backward_parts("test", plans[1], crow, col, cols, size[1])
    x = torch.randn(tokens, cols, dtype=torch.float64).to(dtype)
    bias = torch.randn(rows, dtype=torch.float64).to(dtype)
    index = (Index(crow, col, None, order), Index(*turned), (crow, col, row, chunks))
    return x, values.to(dtype), bias, *index


def first(x, size):
    """What serves before anything was timed."""
    return next(iter(candidates(x.device, x.element_size(), x.shape[0], size).values()))


def check(case, rows, config, grad_config=None, act="none"):
    x, values, bias, index, turned, places = case
    crow, col, dtype = index.crow, index.col, x.dtype
    size = tuple(values.shape[1:])
    forward = config or first(x, size)
    got = spmm(x, values, index, bias, rows, act, forward)
    exact = double((x, values, crow, col, bias, None, None))
    close(got, block._linear_reference(*exact, rows, act), dtype)
    grad = torch.randn(x.shape[0], rows, dtype=torch.float64).to(dtype)
    backward = config or first(grad, size[::-1])
    got = spmm(grad, values, turned, None, x.shape[1], "none", backward)
    exact = double((grad, values, crow, col, None))
    close(got, block._grad_input_reference(*exact, x.shape[1]), dtype)
    got = sddmm(grad, x, places, values.shape[1:], grad_config)
    exact = double((grad, x, crow, col, None))
    close(got, block._grad_values_reference(*exact, *values.shape[1:]), dtype)


@pytest.mark.parametrize("act", ["relu", "relu6", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_block_sizes_in_16_bits(side, dtype, act):
    rows, cols = 3 * side // 2, 5 * side // 2
    check(parts(37, cols, rows, (side, side), 0.4, dtype), rows, None, act=act)


@pytest.mark.parametrize(
    "config",
    [
        SpmmConfig(16, 32, 32, persistent=1),
        SpmmConfig(16, 32, 32, persistent=2, split=2),
        SpmmConfig(32, 64, 64, split=3),
        SpmmConfig(16, 32, 128),
        SpmmConfig(16, 64, 32, tma=True),
        SpmmConfig(16, 32, 64, tma=True, split=2),
    ],
    ids=str,
)
def test_schedules(config):
    case = parts(37, 256, 192, (64, 64), 0.4, torch.float32)
    check(case, 192, config, GradConfig(32, 128, 16, split=2), "gelu")


@pytest.mark.parametrize("size", [(24, 24), (16, 5), (48, 100), (200, 20), (33, 1)], ids=str)
def test_sides_that_are_no_power_of_two(size):
    rows, cols = size[0] + 5, min(210, 20 * size[1])
    check(parts(9, cols, rows, size, 0.5, torch.float32), rows, None)


def test_rows_that_lie_apart_and_skewed_rows():
    x, values, bias, index, *_ = parts(20, 64, 160, (16, 16), 0.7, torch.float32)
    wide = torch.randn(20, 100)[:, :64].copy_(x)
    config = first(x, (16, 16))
    got = spmm(wide, values, index, bias, 160, "none", config)
    assert torch.equal(got, spmm(x, values, index, bias, 160, "none", config))
    counts = index.crow.diff()[index.order.long()]
    assert bool((counts[1:] <= counts[:-1]).all())
    assert sorted(index.order.tolist()) == list(range(10))


@pytest.mark.parametrize("tokens", [1, 40])
def test_what_no_block_holds_touches_nothing(tokens):
    """Neither inputs outside of the blocks nor what blocks hold beyond the edge."""
    crow, col = torch.tensor([0, 1, 2]).int(), torch.tensor([3, 1]).int()
    values = torch.randn(2, 32, 16)
    clean = values.clone()
    values[0, :, 4:] = torch.nan  # of 52 columns the last block has 4
    values[1, 8:] = torch.nan  # of 40 rows the last block has 8
    clean[0, :, 4:], clean[1, 8:] = 0, 0
    x = torch.randn(tokens, 52)
    plan = block_cuda.make_plan(crow, col, 52, 16, 1, False)
    want = block_cuda._linear(x, clean, crow, col, None, plan, None, 40)
    x[:, :16], x[:, 32:48] = torch.nan, torch.inf
    got = block_cuda._linear(x, values, crow, col, None, plan, None, 40)
    assert torch.equal(got, want) and bool(want.isfinite().all())
    grad = torch.randn(tokens, 40)
    turned = block_cuda.make_plan(crow, col, 52, 16, 1, True)
    got = block_cuda._grad_input(grad, values, crow, col, turned, 52)
    want = block_cuda._grad_input(grad, clean, crow, col, turned, 52)
    assert torch.equal(got, want)
    grad[0, 5] = torch.nan
    got = block_cuda._grad_values(grad, x, crow, col, plan, 32, 16)
    assert bool((got[0, :, 4:] == 0).all() and (got[1, 8:] == 0).all())


CONVS = {
    "3x3": (2, 32, (6, 7), 40, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1": (3, 48, (5, 4), 32, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "stride": (1, 20, (9, 8), 33, (3, 2), (2, 1), (1, 0), (1, 2), 1),
    "groups": (2, 40, (5, 5), 64, (3, 3), (1, 2), (1, 1), (1, 1), 2),
}


@pytest.mark.parametrize(
    ("size", "dtype", "split"),
    [
        ((16, 16), torch.float32, 3),
        ((16, 16), torch.float16, 1),
        ((32, 64), torch.bfloat16, 1),
        ((24, 5), torch.float32, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, size, dtype, split):
    from sparsekern.ops.conv_triton import Geometry
    from sparsekern.ops.conv_triton import block_conv as run

    images, channels, image, outputs, kernel, *rest = CONVS[name]
    geometry = Geometry(kernel, *rest)
    taps, per_group = kernel[0] * kernel[1], channels // geometry.groups
    values, crow, col = random_blocks(outputs, per_group, size, 0.4, geometry.groups, taps)
    x = torch.randn(images, channels, *image, dtype=torch.float64).to(dtype)
    bias = torch.randn(outputs, dtype=torch.float64).to(dtype)
    exact = double((x, values.to(dtype), crow, col, bias, None, None))
    want = block_conv._conv_reference(*exact, outputs, *geometry, "gelu")
    plan = block_cuda.make_plan(crow, col, per_group, size[1], taps, False)
    order, *_ = block_cuda.forward_parts("test", plan, crow, col, per_group, size[1], taps)
    index, y = Index(crow, col, None, order), x.new_full(want.shape, torch.nan)
    config = SpmmConfig(32, 32, 64 if size[1] < 32 else 32, split=split)
    last = x.contiguous(memory_format=torch.channels_last)
    got = run(last, values.to(dtype), index, bias, y, geometry, "gelu", config)
    assert got is y
    close(got, want, dtype)


@pytest.mark.parametrize(("size", "dtype"), [((16, 24), torch.float32), ((9, 16), torch.float16)])
@pytest.mark.parametrize("name", CONVS)
def test_gradients_of_conv(name, size, dtype):
    """By the kernels: zeros between pixels for strides, turned kernel positions, groups."""
    images, channels, image, outputs, kernel, *rest = CONVS[name]
    geometry, groups = (kernel, *rest), rest[-1]
    taps, per_group = kernel[0] * kernel[1], channels // groups
    values, crow, col = random_blocks(outputs, per_group, size, 0.4, groups, taps)
    x = torch.randn(images, channels, *image, dtype=torch.float64).to(dtype)
    sizes = (crow, col, outputs, per_group, *size, groups, taps)
    plans = [block_cuda._plan(*sizes, transpose=turned) for turned in (False, True)]
    exact = double((x, values, crow, col, None, None, None))
    shape = block_conv._conv_reference(*exact, outputs, *geometry, "none").shape
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    taken = []

    def first_way(key, ways, like):
        taken.append(next(iter(ways)))
        return ways[taken[-1]]()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_cuda, "run_fastest", first_way)
        got = conv_cuda._block_conv_grad_input(
            grad, values.to(dtype), crow, col, plans[1], channels, *image, *geometry
        )
        got_values = conv_cuda._block_conv_grad_values(
            grad, x, crow, col, plans[0], *size, *geometry
        )
    assert "dense" not in taken
    exact = double((grad, values.to(dtype), crow, col, None))
    close(got, block_conv._grad_input_reference(*exact, channels, *image, *geometry), dtype)
    exact = double((grad, x, crow, col, None))
    close(got_values, block_conv._grad_values_reference(*exact, *size, *geometry), dtype)

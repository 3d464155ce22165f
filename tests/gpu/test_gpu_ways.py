"""Every way an op has to compute its product, not only the one that wins on this card."""

import pytest
import torch
from gpu_common import DTYPES, check_close, on_cpu, poison, run
from samples import csr_of, random_blocks, random_nm, random_weight

from sparsekern.ops import (
    block_conv,
    conv,
    conv_cuda,
    csr,
    csr_conv_cuda,
    csr_cuda,
    nm,
    nm_conv,
    nm_conv_cuda,
    nm_cuda,
    nm_int8,
    nm_int8_cuda,
    nm_ste,
    nm_ste_cuda,
    own_cuda,
)
from sparsekern.patterns import parse
from sparsekern.weights import NMWeight
from sparsekern.weights_int8 import Float8NMWeight, Int8NMWeight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS = (1, 3, 8, 16, 40, 64, 200, 1024)


@pytest.fixture
def ways(monkeypatch):
    """Runs all ways of each op and keeps what they gave, or how they failed."""
    found = {}

    def run_all(key, candidates, like):
        for name, way in candidates.items():
            try:
                result = way()
                poison(result.shape, result.dtype)
                found[key[0], name] = way()
            except Exception as error:
                found[key[0], name] = error
        return candidates["dense"]()

    modules = (csr_cuda, nm_cuda, conv_cuda, csr_conv_cuda, nm_conv_cuda, nm_int8_cuda, nm_ste_cuda)
    for module in modules:
        monkeypatch.setattr(module, "run_fastest", run_all)
    return found


def compare(ways, want, what):
    """Each way against the exact results, by op; all that is wrong is said at once."""
    wrong = []
    for (op, name), got in ways.items():
        try:
            if isinstance(got, Exception):
                raise got
            exact = want[op]
            check_close(got.view(exact.shape), exact, slack=2.0, tf32=True)
        except Exception as error:
            wrong.append(f"{op} by {name}, {what}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def check(ways, op, reference, name, arguments, what):
    grads = (0, 1)
    exact = on_cpu(arguments, torch.float64)
    grad = torch.randn(reference(*exact).shape, dtype=torch.float64)
    y, grad_x, grad_values = run(reference, exact, grads, grad)
    run(op, arguments, grads, grad)
    want = {name: y, f"{name}_grad_input": grad_x, f"{name}_grad_values": grad_values}
    compare(ways, want, what)


def expect_ways(ways, op, names, dtype):
    """Our CUDA kernels are among them, where they were built and take the dtype."""
    if own_cuda.build_fault() or dtype not in own_cuda.DTYPES:
        names = ()
    assert {n for o, n in ways if o == op} >= set(names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("shape", [(256, 512), (131, 300)], ids=str)
def test_csr(shape, sparsity, dtype, ways):
    rows, cols = shape
    values, crow, col = csr_of(random_weight(rows, cols, sparsity))
    crow, col = crow.cuda(), col.cuda()
    plans = [torch.ops.sparsekern.csr_plan(crow, col, cols, 1, 1, t, False) for t in (False, True)]
    bias = torch.randn(rows, device="cuda", dtype=dtype)
    for tokens in TOKENS:
        x = torch.randn(tokens, cols, device="cuda", dtype=dtype)
        arguments = (x, values.to("cuda", dtype), crow, col, bias, *plans, "relu")
        ways.clear()
        check(ways, csr.csr_linear, csr._linear_reference, "csr_linear", arguments, f"T={tokens}")
        names = own_cuda.csr_ways(x, rows, col.numel()) if tokens <= own_cuda.MAX_TOKENS else []
        expect_ways(ways, "csr_linear", names, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("shape", [(256, 512), (512, 320)], ids=str)
def test_nm(shape, n, m, dtype, ways):
    rows, cols = shape
    values, index = random_nm(rows, cols, n, m)
    index = index.cuda()
    plans = [torch.ops.sparsekern.nm_plan(index, rows, cols, n, m, 1, 1, t) for t in (False, True)]
    bias = torch.randn(rows, device="cuda", dtype=dtype)
    for tokens in TOKENS:
        x = torch.randn(tokens, cols, device="cuda", dtype=dtype)
        arguments = (x, values.to("cuda", dtype), index, bias, *plans, n, m, "none")
        ways.clear()
        check(ways, nm.nm_linear, nm._linear_reference, "nm_linear", arguments, f"T={tokens}")
        if (n, m) == (2, 4) and tokens <= own_cuda.MAX_TOKENS:
            expect_ways(ways, "nm_linear", ["mma.sp"], dtype)


CONVS = {
    "block_conv2d": (block_conv.block_conv2d, block_conv._conv_reference),
    "csr_conv2d": (conv.csr_conv2d, conv._conv_reference),
    "nm_conv2d": (nm_conv.nm_conv2d, nm_conv._conv_reference),
}
GEOMETRIES = [  # input size, kernel, stride, padding, dilation, groups
    ((14, 13), 3, 1, 1, 1, 1), ((15, 14), 3, 2, 1, 1, 1), ((9, 20), 5, 1, 4, 2, 1),
    ((7, 7), 1, 2, 0, 1, 1), ((14, 13), 3, 1, 1, 1, 2),
]  # fmt: skip


def conv_parts(name, channels, outputs, groups, taps):
    """Values, index and what the plan and the op take besides them, on the GPU."""
    if name == "csr_conv2d":
        values, *index = csr_of(random_weight(outputs, channels * taps, 0.8))
        return values, [t.cuda() for t in index], (channels * taps,), ()
    if name == "block_conv2d":
        values, *index = random_blocks(outputs, channels, (32, 16), 0.6, groups, taps)
        return values, [t.cuda() for t in index], (outputs, channels, 32, 16), (outputs,)
    weight = torch.randn(outputs, channels, taps, 1)
    held = NMWeight.from_dense(weight, parse("2:4T").mask(weight.abs()), "2:4T")
    return held.values.detach(), [held.index.cuda()], (outputs, channels, 2, 4), (2, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name, geometry, dtype, ways):
    (op, reference), (size, *pairs, groups) = CONVS[name], geometry
    channels, taps = 64 // groups, pairs[0] ** 2
    values, index, sizes, tail = conv_parts(name, channels, 96, groups, taps)
    make = getattr(torch.ops.sparsekern, name.replace("conv2d", "plan"))
    plans = [make(*index, *sizes, groups, taps, turned) for turned in (False, True)]
    x, bias = torch.randn(3, 64, *size, device="cuda"), torch.randn(96, device="cuda")
    for layout in (torch.contiguous_format, torch.channels_last):
        image = x.to(dtype).contiguous(memory_format=layout)
        arguments = (image, values.to("cuda", dtype), *index, bias.to(dtype), *plans, *tail)
        arguments = (*arguments, *([v, v] for v in pairs), groups, "relu")
        ways.clear()
        check(ways, op, reference, name, arguments, str(layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [Int8NMWeight, Float8NMWeight], ids=lambda k: k.format)
def test_8_bits(kind, dynamic, dtype, ways):
    """All ways multiply the same numbers; those of 8-bit products come out in bfloat16."""
    rows, cols = 256, 512
    values, index = random_nm(rows, cols, 2, 4)
    values, scales = kind.quantized(values.float(), (index,), (rows, cols))
    plan = torch.ops.sparsekern.nm_plan(index.cuda(), rows, cols, 2, 4)
    wide = nm_int8.dequantize_rows(values, scales).double()
    weight, bias = nm.nm_to_dense("test", wide, index, cols, 2, 4), torch.randn(rows)
    for tokens in (1, 16, 60, 200):
        x = torch.randn(tokens, cols).to(dtype)
        seen = nm_int8.rounded_tokens(x, values.dtype).double() if dynamic else x.double()
        want = (seen @ weight.t() + bias.to(dtype).double()).relu()
        ways.clear()
        on_gpu = [t.cuda() for t in (x, values, scales, index, bias.to(dtype))]
        got = nm_int8.nm_linear_int8(*on_gpu, plan, 2, 4, dynamic, "relu")
        assert got.dtype == dtype
        for (_, name), y in {**ways, ("", "chosen"): got}.items():
            assert not isinstance(y, Exception), (name, y)
            gap = float((y.double().cpu() - want).norm() / want.norm())
            limit = 1e-2 if dynamic or dtype == torch.bfloat16 else 3e-3
            assert gap <= limit, (name, tokens, gap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposable", [False, True])
def test_pruned_at_every_call(transposable, dtype, ways):
    weight, bias = torch.randn(256, 512).to(dtype), torch.randn(256).to(dtype)
    sizes = (2, 4, transposable)
    pruned = nm_ste.nm_prune(weight.cuda(), *sizes)
    exact = nm_ste.prune_reference(weight, *sizes)
    if transposable:  # sums in float32 on the GPU: nearly equal tiles may differ
        assert float((pruned.cpu() != exact).float().mean()) < 0.01
    else:
        assert torch.equal(pruned.cpu(), exact)
    for tokens in (1, 40, 300):
        x = torch.randn(tokens, 512).to(dtype)
        leaves = [t.cuda().requires_grad_() for t in (x, weight, bias)]
        ways.clear()
        y = nm_ste.nm_ste_linear(*leaves, *sizes)
        grad = torch.randn(tokens, 256)
        grads = torch.autograd.grad(y, leaves, grad.to(y))
        used, grad = pruned.cpu().double(), grad.to(dtype).double()
        want = {
            "nm_ste_linear": x.double() @ used.t() + bias.double(),
            "nm_ste_linear_grad_input": grad @ used,
        }
        compare(ways, want, f"T={tokens}")
        for got, exact_grad in zip(grads, (grad @ used, grad.t() @ x.double(), grad.sum(0))):
            check_close(got, exact_grad, slack=2.0, tf32=True)


@pytest.fixture
def tf32():
    """Float32 products may round to TF32; the setting is no plain attribute to be patched."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_float32_1_of_2_by_cusparselt(ways, tf32):
    """As TF32, where that is allowed."""
    values, index = random_nm(256, 512, 1, 2)
    plan = torch.ops.sparsekern.nm_plan(index.cuda(), 256, 512, 1, 2)
    x, bias = torch.randn(300, 512), torch.randn(256)
    arguments = (x, values.float(), index, bias, None, None, 1, 2, "relu")
    want = nm._linear_reference(*on_cpu(arguments, torch.float64))
    on_gpu = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    on_gpu[4] = plan
    nm.nm_linear(*on_gpu)
    assert ("nm_linear", "cusparselt") in ways
    compare(ways, {"nm_linear": want}, "float32, 1:2")

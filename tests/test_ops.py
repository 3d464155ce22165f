"""Every op on every sample: against float64, in every instruction set, dtype and mode."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_common import OPS, cases, small, with_grads
from samples import SAMPLES, csr_of, random_blocks, random_nm, random_weight

import sparsekern as sk
from sparsekern._load import _C
from sparsekern.ops import block, block_conv, conv, csr, nm, nm_conv
from sparsekern.ops.uneven import pad_first

REFERENCES = {
    "csr_linear": csr._linear_reference,
    "csr_conv2d": conv._conv_reference,
    "block_linear": block._linear_reference,
    "block_conv2d": block_conv._conv_reference,
    "nm_linear": nm._linear_reference,
    "nm_conv2d": nm_conv._conv_reference,
}
REFERENCES = {name: pad_first(name, function) for name, function in REFERENCES.items()}
EPSILON = {torch.float64: 1e-15, torch.float32: 1.2e-7, torch.bfloat16: 8e-3}


def run(function, arguments, positions, grad):
    """Output and gradients."""
    arguments = with_grads(arguments, positions)
    y = function(*arguments)
    grads = torch.autograd.grad(y, [arguments[i] for i in positions], grad.to(y.dtype))
    return [y.detach(), *grads]


def check_close(got, want, dtype, terms, scale=None):
    """`scale`: size of the sum without cancellation, where the largest result can be tiny."""
    assert got.shape == want.shape
    if not got.numel():
        return
    scale = max(float(want.abs().max()), scale or 1e-30)
    # Rounding errors of a sum of n terms grow like sqrt(n); the result is rounded once more.
    tolerance = 8 * EPSILON[torch.float32 if dtype == torch.bfloat16 else dtype] * math.sqrt(terms)
    if dtype == torch.bfloat16:
        tolerance += 2 * EPSILON[dtype]
    # erf and exp are polynomials of about 1e-6
    assert float((got.double() - want).abs().max()) <= scale * (tolerance + 2e-7), (dtype, terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "sample"), cases)
def test_matches_float64(name, sample, dtype, isa):
    arguments = sample.build(dtype)
    exact = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    exact_y = REFERENCES[name](*exact)
    grad = torch.randn_like(exact_y).to(dtype).double()
    if "relu6" in sample.id:  # no gradient at 6, and bfloat16 rounds 5.99 to it
        grad *= (exact_y - 6).abs() > 0.05
    got = run(OPS[name], arguments, sample.grads, grad)
    want = run(REFERENCES[name], exact, sample.grads, grad)
    tokens = max(1, grad.numel() // max(1, grad.shape[1 if name.endswith("conv2d") else -1]))
    for part, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == dtype
        terms = sample.nnz_per_row if part == 0 else max(tokens, sample.nnz_per_row)
        # gelu's gradient goes through torch's own bfloat16 gelu_backward
        slack = 4 if dtype == torch.bfloat16 and "gelu" in sample.id else 1
        check_close(g, w, dtype, terms * slack * slack)


@pytest.mark.parametrize(("name", "sample"), small)
def test_gradcheck(name, sample):
    arguments = with_grads(sample.build(torch.float64), sample.grads)
    if arguments[0].numel():
        assert torch.autograd.gradcheck(OPS[name], tuple(arguments), fast_mode=True)


@pytest.mark.parametrize("grads", [True, False], ids=["grad", "nograd"])
@pytest.mark.parametrize(("name", "sample"), small)
def test_opcheck(name, sample, grads):
    arguments = sample.build(torch.float32)
    if grads:
        arguments = with_grads(arguments, sample.grads)
    torch.library.opcheck(OPS[name], tuple(arguments))


def test_opcheck_of_the_gradient_ops():
    x, values, crow, col, _, plan, plan_t, _ = SAMPLES["csr_linear"][6].build(torch.float32)
    grad = torch.randn(17, 65)
    torch.library.opcheck(csr.csr_linear_grad_input, (grad, values, crow, col, plan_t, 129))
    torch.library.opcheck(csr.csr_linear_grad_values, (grad, x, crow, col, plan))
    torch.library.opcheck(csr.csr_plan, (crow, col, 129, 1, 1, False))
    x, values, crow, col, _, plan, plan_t, *geometry, _ = SAMPLES["csr_conv2d"][1].build(
        torch.float32
    )
    grad = torch.randn(1, 6, 5, 6)
    size = (4, 9, 11)
    torch.library.opcheck(
        conv.csr_conv2d_grad_input, (grad, values, crow, col, plan_t, *size, *geometry)
    )
    torch.library.opcheck(conv.csr_conv2d_grad_values, (grad, x, crow, col, plan, *geometry))


def test_opcheck_of_the_gradient_ops_of_blocks_and_nm():
    x, values, crow, col, _, plan, plan_t, *_ = SAMPLES["block_linear"][7].build(torch.float32)
    grad = torch.randn(100, 31)
    torch.library.opcheck(block.block_linear_grad_input, (grad, values, crow, col, plan_t, 65))
    torch.library.opcheck(block.block_linear_grad_values, (grad, x, crow, col, plan, 4, 4))
    torch.library.opcheck(block.block_plan, (crow, col, 31, 65, 4, 4, 1, 1, False))
    x, values, crow, col, _, plan, plan_t, _, *geometry, _ = SAMPLES["block_conv2d"][1].build(
        torch.float32
    )
    grad, size = torch.randn(1, 6, 5, 6), (4, 9, 11)
    torch.library.opcheck(
        block_conv.block_conv2d_grad_input, (grad, values, crow, col, plan_t, *size, *geometry)
    )
    torch.library.opcheck(
        block_conv.block_conv2d_grad_values, (grad, x, crow, col, plan, 3, 2, *geometry)
    )
    x, values, index, _, _, plan_t, *_ = SAMPLES["nm_linear"][7].build(torch.float32)
    grad = torch.randn(100, 31)
    torch.library.opcheck(nm.nm_linear_grad_input, (grad, values, index, plan_t, 64, 1, 4))
    torch.library.opcheck(nm.nm_linear_grad_values, (grad, x, index, plan_t, 1, 4))
    torch.library.opcheck(nm.nm_plan, (index, 31, 64, 1, 4, 1, 1, False))
    x, values, index, _, _, plan_t, _, _, *geometry, _ = SAMPLES["nm_conv2d"][1].build(
        torch.float32
    )
    grad, size = torch.randn(1, 6, 5, 6), (7, 9, 11)
    torch.library.opcheck(
        nm_conv.nm_conv2d_grad_input, (grad, values, index, plan_t, *size, 1, 2, *geometry)
    )
    torch.library.opcheck(nm_conv.nm_conv2d_grad_values, (grad, x, index, plan_t, 1, 2, *geometry))


@pytest.mark.parametrize(
    ("name", "index"),
    [("csr_linear", 6), ("csr_linear", 10), ("block_linear", 6), ("nm_linear", 6)],
)
def test_compile_fullgraph_with_dynamic_tokens(name, index):
    torch._dynamo.reset()  # the cases share one code object, whose recompilations are counted
    sample = SAMPLES[name][index]
    _, *rest = sample.build(torch.float32)

    def layer(x):
        return OPS[name](x, *rest) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    cols = sample.build(torch.float32)[0].shape[-1]
    for tokens in (5, 33, 1, 0):
        x = torch.randn(tokens, cols)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("name", ["csr_conv2d", "block_conv2d", "nm_conv2d"])
def test_compile_gradients(name):
    sample = SAMPLES[name][1]
    arguments = sample.build(torch.float32)
    compiled = torch.compile(lambda *a: OPS[name](*a), fullgraph=True)
    grad = torch.randn_like(OPS[name](*arguments))
    for got, want in zip(
        run(compiled, arguments, sample.grads, grad),
        run(OPS[name], arguments, sample.grads, grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_non_contiguous_inputs(isa):
    x, values, crow, col, bias, plan, plan_t, act = SAMPLES["csr_linear"][6].build(torch.float32)
    want = csr.csr_linear(x, values, crow, col, bias, plan, plan_t, act)
    strided = torch.randn(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    wide = values.repeat_interleave(2)[::2]
    got = csr.csr_linear(strided, wide, crow, col, bias, plan, plan_t, act)
    torch.testing.assert_close(got, want)
    transposed = x.t().contiguous().t()
    torch.testing.assert_close(
        csr.csr_linear(transposed, values, crow, col, bias, plan, plan_t, act), want
    )
    arguments = SAMPLES["csr_conv2d"][0].build(torch.float32)
    last = arguments[0].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv.csr_conv2d(last, *arguments[1:]), conv.csr_conv2d(*arguments))


@pytest.mark.parametrize("tokens", [1, 4, 8, 20])
def test_nan_and_inf_spread_where_a_weight_is_stored(tokens, isa):
    weight = torch.zeros(3, 40)
    weight[0, 5], weight[1, 6] = 2.0, 3.0
    values, crow, col = csr_of(weight)
    x = torch.ones(tokens, 40)
    x[0, 5], x[0, 6] = math.nan, math.inf
    for act in ("none", "relu"):
        y = csr.csr_linear(x, values, crow, col, None, None, None, act)[0]
        # Unlike dense, where 0 * inf is NaN, a weight that is not stored touches nothing.
        assert math.isnan(y[0]) and y[1] == math.inf and y[2] == 0


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize(
    ("format", "pattern"), [("block", "block:16x16"), ("block", "vector:4x1"), ("nm", "2:4")]
)
def test_nan_and_inf_stay_in_their_columns(tokens, format, pattern, isa):
    weight = torch.zeros(20, 80)
    weight[:16, 32:48] = 1.0 if format == "block" else 0.0
    weight[:16, 32:48:2] = 1.0
    linear = torch.nn.Linear(80, 20, bias=False)
    linear.weight.data = weight
    made = {"block": sk.BlockWeight, "nm": sk.NMWeight}[format].from_dense(weight, None, pattern)
    layer = sk.SparseLinear.from_weight(made, linear)
    x = torch.ones(tokens, 80)
    x[0, 79 if format == "block" else 3] = math.nan  # no row of the block or slot holds it
    x[0, 32] = math.inf
    y = layer(x)[0]
    assert bool((y[:16] == math.inf).all())
    # N:M stores N values in every group, zeros where there is nothing else: 0 * inf, as in dense
    assert bool(y[16:].isfinite().all() if format == "block" else y[16:].isnan().all())


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 140),
    cols=st.integers(1, 150),
    rows=st.integers(1, 60),
    block_size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_block_property(tokens, cols, rows, block_size, sparsity):
    values, crow, col = random_blocks(rows, cols, block_size, sparsity)
    weight = block.blocks_to_dense("test", values.float(), crow, col, rows, cols).squeeze(2)
    x = torch.randn(tokens, cols, requires_grad=True)
    y = block.block_linear(x, values.float(), crow, col, None, None, None, rows)
    check_close(y.detach(), (x.double() @ weight.double().t()).detach(), torch.float32, cols)
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    check_close(got, grad.double() @ weight.double(), torch.float32, rows)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 140),
    groups=st.integers(1, 30),
    tail=st.integers(0, 15),
    rows=st.integers(1, 60),
    m=st.integers(2, 16),
    share=st.floats(0.01, 0.99),
)
def test_nm_property(tokens, groups, tail, rows, m, share):
    n = max(1, int(share * m))
    cols = groups * m + (tail if n <= tail < m else 0)
    values, index = random_nm(rows, cols, n, m)
    weight = nm.nm_to_dense("test", values.float(), index, cols, n, m)
    assert int(weight.count_nonzero()) <= values.numel()
    x = torch.randn(tokens, cols, requires_grad=True)
    y = nm.nm_linear(x, values.float(), index, None, None, None, n, m)
    check_close(y.detach(), (x.double() @ weight.double().t()).detach(), torch.float32, cols)
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    check_close(got, grad.double() @ weight.double(), torch.float32, rows)


def test_results_do_not_depend_on_the_number_of_threads(isa):
    values, crow, col = csr_of(random_weight(96, 80, 0.5).float())
    x = torch.randn(300, 80)
    blocks, pairs = random_blocks(96, 80, (16, 16), 0.5), random_nm(96, 80, 2, 4)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(
            [
                csr.csr_linear(x, values, crow, col),
                block.block_linear(x, blocks[0].float(), *blocks[1:], None, None, None, 96),
                nm.nm_linear(x, pairs[0].float(), pairs[1], None, None, None, 2, 4),
            ]
        )
    torch.set_num_threads(before)
    for ys in results[1:]:
        for y, want in zip(ys, results[0], strict=True):
            torch.testing.assert_close(y, want)


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_each_number_of_tokens_and_threads(sparsity, isa):
    values, crow, col = csr_of(random_weight(130, 1030, sparsity).float())
    plan = csr.csr_plan(crow, col, 1030)
    bias = torch.randn(130)
    dense = torch.zeros(130, 1030, dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(130), crow.diff().long())
    dense[rows, col.long()] = values.double()
    before = torch.get_num_threads()
    for tokens in range(1, 36):
        torch.set_num_threads(1 + tokens % 3)
        x = torch.randn(tokens, 1030)
        y = csr.csr_linear(x, values, crow, col, bias, plan, None, "relu")
        want = torch.relu(x.double() @ dense.t() + bias.double())
        check_close(y, want, torch.float32, 1030)
    torch.set_num_threads(before)


@pytest.mark.skipif(_C is None, reason="only the compiled ops have instruction sets")
@pytest.mark.parametrize("sparsity", [0.3, 0.97])
def test_a_plan_runs_on_every_instruction_set(sparsity, isa):
    """A plan may be pickled on one machine and used on another."""
    values, crow, col = csr_of(random_weight(40, 300, sparsity).float())
    x = torch.randn(2, 300)
    plan = csr.csr_plan(crow, col, 300)
    want = csr.csr_linear(x, values, crow, col)
    for other in sk.available_isas():
        _C.set_cpu_isa(other)
        got = csr.csr_linear(x, values, crow, col, None, plan)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 140),
    cols=st.integers(1, 150),
    rows=st.integers(1, 60),
    sparsity=st.sampled_from([0.0, 0.3, 0.8, 0.95, 1.0]),
    kind=st.sampled_from(["uniform", "skewed"]),
)
def test_linear_property(tokens, cols, rows, sparsity, kind):
    weight = random_weight(rows, cols, sparsity, kind)
    values, crow, col = csr_of(weight.float())
    x = torch.randn(tokens, cols)
    y = csr.csr_linear(x, values, crow, col)
    exact = weight.float().double().t()
    scale = float((x.double().abs() @ exact.abs()).max()) / math.sqrt(cols) if tokens else None
    check_close(y, x.double() @ exact, torch.float32, cols, scale)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(3, 40), st.integers(3, 40)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
def test_conv_property(size, kernel, stride, padding, dilation, groups):
    if any(n + 2 * padding < dilation * (kernel - 1) + 1 for n in size):
        return
    dense = torch.randn(6, 4 // groups, kernel, kernel)
    dense = dense * (torch.rand_like(dense) > 0.5)
    values, crow, col = csr_of(dense.flatten(1))
    x = torch.randn(2, 4, *size, requires_grad=True)
    pairs = [[v, v] for v in (kernel, stride, padding, dilation)]
    y = conv.csr_conv2d(x, values, crow, col, None, None, None, *pairs, groups)
    want = torch.nn.functional.conv2d(
        x.double(), dense.double(), None, stride, padding, dilation, groups
    )
    check_close(y.detach(), want.detach(), torch.float32, 36)
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    (exact,) = torch.autograd.grad(want, x, grad.double())
    check_close(got, exact.double(), torch.float32, 54)


def test_import_stays_light():
    """No CUDA start and no heavy optional library on import."""
    import subprocess
    import sys

    code = (
        "import sys, torch; before = set(sys.modules); import sparsekern; "
        "heavy = {'matplotlib', 'transformers', 'rich', 'jinja2', 'triton', 'pandas'}; "
        "print(sorted((set(sys.modules) - before) & heavy), torch.cuda.is_initialized())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] False"


def test_isa_is_the_best_available():
    assert sk.cpu_isa() == sk.available_isas()[-1]

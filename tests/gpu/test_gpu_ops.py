"""Every op on every sample on a GPU: against float64 on the CPU, with its gradients."""

import math

import pytest
import torch
from gpu_common import DTYPES, OPS, check_close, on_cpu, poison, run, with_grads
from samples import SAMPLES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES = [
    pytest.param(name, sample, id=f"{name}-{sample.id}")
    for name, samples in SAMPLES.items()
    for sample in samples
]
# One sample of each op, in the middle of its range.
TYPICAL = [("csr_linear", 6), ("csr_conv2d", 1), ("block_linear", 7), ("block_conv2d", 1),
           ("nm_linear", 7), ("nm_conv2d", 1)]  # fmt: skip

TOPS = {"relu": math.inf, "relu6": 6.0}


def build(sample, dtype):
    """Arguments on the GPU; the schedules are made there by the op of that device."""
    with torch.device("cuda"):
        return sample.build(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "sample"), CASES)
def test_matches_float64(name, sample, dtype):
    op, reference = OPS[name]
    arguments = build(sample, dtype)
    exact = on_cpu(arguments, torch.float64)
    shape = reference(*exact).shape
    grad = torch.randn(shape, dtype=torch.float64)
    poison(shape, dtype)
    got = run(op, arguments, sample.grads, grad)
    want = run(reference, exact, sample.grads, grad)
    act = next(a for a in exact if isinstance(a, str))
    if act in TOPS:  # which sums count as positive the output says: it is rounded
        y = got[0].double().cpu()
        linear = ["none" if isinstance(a, str) else a for a in exact]
        masked = torch.where((y > 0) & (y < TOPS[act]), grad, 0.0)
        want[1:] = run(reference, linear, sample.grads, masked)[1:]
    # The gradient of gelu begins with the sum before it, computed again in the dtype of the layer.
    slack = 3.0 if "gelu" in sample.id else 1.0
    parts = ("output", *(f"gradient {i}" for i in sample.grads))
    for g, w, part in zip(got, want, parts, strict=True):
        assert g.dtype == dtype and g.is_cuda
        what = f"{name} {part}"
        check_close(g, w, what, slack, tf32=name.startswith("nm"), terms=max(arguments[0].shape))


@pytest.mark.parametrize(("name", "index"), TYPICAL)
def test_the_same_call_gives_the_same_bits(name, index):
    """A moving result is a race: nothing here may depend on the order of threads."""
    sample = SAMPLES[name][index]
    arguments = build(sample, torch.float32)
    first = OPS[name][0](*arguments)
    for _ in range(20):
        assert torch.equal(OPS[name][0](*arguments), first)


@pytest.mark.parametrize(("name", "index"), TYPICAL)
def test_a_call_like_one_before_sees_what_is_new(name, index):
    """It goes straight to the way chosen then, with other contents, tensors and streams."""
    op, reference = OPS[name]
    arguments = list(build(SAMPLES[name][index], torch.float32))
    tf32 = name.startswith("nm")
    for stream in (None, None, torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            arguments[0] = torch.randn_like(arguments[0])
            arguments[1].mul_(-1.5)
            got = op(*arguments)
        torch.cuda.synchronize()
        want = reference(*on_cpu(arguments, torch.float64))
        check_close(got, want, name, tf32=tf32, terms=max(arguments[0].shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "index"), TYPICAL)
def test_opcheck(name, index, dtype):
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    sample = SAMPLES[name][index]
    arguments = with_grads(build(sample, dtype), sample.grads)
    torch.library.opcheck(OPS[name][0], tuple(arguments), test_utils=(
        "test_schema", "test_autograd_registration", "test_faketensor"))  # fmt: skip


@pytest.mark.parametrize(("name", "index"), TYPICAL)
def test_compiles_without_a_break(name, index):
    torch._dynamo.reset()
    sample = SAMPLES[name][index]
    op, arguments = OPS[name][0], build(sample, torch.float32)
    compiled = torch.compile(lambda *a: op(*a) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), op(*arguments) * 2)


@pytest.mark.parametrize(("name", "index"), TYPICAL)
def test_non_contiguous_inputs(name, index):
    sample = SAMPLES[name][index]
    x, *rest = build(sample, torch.float32)
    strided = torch.empty((*x.shape, 2), device="cuda")[..., 0].copy_(x)
    assert not strided.is_contiguous()
    torch.testing.assert_close(OPS[name][0](strided, *rest), OPS[name][0](x, *rest))


@pytest.mark.parametrize("name", ["csr_linear", "block_linear", "nm_linear"])
def test_an_input_that_starts_anywhere_in_memory(name):
    """Wide loads and the libraries want 16 bytes; a slice of a tensor starts anywhere."""
    index = dict(TYPICAL)[name]
    for dtype in DTYPES:
        x, *rest = build(SAMPLES[name][index], dtype)
        whole = torch.empty(x.numel() + 1, dtype=dtype, device="cuda")
        shifted = whole[1:].view(x.shape).copy_(x)
        torch.testing.assert_close(OPS[name][0](shifted, *rest), OPS[name][0](x, *rest))


REFUSED = {
    "values of another dtype": lambda a: [a[0], a[1].half(), *a[2:]],
    "input elsewhere": lambda a: [a[0].cpu(), *a[1:]],
    "activation nobody knows": lambda a: [*a[:-1], "swish"],
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("name", ["csr_linear", "block_linear", "nm_linear"])
def test_refused_with_both_sides_named(name, why):
    arguments = REFUSED[why](build(SAMPLES[name][dict(TYPICAL)[name]], torch.float32))
    with pytest.raises(RuntimeError, match=rf"{name}: expected .*, got "):
        OPS[name][0](*arguments)


def test_indices_out_of_range_never_reach_a_kernel():
    x, values, crow, col, bias, _, _, act = build(SAMPLES["csr_linear"][6], torch.float32)
    with pytest.raises(RuntimeError, match=r"csr_linear: expected col"):
        OPS["csr_linear"][0](x, values, crow, col + x.shape[-1], bias, None, None, act)
    grad, op = x.new_ones(*x.shape[:-1], crow.numel() - 1), torch.ops.sparsekern
    with pytest.raises(RuntimeError, match=r"csr_linear_grad_input: expected col"):
        op.csr_linear_grad_input(grad, values, crow, col + x.shape[-1], None, x.shape[-1])
    torch.cuda.synchronize()

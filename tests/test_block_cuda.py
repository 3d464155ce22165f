"""What block layers and convolutions do on CUDA before and beside the kernels: checks, dense path.

The functions registered for CUDA run here on CPU tensors; the kernels are said to be unavailable.
"""

import pytest
import torch
from samples import SAMPLES, random_blocks
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekern.ops import (
    block,
    block_conv,
    block_cuda,
    conv,
    conv_cuda,
    csr_conv_cuda,
    csr_cuda,
    cuda_support,
    nm_conv,
    nm_conv_cuda,
    nm_cuda,
    nm_int8_cuda,
    nm_ste,
    nm_ste_cuda,
)
from sparsekern.ops.uneven import pad_first


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    for module in (block_cuda, csr_cuda, nm_cuda):
        monkeypatch.setattr(module, "kernel_fault", lambda device: "this is a test")
    monkeypatch.setattr(csr_cuda, "cusparse_fault", lambda device: "so is this")
    for module in (csr_cuda, nm_cuda):
        monkeypatch.setattr(module, "device_facts", lambda index: None)
    monkeypatch.setattr(cuda_support, "_STATED", set())
    monkeypatch.setenv("SPARSEKERN_TUNE", "0")


def linear(sample, dtype=torch.float64):
    x, values, crow, col, bias, _, _, rows, act = sample.build(dtype)
    sizes = (crow, col, rows, x.shape[-1], *values.shape[1:])
    plans = [block_cuda._plan(*sizes, transpose=t) for t in (False, True)]
    return x, values, crow, col, bias, plans, rows, act


@pytest.mark.parametrize("sample", SAMPLES["block_linear"], ids=lambda s: s.id)
@pytest.mark.filterwarnings("ignore:.*is computed with the dense weight")
def test_dense_linear(sample):
    x, values, crow, col, bias, plans, rows, act = linear(sample)
    got = block_cuda._linear(x, values, crow, col, bias, *plans, rows, act)
    want = block._linear_reference(x, values, crow, col, bias, None, None, rows, act)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    got = block_cuda._grad_input(grad, values, crow, col, plans[1], x.shape[-1])
    want = block._grad_input_reference(grad, values, crow, col, None, x.shape[-1])
    torch.testing.assert_close(got, want)
    got = block_cuda._grad_values(grad, x, crow, col, plans[0], *values.shape[1:])
    want = block._grad_values_reference(grad, x, crow, col, None, *values.shape[1:])
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:.*is computed with the dense weight")
@pytest.mark.parametrize("name", ["block_conv2d", "csr_conv2d", "nm_conv2d"])
def test_dense_conv(name):
    for sample in SAMPLES[name]:
        arguments = list(sample.build(torch.float64))
        run, reference = {
            "block_conv2d": (conv_cuda._block_conv, block_conv._conv_reference),
            "csr_conv2d": (csr_conv_cuda._conv_residual, conv._conv_reference),
            "nm_conv2d": (nm_conv_cuda._conv, nm_conv._conv_reference),
        }[name]
        run, reference = pad_first(name, run), pad_first(name, reference)
        want, plan = reference(*arguments), 4 if name == "nm_conv2d" else 5
        if name == "block_conv2d":  # the others take any plan as a sign that indices were checked
            arguments[plan] = None
        torch.testing.assert_close(run(*arguments), want)
        arguments[plan] = None
        torch.testing.assert_close(run(*arguments), want)


def test_the_reason_of_the_dense_path_is_said_once():
    arguments = SAMPLES["block_linear"][1].build(torch.float32)
    with pytest.warns(
        RuntimeWarning, match="block_linear is computed with the dense .*: this is a"
    ):
        block_cuda._linear(*arguments[:5], None, None, *arguments[7:])
    block_cuda._linear(*arguments[:5], None, None, *arguments[7:])
    for text, dtype, height in (("float64", torch.float64, 64), ("fill no more", torch.half, 8)):
        assert text in block_cuda.misfit(dtype, height)
    assert block_cuda.misfit(torch.bfloat16, 9) == ""
    arguments = SAMPLES["nm_conv2d"][0].build(torch.float32)
    with pytest.warns(RuntimeWarning, match="nm_conv2d is computed with the dense .*: this is a"):
        nm_conv_cuda._conv(*arguments)
    arguments = SAMPLES["csr_conv2d"][0].build(torch.float32)
    with pytest.warns(RuntimeWarning, match="csr_conv2d is computed with the dense .*: this is a"):
        csr_conv_cuda._conv(*arguments)


class NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture: results that the host has to read back."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "repeat_interleave.Tensor", "bincount", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if name.startswith(self.FORBIDDEN) and not (kwargs or {}).get("output_size"):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*is computed with the dense weight")
def test_with_plans_nothing_waits_for_the_device():
    x, values, crow, col, bias, plans, rows, act = linear(SAMPLES["block_linear"][6])
    convs = [list(SAMPLES[name][0].build(torch.float64)) for name in ("csr_conv2d", "nm_conv2d")]
    *arguments, outputs, kernel, stride, padding, dilation, groups, act2 = SAMPLES["block_conv2d"][
        0
    ].build(torch.float64)
    sizes = (*arguments[2:4], outputs, arguments[0].shape[1], *arguments[1].shape[1:], groups, 9)
    arguments[5] = block_cuda._plan(*sizes)
    with NoWaiting():
        y = block_cuda._linear(x, values, crow, col, bias, *plans, rows, act)
        block_cuda._grad_input(y, values, crow, col, plans[1], x.shape[-1])
        block_cuda._grad_values(y, x, crow, col, plans[0], *values.shape[1:])
        geometry = (kernel, stride, padding, dilation, groups)
        conv_cuda._block_conv(*arguments, outputs, *geometry, act2)
        y = csr_conv_cuda._conv(*convs[0])
        x, values, crow, col, _, plan, plan_t, *geometry, _ = convs[0]
        csr_conv_cuda._grad_input(y, values, crow, col, plan_t, *x.shape[1:], *geometry)
        csr_conv_cuda._grad_values(y, x, crow, col, plan, *geometry)
        y = nm_conv_cuda._conv(*convs[1])
        x, values, index, _, _, plan_t, *geometry, _ = convs[1]
        nm_conv_cuda._grad_input(y, values, index, plan_t, *x.shape[1:], *geometry)
        nm_conv_cuda._grad_values(y, x, index, plan_t, *geometry)
    x, values, crow, col, bias, plans, rows, act = linear(SAMPLES["block_linear"][6])
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        block_cuda._linear(x, values, crow, col, bias, None, None, rows, act)


def refuses(message, function, *arguments):
    with pytest.raises(RuntimeError, match=message):
        function(*arguments)


def test_messages():
    v, r, c = random_blocks(8, 6, (4, 3), 0.0)
    v, x, g = v.float(), torch.randn(3, 6), torch.randn(3, 8)

    def run(v=v, r=r, c=c, x=x, bias=None, plan=None, out=8, act="none"):
        return block_cuda._linear(x, v, r, c, bias, plan, None, out, act)

    refuses("block_linear: expected values of dtype torch.float32, got", run, v.double())
    refuses("expected values with 3 dimensions, got torch.Size", run, v[0])
    refuses(r"values.size\(0\) = col.size\(0\) = 3, got 4", lambda: run(c=c[:3]))
    refuses("crow of dtype torch.int32, got torch.int64", lambda: run(r=r.long()))
    refuses(r"col on the device of x \(cpu\), got meta", lambda: run(c=c.to("meta")))
    refuses(r"crow.size\(0\) = rows of blocks \+ 1 = 4, got 3", lambda: run(out=9))
    refuses("x of shape .*in_features.*, got a scalar", lambda: run(x=torch.tensor(1.0)))
    refuses("bias of dtype torch.float32, got", lambda: run(bias=torch.zeros(8).double()))
    refuses(r"bias of shape \(8,\), got \(4,\)", lambda: run(bias=torch.zeros(4)))
    refuses("activation to be none, .*, got 'swish'", lambda: run(act="swish"))
    refuses("crow to start at 0 and end at nnz = 4", lambda: run(r=r + 1))
    plan = block_cuda._plan(r, c, 8, 6, 4, 3)
    refuses("plan made by block_plan for this pattern, got", lambda: run(plan=plan[:5]))
    refuses("plan made by block_plan for this pattern, got", lambda: run(plan=plan.float()))
    wrong = r"plan_t made by block_plan\(transpose=True\) for this pattern, got torch.int32 of"
    refuses(wrong, block_cuda._grad_input, g, v, r, c, plan, 6)
    refuses("tokens of grad = 3, got 2", block_cuda._grad_values, g[:2], x, r, c, None, 4, 3)
    x = torch.randn(1, 6, 4, 4)
    one = [[1, 1], [1, 1], [0, 0], [1, 1]]
    refuses("x with 4 dimensions", conv_cuda._block_conv, x[0], v, r, c, *[None] * 3, 8, *one, 1)
    groups = "groups that divide in_channels = 6 and out_channels = 8, got 3"
    refuses(groups, conv_cuda._block_conv, x, v, r, c, *[None] * 3, 8, *one, 3)
    one[0] = [5, 5]
    large = r"an input at least as large as the kernel, got input size \(4, 4\)"
    refuses(large, conv_cuda._block_conv, x, v, r, c, *[None] * 3, 8, *one, 1)


def test_messages_of_the_other_formats():
    x, values, crow, col, _, _, plan_t, *geometry, _ = SAMPLES["csr_conv2d"][0].build(torch.float32)
    grad, size = torch.randn(2, 3, 14, 14), x.shape[1:]
    wanted = "csr_conv2d_grad_input: expected grad with 8 channels, got torch.Size"
    refuses(wanted, csr_conv_cuda._grad_input, grad, values, crow, col, plan_t, *size, *geometry)
    x, values, index, _, _, plan_t, *rest, _ = SAMPLES["nm_conv2d"][0].build(torch.float32)
    grad, size = torch.randn(2, 5, 9, 14), x.shape[1:]
    wanted = "nm_conv2d_grad_input: expected grad with 6 channels, got torch.Size"
    refuses(wanted, nm_conv_cuda._grad_input, grad, values, index, plan_t, *size, *rest)
    grad = torch.randn(2, 6, 9, 14)
    wanted = "nm_conv2d_grad_input: expected values of dtype torch.float32, got torch.float64"
    refuses(wanted, nm_conv_cuda._grad_input, grad, values.double(), index, plan_t, *size, *rest)
    index = torch.zeros(4, 2, dtype=torch.uint8)
    eight = (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), index, None, None, 2, 4)
    run = nm_int8_cuda._linear
    wanted = "nm_linear_int8: expected values of int8 or uint8, got torch.float32"
    refuses(wanted, run, torch.randn(3, 16), eight[0].float(), *eight[1:])
    wanted = r"nm_linear_int8: expected values of shape \(4, 10\), got \(4, 8\)"
    refuses(wanted, run, torch.randn(3, 20), *eight)
    wanted = r"nm_linear_int8: expected scales of shape \(4,\), got \(3,\)"
    refuses(wanted, run, torch.randn(3, 16), eight[0], torch.ones(3), *eight[2:])
    wanted = r"nm_ste_linear: expected x.size\(-1\) = in_features = 8, got 12"
    weight = torch.randn(4, 8)
    refuses(wanted, nm_ste_cuda._linear, torch.randn(3, 12), weight, None, 2, 4, False)
    wanted = r"nm_ste_linear_grad_input: expected grad.size\(-1\) = out_features = 4, got 5"
    refuses(wanted, nm_ste_cuda._grad_input, torch.randn(3, 5), weight, 2, 4, False)


def test_dense_products_of_moving_masks():
    """What is left without a library: dense, the reason said once."""
    x, weight, bias = torch.randn(5, 8), torch.randn(4, 8), torch.randn(4)
    with pytest.warns(
        RuntimeWarning, match="nm_ste_linear goes without cuSPARSELt: expected a 1:2"
    ):
        got = nm_ste_cuda._linear(x, weight, bias, 2, 4, True)
    want = torch.nn.functional.linear(x, nm_ste.prune_reference(weight, 2, 4, True), bias)
    torch.testing.assert_close(got, want)
    assert torch.equal(
        nm_ste_cuda._prune(weight, 2, 4, True), nm_ste.prune_reference(weight, 2, 4, True)
    )


def test_registered_for_cuda():
    ops = ("block_plan", "block_linear", "block_linear_grad_input", "block_linear_grad_values")
    for name in ("block_conv2d", "csr_conv2d", "nm_conv2d"):
        ops += (name, f"{name}_grad_input", f"{name}_grad_values")
    ops += ("nm_linear_int8", "nm_prune", "nm_ste_linear", "nm_ste_linear_grad_input")
    for op in ops:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekern::{op}", "CUDA")

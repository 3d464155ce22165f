"""What other tools of torch make of sparse layers: flop counters, fx, TorchScript, export."""

import io
import math

import pytest
import torch
from ops_common import OPS, small, with_grads
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern.norm import ContiguousBatchNorm2d
from sparsekern.ops.nm_ste import nm_ste_linear
from sparsekern.patterns import parse
from sparsekern.pool import ChannelsLastMaxPool2d
from sparsekern.prune.products import multiply_pruned


def small_model():
    return nn.Sequential(
        sk.SparseConv2d(4, 8, 3, padding=1, activation="relu"),
        nn.Flatten(),
        sk.SparseLinear(8 * 36, 16, pattern="2:4"),
        nn.GELU(),
        sk.SparseLinear(16, 4, pattern="block:4x4", sparsity=0.5),
    )


@pytest.mark.parametrize(("name", "sample"), small)
def test_flops_are_those_of_stored_weights(name, sample):
    arguments = with_grads(sample.build(torch.float32), sample.grads)
    with FlopCounterMode(display=False) as forward:
        y = OPS[name](*arguments)
    products = 2 * arguments[1].numel()
    products *= y[:, 0].numel() if "conv2d" in name else math.prod(y.shape[:-1])
    assert forward.get_total_flops() == products
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    again = products if "gelu" in sample.id else 0  # the sum before it is computed once more
    assert backward.get_total_flops() == 2 * products + again


def test_flops_of_frozen_and_pruned_weights():
    layer, x = sk.SparseLinear(64, 32, sparsity=0.75).eval(), torch.randn(10, 64)
    sk.quantize(nn.Sequential(layer))
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 10 * layer.weight.nnz
    with FlopCounterMode(display=False) as counter:
        nm_ste_linear(x, torch.randn(32, 64), None, 2, 4, False)
    assert counter.get_total_flops() == 2 * 10 * 32 * 32


def test_a_counter_imported_later_knows_the_ops():
    import subprocess
    import sys

    code = (
        "import sys, torch, sparsekern as sk; assert 'torch.utils.flop_counter' not in sys.modules;"
        "finders = len(sys.meta_path); from torch.utils.flop_counter import FlopCounterMode;"
        "layer = sk.SparseLinear(64, 64)\n"
        "with FlopCounterMode(display=False) as counter: layer(torch.randn(10, 64))\n"
        "print(counter.get_total_flops() == 20 * layer.weight.nnz, finders - len(sys.meta_path))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "1"]


def test_fx_traces_layers_as_single_calls():
    model, x = small_model(), torch.randn(2, 4, 6, 6)
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["0", "1", "2", "3", "4"]
    assert torch.equal(traced(x), model(x))


def test_fx_traces_a_residual_and_stand_ins():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = sk.SparseConv2d(4, 4, 3, padding=1)
            self.norm, self.pool = ContiguousBatchNorm2d(4), ChannelsLastMaxPool2d(2)
            self.norm.activation = "relu"

        def forward(self, x):
            return self.pool(self.norm(self.conv(x, x, activation="relu")))

    block, x = Block().eval(), torch.randn(2, 4, 6, 6)
    assert torch.equal(torch.fx.symbolic_trace(block)(x), block(x))


def test_fx_traces_layers_that_train_pruned():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8)
    multiply_pruned(model[0], parse("2:4"))
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_fx_refuses_a_layer_alone():
    with pytest.raises(RuntimeError, match=r"SparseLinear: expected torch.fx to trace a model"):
        torch.fx.symbolic_trace(sk.SparseLinear(8, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("model", [small_model, lambda: sk.SparseConv2d(4, 4, 3)])
def test_script_names_what_to_use(model):
    with pytest.raises(
        RuntimeError, match=r"SparseConv2d: expected torch.compile, torch.export .*to_dense"
    ):
        torch.jit.script(model())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_saves_and_differentiates():
    pool = ChannelsLastMaxPool2d(2)
    pool.original = (nn.MaxPool2d(2),)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), pool, nn.Upsample(6), small_model())
    x = torch.randn(2, 4, 6, 6)
    traced, buffer = torch.jit.trace(model, x), io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    other = torch.randn(5, 4, 6, 6, requires_grad=True)
    torch.testing.assert_close(loaded(other), model(other))
    got, want = (torch.autograd.grad(m(other).square().sum(), other)[0] for m in (loaded, model))
    torch.testing.assert_close(got, want)


def test_export_and_compile():
    model, x = small_model().eval(), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(got).square().sum().backward()
    model(want).square().sum().backward()
    torch.testing.assert_close(got.grad, want.grad)

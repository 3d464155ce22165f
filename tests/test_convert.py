"""convert_to_sparse: same outputs, never slower, nothing half done."""

import copy
import json

import pytest
import torch
from convert_common import forced, kinds, sparsified, wide
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsekern as sk
from sparsekern import choose, convert


def test_converts_what_wins_and_keeps_the_outputs(one_thread):
    model, x = wide(), torch.randn(256, 512)
    want = model(x)
    converted = sk.convert_to_sparse(model, x)
    assert converted is model
    report = sk.report(model)
    assert report.n_sparse == 2 and not report.reverted
    assert report.model_sparse_ms < report.model_dense_ms
    for row in report.layers:
        assert row.format == "csr" and row.dense_ms > row.sparse_ms and row.max_error < 1e-4
        assert 0.94 < row.sparsity < 0.96 and row.pattern == "unstructured"
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert "2 of 2 layers sparse" in str(report) and "faster" in str(report)


@pytest.mark.parametrize(
    ("pattern", "formats"),
    [("block:16x16", {"block", "csr"}), ("2:4", {"nm", "csr", "dense"})],
)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_tries_every_format_that_fits(one_thread, monkeypatch, pattern, formats, mode):
    sparsity = None if pattern == "2:4" else 0.95
    model = nn.Sequential(sk.SparseLinear(512, 512, pattern=pattern, sparsity=sparsity).to_dense())
    tried = []
    keep = choose.try_format
    monkeypatch.setattr(choose, "try_format", lambda *args: (tried.append(args[2]), keep(*args))[1])
    x = torch.randn(256, 512)
    want = model(x)
    sk.convert_to_sparse(model, x, mode=mode)
    assert set(tried) == formats - {"dense"}
    (row,) = sk.report(model).layers
    assert row.format in formats and row.pattern == pattern
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    sk.to_dense(model)
    torch.testing.assert_close(model(x), want)


def test_without_inputs_the_pattern_decides_the_format():
    model = nn.Sequential(sk.SparseLinear(64, 64, pattern="block:8x8", sparsity=0.9).to_dense())
    sk.convert_to_sparse(model)
    assert sk.report(model).layers[0].format == "block"
    assert model[0].weight.format == "block"


def test_keeps_dense_where_sparse_loses(one_thread):
    # One token through tiny layers: the call itself costs more than the product, on any machine.
    model = sparsified(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), 0.5)
    before = copy.deepcopy(model)
    x = torch.randn(1, 64)
    sk.convert_to_sparse(model, x)
    assert "CSRWeight" not in kinds(model)
    assert torch.equal(model(x), before(x))
    # Not faster alone, or, where the clock said otherwise, not faster in the whole model.
    reasons = [row.reason for row in sk.report(model).layers]
    assert all("not faster" in reason or "reverted" in reason for reason in reasons)


def test_a_dense_model_is_not_even_timed():
    model = nn.Sequential(nn.Linear(8, 8))
    report = sk.report(sk.convert_to_sparse(model, torch.randn(2, 8)))
    assert report.layers[0].reason == "only 0% zeros" and report.layers[0].dense_ms is None


def test_depthwise_layers_are_timed_whatever_their_zeros(monkeypatch):
    forced(monkeypatch)

    def depthwise():
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)).eval()

    model, x = depthwise(), torch.randn(1, 8, 6, 6)
    want = model(x)
    sk.convert_to_sparse(model, x)
    assert [row.format for row in sk.report(model).layers] == ["csr", "dense"]
    torch.testing.assert_close(model(x), want)
    for inputs, mode in ((None, "inference"), (x, "training")):
        model = depthwise()
        sk.convert_to_sparse(model, inputs, mode=mode)
        assert sk.report(model).n_sparse == 0
        assert "only 0% zeros" in sk.report(model).layers[0].reason


def test_reverts_when_the_whole_model_lost(monkeypatch):
    forced(monkeypatch, model=lambda *a: (1.0, 1.2, 0.83))
    model, x = wide(), torch.randn(4, 512)
    layers = list(model)
    sk.convert_to_sparse(model, x)
    report = sk.report(model)
    assert list(model) == layers and report.reverted and report.n_sparse == 0
    assert "reverted" in report.layers[0].reason and "reverted to dense" in report.summary()


def test_goes_back_when_the_converted_model_does_not_run(monkeypatch):
    forced(monkeypatch, model=convert.time_model)

    class ReadsWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(x) @ self.fc.weight.t()

    model, x = sparsified(ReadsWeight()), torch.randn(4, 64)
    want = model(x)
    with pytest.warns(UserWarning, match="convert_to_sparse: the converted model does not run"):
        sk.convert_to_sparse(model, x)
    assert torch.equal(model(x), want) and sk.report(model).reverted


def test_training_mode(monkeypatch):
    times = []

    def timed(*arguments):  # the real timing runs, its verdict does not decide
        times.append(convert_time_model(*arguments))
        return 2.0, 1.0, 2.0

    convert_time_model = convert.time_model
    forced(monkeypatch, model=timed)
    model, x = wide().train(), torch.randn(64, 512)
    sk.convert_to_sparse(model, x, mode="training")
    assert len(times) == 1 and sk.report(model).mode == "training"
    assert model.training and model[0].training and model[0].weight.plan_t.numel() > 0
    model(x).sum().backward()
    assert model[0].weight.values.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_statistics_and_random_numbers_stay_as_they_were(mode):
    model = nn.Sequential(sparsified(nn.Linear(64, 64)), nn.BatchNorm1d(64), nn.Dropout())
    model.train()
    x = torch.randn(32, 64)
    mean, state = model[1].running_mean.clone(), torch.get_rng_state()
    sk.convert_to_sparse(model, x, mode=mode)
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    def interrupted(model, converted, taken, *rest):
        convert.swap(model, taken)
        raise KeyboardInterrupt

    forced(monkeypatch, model=interrupted)
    model = wide()
    layers = list(model)
    with pytest.raises(KeyboardInterrupt):
        sk.convert_to_sparse(model, torch.randn(4, 512))
    assert list(model) == layers


def test_inputs_may_be_any_mapping(monkeypatch):
    """What a tokenizer returns is a Mapping, but no dict."""
    from collections import UserDict

    forced(monkeypatch)
    model = sk.convert_to_sparse(wide(), UserDict(input=torch.randn(4, 512)))
    assert sk.report(model).n_sparse == 2
    with pytest.raises(TypeError, match="convert_to_sparse: expected example_inputs to be"):
        sk.convert_to_sparse(wide(), 3)


def test_round_trip_to_dense(monkeypatch):
    forced(monkeypatch)
    model, x = wide(), torch.randn(4, 512)
    before = copy.deepcopy(model)
    sk.convert_to_sparse(model, x)
    assert kinds(model).count("CSRWeight") == 2
    assert sk.to_dense(model) is model
    for (name, a), (_, b) in zip(
        before.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert kinds(model) == kinds(before)


def test_single_layer_model(monkeypatch):
    forced(monkeypatch)
    layer, x = sparsified(nn.Linear(64, 32)), torch.randn(3, 64)
    sparse = sk.convert_to_sparse(layer, x)
    assert isinstance(sparse, sk.SparseLinear) and sk.report(sparse).n_sparse == 1
    torch.testing.assert_close(sparse(x), layer(x))
    back = sk.to_dense(sparse)
    assert isinstance(back, nn.Linear) and torch.equal(back.weight, layer.weight)


def test_shared_modules_and_tied_weights(monkeypatch):
    forced(monkeypatch)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(64, 64)
            self.blocks = nn.ModuleList([self.shared, self.shared, nn.Linear(64, 64)])
            self.tied = nn.Linear(64, 64)
            self.tied.weight = self.blocks[2].weight
            self.embedding = nn.Embedding(64, 64)
            self.head = nn.Linear(64, 64, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            for block in (*self.blocks, self.tied, self.head):
                x = block(x)
            return x

    model, x = sparsified(Tied()), torch.randn(5, 64)
    want = model(x)
    sk.convert_to_sparse(model, x)
    assert isinstance(model.shared, sk.SparseLinear)
    assert model.shared is model.blocks[0] is model.blocks[1]
    assert model.tied.weight is model.blocks[2].weight and model.tied is not model.blocks[2]
    assert type(model.head) is nn.Linear and model.head.weight is model.embedding.weight
    reasons = {row.name: row.reason for row in sk.report(model).layers}
    assert "tied to Embedding" in reasons["head"]
    torch.testing.assert_close(model(x), want)
    sk.to_dense(model)
    assert model.shared is model.blocks[1] and model.tied.weight is model.blocks[2].weight
    assert torch.equal(model(x), want)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Plain(nn.Linear):
    """A subclass without a forward of its own."""


class Obstacles(nn.Module):
    """Layers that must stay dense, and `plain`, which need not."""

    def __init__(self):
        super().__init__()
        self.noisy, self.plain = sparsified(Noisy(16, 16)), sparsified(Plain(16, 16))
        self.hooked, self.unused = sparsified(nn.Linear(16, 16)), sparsified(nn.Linear(16, 16))
        self.hooked.register_forward_hook(lambda *a: None)
        self.low = sparsified(nn.Linear(16, 16).half())
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.pruned = torch_prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.9)
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        return self.plain(self.noisy(x))


def test_layers_that_must_stay_dense_are_named(monkeypatch):
    forced(monkeypatch)
    model, x = Obstacles(), torch.randn(2, 16)
    want = model(x)
    sk.convert_to_sparse(model, x)
    reasons = {row.name: row for row in sk.report(model).layers}
    assert "Noisy has a forward of its own" in reasons["noisy"].reason
    assert reasons["plain"].format == "csr"
    assert "hooks" in reasons["hooked"].reason
    assert "weight is computed" in reasons["normed"].reason
    assert "weight is computed" in reasons["pruned"].reason
    assert "not called in the run" in reasons["unused"].reason
    assert "no kernel for torch.float16" in reasons["low"].reason
    assert "MultiheadAttention reads the weight" in reasons["attention.out_proj"].reason
    torch.testing.assert_close(model(x), want)


def test_transformers_conv1d(monkeypatch):
    transformers = pytest.importorskip("transformers")
    forced(monkeypatch)
    layer = sparsified(transformers.pytorch_utils.Conv1D(24, 16))
    model, x = nn.Sequential(layer), torch.randn(3, 16)
    want = model(x)
    sk.convert_to_sparse(model, x)
    assert isinstance(model[0], sk.SparseLinear) and sk.report(model).layers[0].kind == "Conv1D"
    torch.testing.assert_close(model(x), want)
    sk.to_dense(model)
    assert type(model[0]) is type(layer) and torch.equal(model[0].weight, layer.weight)


def test_convolutions_and_keyword_inputs(monkeypatch):
    forced(monkeypatch)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, image, scale=1.0):
            return {"out": self.norm(self.conv(image)) * scale}

    model = sparsified(Net())
    inputs = {"image": torch.randn(2, 4, 9, 9), "scale": 2.0}
    want = model(**inputs)["out"]
    statistics = model.norm.running_mean.clone()
    model.train()
    sk.convert_to_sparse(model, inputs)
    assert model.training and torch.equal(model.norm.running_mean, statistics)
    assert isinstance(model.conv, sk.SparseConv2d)
    torch.testing.assert_close(model.eval()(**inputs)["out"], want)


def test_without_example_inputs_a_stated_heuristic_decides():
    model = nn.Sequential(sparsified(nn.Linear(64, 64), 0.9), sparsified(nn.Linear(64, 64), 0.5))
    sk.convert_to_sparse(model)
    assert kinds(model) == ["CSRWeight", "Linear"]
    assert "heuristic, no example_inputs" in sk.report(model).layers[0].reason


def test_pattern_is_detected(monkeypatch):
    forced(monkeypatch)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sk.prune(model[0], method="magnitude", sparsity=0.75, pattern="block:16x16", scope="uniform")
    sk.prune(model[1], method="magnitude", sparsity=0.5, pattern="2:4", scope="uniform")
    sk.convert_to_sparse(model, torch.randn(4, 64))
    assert [row.pattern for row in sk.report(model).layers] == ["block:16x16", "2:4"]


def test_report_of_a_model_built_sparse():
    model = nn.Sequential(sk.SparseLinear(8, 8, sparsity=0.5))
    (row,) = sk.report(model).layers
    assert row.format == "csr" and row.dense_ms is None and "not timed" in row.reason


def test_report_survives_copies(monkeypatch):
    forced(monkeypatch)
    model = sk.convert_to_sparse(wide(), torch.randn(4, 512))
    assert sk.report(copy.deepcopy(model)).n_sparse == 2
    assert json.loads(json.dumps(sk.report(model).to_dict()))["mode"] == "inference"


def test_converting_twice_changes_nothing(monkeypatch):
    forced(monkeypatch)
    model = nn.Sequential(wide(), nn.Linear(512, 8))
    sk.convert_to_sparse(model, torch.randn(4, 512))
    layers = list(model[0])
    sk.convert_to_sparse(model, torch.randn(4, 512))
    assert list(model[0]) == layers


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("model to be a torch.nn.Module, got int", lambda: sk.convert_to_sparse(3)),
        ("mode to be 'inference' or 'training', got 'x'",
         lambda: sk.convert_to_sparse(nn.Linear(2, 2), mode="x")),
        ("min_gain > 0, got 0", lambda: sk.convert_to_sparse(nn.Linear(2, 2), min_gain=0)),
        ("dense linear or convolution layers, got one with none",
         lambda: sk.convert_to_sparse(nn.Sequential(nn.ReLU()))),
        ("all layers on one device, got cpu, meta",
         lambda: sk.convert_to_sparse(
             nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))),
        ("with cuda_graphs=True, got cpu, 'inference' and Tensor",
         lambda: sk.convert_to_sparse(nn.Linear(2, 2), torch.zeros(1, 2), cuda_graphs=True)),
    ],
)  # fmt: skip
def test_bad_arguments(message, call):
    with pytest.raises(ValueError, match=f"convert_to_sparse: expected .*{message}"):
        call()


def test_nan_weights_are_refused_and_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite weights, got NaN or Inf in layer '1'"):
        sk.convert_to_sparse(model, torch.randn(2, 4))


def test_a_failing_run_leaves_the_model_alone():
    model = wide()
    layers = list(model)
    with pytest.raises(RuntimeError):
        sk.convert_to_sparse(model, torch.randn(2, 7))
    assert list(model) == layers and not model[0]._forward_pre_hooks


def test_without_kernels_nothing_is_converted(monkeypatch):
    """The plain torch reference is never faster than dense, so a threshold must not choose it."""
    from sparsekern import sites

    monkeypatch.setattr(sites, "_C", None)
    model = sk.convert_to_sparse(wide())
    assert "CSRWeight" not in kinds(model)
    assert "not compiled, see `sparsekern doctor`" in sk.report(model).layers[0].reason

"""Whole models on a GPU: moves, graphs, streams, threads, conversion, files."""

import copy
import io
import threading

import pytest
import torch
from gpu_common import check_close
from torch import nn

import sparsekern as sk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMATS = [("unstructured", 0.8), ("2:4", 0.5), ("block:32x32", 0.5), ("vector:4x1", 0.8)]


def net(pattern="unstructured", sparsity=0.8, dtype=torch.float32):
    """Three sparse layers, one of them a convolution."""
    torch.manual_seed(0)
    options = {"pattern": pattern, "sparsity": sparsity, "dtype": dtype}
    return nn.Sequential(
        sk.SparseConv2d(32, 64, 3, padding=1, **options),
        nn.ReLU(),
        nn.Flatten(),
        sk.SparseLinear(64 * 16, 256, activation="gelu", **options),
        sk.SparseLinear(256, 64, **options),
    ).eval()


def images(count=2, dtype=torch.float32):
    return torch.randn(count, 32, 4, 4, dtype=dtype)


def exact(model, x):
    return copy.deepcopy(model).cpu().double()(x.cpu().double()).detach()


@pytest.mark.parametrize(("pattern", "sparsity"), FORMATS)
def test_to_the_gpu_and_back_is_exact(pattern, sparsity):
    model, x = net(pattern, sparsity), images()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    want = model(x).detach()
    model.cuda()
    check_close(model(x.cuda()), exact(model, x), tf32=True)
    model.cpu()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize(("pattern", "sparsity"), FORMATS)
def test_training_survives_a_move(pattern, sparsity):
    model, x = net(pattern, sparsity), images()
    for module in model:
        if hasattr(module, "prepare_training"):
            module.prepare_training()
    model.cuda()
    (got,) = torch.autograd.grad(model(x.cuda()).square().sum(), [model[0].weight.values])
    model.cpu()
    (want,) = torch.autograd.grad(model(x).square().sum(), [model[0].weight.values])
    check_close(got, want.double(), slack=10.0, tf32=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("pattern", "sparsity"), FORMATS)
def test_a_change_of_dtype_on_the_gpu(pattern, sparsity, dtype):
    model = net(pattern, sparsity).cuda().to(dtype)
    x = images(dtype=dtype)
    check_close(model(x.cuda()), exact(model, x), slack=2.0)


@pytest.mark.parametrize(("pattern", "sparsity"), FORMATS)
def test_copies_and_pickles(pattern, sparsity):
    model, x = net(pattern, sparsity).cuda(), images().cuda()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize(("pattern", "sparsity"), FORMATS)
def test_files_know_no_device(pattern, sparsity, tmp_path):
    model, fresh, x = net(pattern, sparsity).cuda(), net(pattern, sparsity), images()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    sk.save(model, tmp_path / "m.safetensors")
    sk.load(fresh, tmp_path / "m.safetensors")
    check_close(fresh.cuda()(x.cuda()), exact(model, x), tf32=True)


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(("pattern", "sparsity"), FORMATS)
def test_a_cuda_graph_holds_the_forward_pass(pattern, sparsity, tokens):
    """No wait for the device and no memory from outside the pool, at any size."""
    model = net(pattern, sparsity, torch.bfloat16).cuda()
    x, y = images(tokens, torch.bfloat16).cuda(), images(tokens, torch.bfloat16).cuda()
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        x.copy_(y)
        graph.replay()
        torch.testing.assert_close(out, model(y))


@pytest.mark.parametrize(("pattern", "sparsity"), FORMATS)
def test_work_follows_the_current_stream(pattern, sparsity):
    """The input is written late on a stream of its own; a kernel elsewhere would read the old."""
    model = net(pattern, sparsity).cuda()
    late, want = images(8).cuda(), images(8).cuda()
    with torch.inference_mode():
        expected = model(want)
        model(late)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(want)
            got = model(late)
        stream.synchronize()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("pattern", "sparsity"), FORMATS)
def test_two_threads(pattern, sparsity):
    """Handles and plans belong to a thread; each works on a stream of its own."""
    model, inputs = net(pattern, sparsity).cuda(), [images(n).cuda() for n in (3, 70)]
    with torch.inference_mode():
        want = [model(x) for x in inputs]
    torch.cuda.synchronize()
    failures = []

    def work(x, expected):
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(30):
                    torch.testing.assert_close(model(x), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, want)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("pattern", "sparsity"), FORMATS)
def test_on_the_second_gpu_while_the_first_is_current(pattern, sparsity):
    model, x = net(pattern, sparsity).to("cuda:1"), images()
    check_close(model(x.to("cuda:1")), exact(model, x), tf32=True)


def test_compiled_model_has_no_break():
    torch._dynamo.reset()
    model, x = net().cuda(), images(4).cuda()
    with torch.inference_mode():
        got = torch.compile(model, fullgraph=True)(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_autocast():
    model, x = net(dtype=torch.bfloat16).cuda(), images(4).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = model(x)
    check_close(got, exact(model, x.bfloat16()), slack=3.0)


# The converter


def wide(pattern="unstructured", sparsity=0.95, width=2048):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, width), nn.ReLU(), nn.Linear(width, 512)).eval().cuda()
    sk.prune(model, sparsity=sparsity, pattern=pattern)
    return model


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.95), ("2:4", 0.5), ("block:64x64", 0.9)]
)
def test_conversion_keeps_the_outputs_and_says_what_it_did(pattern, sparsity, mode):
    model = wide(pattern, sparsity).bfloat16()
    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    want = exact(model, x)
    dense = copy.deepcopy(model)
    converted = sk.convert_to_sparse(model, x, mode=mode)
    report = sk.report(converted)
    check_close(converted(x), want, slack=2.0)
    for row in report.layers:
        # Timed, or with the reason why not; never a kernel that gave up in silence.
        assert row.dense_ms is not None or "no " in row.reason or "does not run" in row.reason, row
        assert "its result is off" not in row.reason, row
    back = sk.to_dense(converted)
    for got, old in zip(back.parameters(), dense.parameters(), strict=True):
        assert torch.equal(got, old)


def test_conversion_by_replays_of_cuda_graphs():
    """Few tokens: launches do not count, and the memory of the weights does."""
    model = wide("2:4", 0.5, width=4096).bfloat16()
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    want = exact(model, x)
    converted = sk.convert_to_sparse(model, x, cache=False, cuda_graphs=True)
    report = sk.report(converted)
    check_close(converted(x), want, slack=2.0)
    assert all(row.dense_ms is not None for row in report.layers), report
    assert report.model_dense_ms or not report.n_sparse


def test_a_layer_without_a_kernel_stays_dense():
    model = wide().double()
    x = torch.randn(8, 512, device="cuda", dtype=torch.float64)
    report = sk.report(sk.convert_to_sparse(model, x))
    assert report.n_sparse == 0 and "no kernel for torch.float64" in report.layers[0].reason


def test_without_inputs_all_stays_dense():
    report = sk.report(sk.convert_to_sparse(wide()))
    assert report.n_sparse == 0 and "not timed: pass example_inputs" in report.layers[0].reason


def test_converted_on_the_cpu_and_moved():
    x = torch.randn(64, 512)
    model = sk.convert_to_sparse(wide().cpu(), x)
    check_close(model.cuda()(x.cuda()), exact(model, x))


def test_converted_model_in_a_graph():
    model = wide("block:64x64", 0.9).bfloat16()
    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    model = sk.convert_to_sparse(model, x)
    with torch.inference_mode():
        want = model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
        torch.testing.assert_close(out, want)


def test_comparison_and_doctor():
    dense = wide().bfloat16()
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    sparse = sk.convert_to_sparse(copy.deepcopy(dense), x)
    result = sk.compare(dense, sparse, x, budget_s=0.2, energy_window_s=0.3)
    assert "ms" in result.table()
    assert sk.doctor(quiet=True)["parts"]["GPU"]["available"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("activations", ["float", "dynamic"])
def test_quantized_2_of_4(activations, dtype):
    """The same numbers as on the CPU, in inference mode, under a graph, after a move."""
    model = nn.Sequential(*[sk.SparseLinear(512, 512, pattern="2:4") for _ in range(2)]).eval()
    x = torch.randn(96, 512)
    sk.quantize(model, x, dtype, activations)
    want = model(x).double().detach()
    model.cuda()
    with torch.inference_mode():
        for _ in range(2):
            check_close(model(x.cuda()), want, slack=10.0, tf32=True)
        graph, y = torch.cuda.CUDAGraph(), x.cuda()
        with torch.cuda.graph(graph):
            out = model(y)
        graph.replay()
        check_close(out, want, slack=10.0, tf32=True)


@pytest.mark.parametrize("pattern", ["2:4", "2:4T"])
def test_srste_products(pattern):
    """Losses with 2:4 products fall like those of dense products of the same masks."""
    x = torch.randn(128, 256, device="cuda")
    goal, losses = torch.randn(128, 64, device="cuda"), {}
    for products in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        pruner = sk.Pruner(model, optimizer, "srste", pattern=pattern, products=products)
        losses[products] = []
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = nn.functional.mse_loss(model(x).float(), goal)
            loss.backward()
            optimizer.step()
            pruner.step()
            losses[products].append(loss.item())
        pruner.finalize()
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)

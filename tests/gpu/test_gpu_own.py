"""Our CUDA kernels for few tokens on a card: sizes of real layers, streams, graphs, threads."""

import threading

import pytest
import torch
from gpu_common import check_close
from samples import csr_of, random_nm, random_weight

from sparsekern.ops import own_check, own_cuda
from sparsekern.ops.cuda_packed import Packed
from sparsekern.ops.nm import nm_to_dense

FAULT = own_cuda.build_fault() if torch.cuda.is_available() else "no CUDA device"
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(bool(FAULT), reason=FAULT or "nothing is missing"),
]
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = [(4096, 4096), (1000, 14336), (131, 300), (33, 50)]


def nm_problem(tokens, rows, cols, dtype):
    values, index = random_nm(rows, cols, 2, 4)
    values = values.to(dtype)
    x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
    weight = nm_to_dense("test", values, index, cols, 2, 4).double()
    want = torch.nn.functional.linear(x.double(), weight, bias.double()).relu()
    return [t.cuda() for t in (x, values, index, bias)], want


def csr_problem(tokens, rows, cols, sparsity, dtype):
    weight = random_weight(rows, cols, sparsity).to(dtype)
    values, crow, col = csr_of(weight)
    x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).relu()
    return [t.cuda() for t in (x, values, crow, col, bias)], want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_at_first_use_finds_nothing(dtype):
    assert own_check.faults(torch.zeros(1, device="cuda", dtype=dtype), CAPABILITY) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_four(shape, dtype):
    for tokens in (1, 8, 13, 32, 64):
        (x, values, index, bias), want = nm_problem(tokens, *shape, dtype)
        held = Packed()
        for way, cluster in own_cuda.nm_ways(x, shape[0], CAPABILITY).items():
            y = own_cuda.nm_linear(x, values, index, bias, "relu", held, cluster)
            check_close(y, want, f"{way} T={tokens}", terms=shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unstructured(shape, sparsity, dtype):
    for tokens in (1, 2, 4, 8, 16, 64):
        (x, *weight, bias), want = csr_problem(tokens, *shape, sparsity, dtype)
        for way in ("gather", "2:4 + rest"):
            y = own_cuda.csr_linear(way, x, *weight, bias, "relu", Packed())
            check_close(y, want, f"{way} T={tokens}", terms=shape[1])


def test_a_graph_sees_a_new_weight():
    (x, values, index, bias), want = nm_problem(4, 256, 512, torch.bfloat16)
    held = Packed()
    run = lambda: own_cuda.nm_linear(x, values, index, bias, "relu", held, False)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        check_close(run(), want)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    graph.replay()
    check_close(y, want)
    values.zero_()
    run()  # packs in place
    graph.replay()
    assert torch.equal(y, bias.relu().expand(4, -1))


def test_a_new_thread_runs_on_the_right_device():
    """It starts on device 0 and without a context."""
    (x, values, index, bias), want = nm_problem(4, 256, 512, torch.bfloat16)
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    x, values, index, bias = (t.to(device) for t in (x, values, index, bias))
    found = []

    def work():
        found.append(own_cuda.nm_linear(x, values, index, bias, "relu", Packed(), False))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    check_close(found[0], want)


def test_results_repeat_bit_for_bit():
    (x, *weight, bias), _ = csr_problem(8, 512, 4096, 0.6, torch.bfloat16)
    held = Packed()
    runs = [
        own_cuda.csr_linear("2:4 + rest", x, *weight, bias, "gelu", held).clone() for _ in range(5)
    ]
    assert all(torch.equal(runs[0], r) for r in runs)

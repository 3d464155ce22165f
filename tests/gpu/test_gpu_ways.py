"""Every way an op has to compute its product, not only the one that wins on this card."""

import pytest
import torch
from gpu_common import DTYPES, check_close, on_cpu, poison, run
from samples import csr_of, random_nm, random_weight

from sparsekern.ops import csr, csr_cuda, nm, nm_cuda, own_cuda

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

    monkeypatch.setattr(csr_cuda, "run_fastest", run_all)
    monkeypatch.setattr(nm_cuda, "run_fastest", run_all)
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

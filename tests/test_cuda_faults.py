"""What is said where a GPU, a library or a weight does not do, asked with facts made up here."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch

import sparsekern as sk
from sparsekern import _load
from sparsekern.ops import (
    cslt,
    csr_cuda,
    cuda_libraries,
    cuda_support,
    nm_cuda,
    own_check,
    own_cuda,
)
from sparsekern.ops._library import _stating
from sparsekern.ops.cuda_libraries import CUSPARSE, CUSPARSELT
from sparsekern.ops.cuda_support import Device

H200 = Device("NVIDIA H200", (9, 0))


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (H200, ""),
        (Device("GTX 1080", (6, 1)), "expected a GPU of compute capability 8.0 or newer, got 6.1 "
         "(GTX 1080)"),
        (Device("MI300X", (9, 4), hip=True), "expected an NVIDIA GPU, got MI300X (ROCm)"),
    ],
)  # fmt: skip
def test_devices(device, said):
    assert cuda_support.device_fault(device, (8, 0)) == said


def test_a_missing_half_says_why(monkeypatch):
    monkeypatch.setattr(_load, "cuda_half", lambda: (None, "undefined symbol: aoti_torch"))
    said = "expected the compiled CUDA half, got none: undefined symbol: aoti_torch"
    assert csr_cuda.cusparse_fault(H200) == said
    assert cslt.library_fault(H200) == said


def built(kernels):
    return lambda: (SimpleNamespace(build_info=lambda: {"kernels": kernels}), "")


def test_missing_kernels_say_why(monkeypatch):
    monkeypatch.setattr(_load, "cuda_half", built("nvcc failed"))
    said = "expected CUDA kernels compiled by nvcc, got none: nvcc failed"
    assert own_cuda.kernel_fault(H200) == own_cuda.build_fault() == said
    assert sk.doctor(quiet=True)["parts"]["GPU kernels for few tokens"]["detail"] == said
    old = Device("GTX 1080", (6, 1))
    assert own_cuda.kernel_fault(old).startswith("expected a GPU of compute capability 8.0")
    monkeypatch.setattr(_load, "cuda_half", built(""))
    assert own_cuda.kernel_fault(H200) == ""
    assert sk.doctor(quiet=True)["parts"]["GPU kernels for few tokens"]["available"]


@pytest.mark.parametrize("op", ["nm_linear", "csr_linear"])
def test_ops_state_that_kernels_are_missing(op, monkeypatch):
    module, ask = {
        "nm_linear": (nm_cuda, lambda x: nm_cuda._own_ways(x, None, CROW_COL[0], *NONE, 2, 4, "")),
        "csr_linear": (csr_cuda, lambda x: csr_cuda._own_ways(x, None, *CROW_COL, None, "")),
    }[op]
    for where in (module, own_check):
        monkeypatch.setattr(where, "device_facts", lambda index: H200)
    monkeypatch.setattr(own_cuda, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_load, "cuda_half", built("nvcc failed"))
    cuda_support._STATED.clear()
    with pytest.warns(RuntimeWarning, match=f"{op} goes without our CUDA kernels: expected CUDA"):
        assert not ask(torch.zeros(3, 16).bfloat16())


NONE = (None, None)
CROW_COL = (torch.arange(0, 33, 4, dtype=torch.int32), torch.arange(4).repeat(8).int())


@pytest.mark.parametrize(
    ("tokens", "dtype", "rows", "taken"),
    [
        (1, torch.bfloat16, 8, True),
        (64, torch.float16, 8, True),
        (65, torch.bfloat16, 8, False),
        (1, torch.float32, 8, False),
        (1, torch.bfloat16, 1 << 24, False),
    ],
)
def test_what_our_kernels_take(tokens, dtype, rows, taken):
    assert own_cuda.takes(torch.zeros(tokens, 16, dtype=dtype), rows) == taken


@pytest.mark.parametrize(
    ("tokens", "density", "ways"),
    [
        (1, 0.05, ["gather"]),
        (16, 0.3, ["gather", "2:4 + rest"]),
        (17, 0.3, ["2:4 + rest"]),
        (8, 0.6, ["2:4 + rest"]),
        (8, 0.9, []),
    ],
)
def test_densities_that_our_kernels_are_for(tokens, density, ways):
    x = torch.zeros(tokens, 100)
    assert own_cuda.csr_ways(x, 10, round(density * 1000)) == ways


def test_clusters_are_for_hopper_and_later(monkeypatch):
    monkeypatch.setattr(own_cuda, "multiprocessors", lambda device: 132)
    ways = {"mma.sp": False, "mma.sp cluster": True}
    x = torch.zeros(64, 4096)
    assert own_cuda.nm_ways(x, 4096, (9, 0)) == own_cuda.nm_ways(x, 4096, (10, 0)) == ways
    assert list(own_cuda.nm_ways(x, 4096, (8, 9))) == ["mma.sp"]
    assert list(own_cuda.nm_ways(x, 128 * 132, (9, 0))) == ["mma.sp"]  # nothing is cut
    assert list(own_cuda.nm_ways(x, 128, (9, 0))) == ["mma.sp"]  # 16 parts


def test_sums_are_cut_where_blocks_are_few():
    # Rows of a block: 32 up to 8 tokens, 64 up to 16, then 128.
    assert own_cuda.nm_split(8, 4096, 4096, 132) == 1
    assert own_cuda.nm_split(8, 1024, 8192, 132) == 4
    assert own_cuda.nm_split(64, 4096, 4096, 132) == 4
    assert own_cuda.nm_split(64, 128, 128, 132) == 1  # nothing to cut
    for cols in (128, 4096, 11008, 14336):  # no part is empty
        split = own_cuda.nm_split(1, 32, cols, 132)
        chunks = -(-cols // 1024)
        assert (split - 1) * -(-chunks // split) < chunks


@pytest.mark.parametrize(
    ("library", "version", "said"),
    [
        (CUSPARSE, (12, 6, 3), ""),
        (CUSPARSELT, (0, 8, 1), ""),
        (CUSPARSELT, (0, 10, 0), ""),
        (CUSPARSELT, (0, 6, 2), "expected cuSPARSELt 0.8 or newer, got 0.6.2"),
        (CUSPARSE, (11, 7, 5), "expected cuSPARSE 12.0 or newer, got 11.7.5"),
    ],
)
def test_versions(library, version, said):
    assert cuda_libraries.version_fault(library, version) == said


def test_a_missing_library_says_what_was_tried(monkeypatch):
    monkeypatch.setattr(cuda_libraries, "library_places", lambda library: ["libnowhere.so.7"])
    version, said = cuda_libraries.find_library.__wrapped__(CUSPARSELT)
    assert version is None
    assert said.startswith("expected cuSPARSELt 0.8 or newer, got none: libnowhere.so.7")


@pytest.mark.parametrize(
    ("dtype", "rows", "cols", "pattern", "said"),
    [
        (torch.bfloat16, 64, 48, (2, 4), ""),
        (torch.int8, 64, 96, (2, 4), ""),
        (
            torch.float8_e4m3fn,
            64,
            48,
            (2, 4),
            "expected sizes that are multiples of 32, got 64 x 48",
        ),
        (torch.bfloat16, 64, 48, (4, 8), "expected a 2:4 weight in torch.bfloat16, got 4:8"),
        (torch.float32, 64, 48, (2, 4), "expected a 1:2 weight in torch.float32, got 2:4"),
        (
            torch.float32,
            64,
            48,
            (1, 2),
            "expected float32 products that may be rounded to TF32, got full precision",
        ),
        (
            torch.float64,
            64,
            48,
            (2, 4),
            "expected a weight of float32, float16, bfloat16, int8 or float8, got torch.float64",
        ),
        (torch.float16, 64, 40, (2, 4), "expected sizes that are multiples of 16, got 64 x 40"),
        (torch.float16, 65, 48, (2, 4), "expected sizes that are multiples of 16, got 65 x 48"),
    ],
)
def test_weights_for_cusparselt(dtype, rows, cols, pattern, said):
    assert cslt.weight_fault(dtype, rows, cols, *pattern) == said


def test_a_float16_probe_that_fails_is_told_and_not_repeated(monkeypatch):
    """Here the probe fails because there is no GPU; on some it is an illegal instruction."""
    monkeypatch.setattr(cslt.sys, "executable", "/bin/false")
    said = cslt.float16_fault.__wrapped__(0)
    assert said == "expected a float16 product of cuSPARSELt to work, got exit status 1"
    monkeypatch.setattr(cslt.sys, "executable", "/nowhere/python")
    assert cslt.float16_fault.__wrapped__(0).endswith("got FileNotFoundError")


def test_split_k_is_tried_where_it_is_safe():
    best = [3, 1, 1, 0]
    assert cslt.split_candidates(best, (9, 0), 4096, 4096) == [best]
    few = cslt.split_candidates(best, (9, 0), 4096, 64)
    assert few[0] == best and [3, 4, 2, 3] in few and [3, -1, 1, 0] in few
    # Segment-K can hang elsewhere, and for few outputs.
    for capability, rows in (((8, 0), 4096), ((10, 0), 4096), ((9, 0), 399)):
        assert all(c[1] > 0 for c in cslt.split_candidates(best, capability, rows, 64))


def test_a_slower_path_is_stated_once():
    cuda_support._STATED.clear()
    run, elsewhere = (
        _stating("csr_linear", lambda x: 7),
        SimpleNamespace(device=torch.device("mps")),
    )
    with pytest.warns(RuntimeWarning, match="sparsekern: csr_linear multiplies dense on mps"):
        assert run(elsewhere) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(elsewhere) == run(torch.zeros(1)) == 7


def csr_arguments():
    x, values = torch.ones(2, 3), torch.ones(4)
    crow, col = (torch.tensor(i, dtype=torch.int32) for i in ([0, 2, 4], [0, 1, 0, 2]))
    return {"x": x, "values": values, "crow": crow, "col": col}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"values": torch.ones(4).half()}, "values of the dtype of x (torch.float32), got"),
        ({"col": torch.zeros(4, dtype=torch.int64)}, "col of dtype torch.int32, got torch.int64"),
        ({"crow": torch.zeros(3, dtype=torch.int32, device="meta")},
         "crow on the device of x (cpu), got meta"),
        ({"col": torch.zeros(3, dtype=torch.int32)}, "col of 4 entries, got 3"),
        ({"bias": torch.ones(3)}, "bias of shape (2,), got (3,)"),
        ({"bias": torch.ones(2).double()}, "bias of dtype torch.float32, got torch.float64"),
        ({"activation": "swish"}, "activation to be none, relu, relu6, gelu or gelu_tanh"),
    ],
)  # fmt: skip
def test_csr_arguments(change, said):
    with pytest.raises(RuntimeError, match=re.escape(f"csr_linear: expected {said}")):
        csr_cuda._linear(**{**csr_arguments(), **change})


def test_csr_gradient_arguments():
    x, _, crow, col = csr_arguments().values()
    with pytest.raises(RuntimeError, match=r"grad\.size\(-1\) = out_features = 2, got 5"):
        csr_cuda._grad_input(torch.ones(2, 5), torch.ones(4), crow, col, None, 3)
    with pytest.raises(RuntimeError, match=r"expected grad of shape \(2, 2\), got"):
        csr_cuda._grad_values(torch.ones(7, 2), x, crow, col, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"values": torch.ones(4, 4).half()}, "values of the dtype of x (torch.float32), got"),
        ({"values": torch.ones(4, 3)}, "values of shape (4, 4), got (4, 3)"),
        (
            {"index": torch.zeros(4, 1, dtype=torch.int8)},
            "index of dtype torch.uint8, got torch.int8",
        ),
        ({"bias": torch.ones(3)}, "bias of shape (4,), got (3,)"),
    ],
)
def test_nm_arguments(change, said):
    index = torch.zeros(4, 1, dtype=torch.uint8)
    given = {"x": torch.ones(2, 8), "values": torch.ones(4, 4), "index": index, "bias": None}
    with pytest.raises(RuntimeError, match=re.escape(f"nm_linear: expected {said}")):
        nm_cuda._linear(**{**given, **change}, plan=None, plan_t=None, n=2, m=4)


def test_nm_gradient_arguments():
    index = torch.zeros(4, 1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"expected grad of shape \(2, 4\), got \(2, 5\)"):
        nm_cuda._grad_values(torch.ones(2, 5), torch.ones(2, 8), index, None, 2, 4)


def test_plans_follow_the_weight_to_another_device(monkeypatch):
    """The move itself needs a GPU; that it makes the plans again does not."""
    weight = sk.CSRWeight.from_dense(torch.randn(8, 16)).prepare_training()
    before, before_t = weight.plan, weight.plan_t
    where = iter(["cpu", "cuda", "cuda", "cuda"])
    monkeypatch.setattr(
        sk.CSRWeight, "_plan_depends", lambda self: (torch.device(next(where)), False)
    )
    weight.float()
    assert weight.plan is not before and weight.plan_t is not before_t
    assert torch.equal(weight.plan, before) and torch.equal(weight.plan_t, before_t)
    moved = weight.plan
    weight.float()
    assert weight.plan is moved


def test_a_weight_from_the_meta_device_waits_for_its_contents():
    layer = sk.SparseLinear(16, 8, sparsity=0.5)
    layer.to("meta")
    layer.to_empty(device="cpu")  # whatever lies in memory is no pattern
    other = sk.SparseLinear(16, 8, sparsity=0.5)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), other(x))

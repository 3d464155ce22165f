"""Who takes part at a point on a GPU: cuBLAS and cuDNN, torch's own sparse paths, ours.

Each builder gets a problem and gives the bytes of the weight it reads and a function that makes one
more copy of it, as a call to time. What is not there, does not fit or computes something else is
left out by name, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import baselines
import rounds
import torch
import torch.nn.functional as F
from cases import Problem
from torch import Tensor

from gpu import clocks
from sparsekern import quantize
from sparsekern.device import format_fault
from sparsekern.ops.nm_ste import nm_ste_linear

# Largest accepted error over the largest exact output. float32 includes what TF32 does to it.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3}
EIGHT_BITS = 0.1  # of values and tokens of 8 bits, whose error is a result and no fault
OURS = baselines.OURS
Call = Callable[[], object]
Built = tuple[int, Callable[[], Call]]


@dataclass(frozen=True)
class Side:
    """One contestant, ready to be timed; `clock` says how, `calls` are its copies."""

    name: str
    role: str
    sample: rounds.Sampler
    clock: str
    error: float
    weight_bytes: int
    calls: list[Call]


def nbytes(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def tf32(on: bool):
    """Whether float32 products may round their operands to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def cublas(p: Problem) -> Built:
    """What nn.Linear runs."""

    def build() -> Call:
        weight = p.weight.clone()
        return lambda: F.linear(p.x, weight, p.bias)

    return nbytes(p.weight), build


def cublas_tf32(p: Problem) -> Built:
    """The same with TF32."""
    if p.x.dtype != torch.float32:
        raise TypeError("float32 only")
    size, build = cublas(p)

    def rounded() -> Call:
        call = build()

        def run():
            with tf32(True):
                return call()

        return run

    return size, rounded


def compiled(p: Problem) -> Built:
    """torch.compile, free to try its own templates against cuBLAS."""

    def build() -> Call:
        weight, bias = p.weight.clone(), p.bias
        call = torch.compile(
            lambda x: F.linear(x, weight, bias), mode="max-autotune-no-cudagraphs", dynamic=False
        )
        return lambda: call(p.x)

    return nbytes(p.weight), build


def cudnn(p: Problem, layout: torch.memory_format = torch.contiguous_format) -> Built:
    """What nn.Conv2d runs, after cuDNN has tried its algorithms."""
    torch.backends.cudnn.benchmark = True
    x = p.x.contiguous(memory_format=layout)

    def build() -> Call:
        weight = p.weight.clone().contiguous(memory_format=layout)
        return lambda: p.case.apply(x, weight, p.bias)

    return nbytes(p.weight), build


def cudnn_channels_last(p: Problem) -> Built:
    """As `cudnn`, in channels_last."""
    return cudnn(p, torch.channels_last)


def autograd(p: Problem) -> Built:
    """Forward and backward by torch."""
    return nbytes(p.weight), lambda: baselines.autograd_step(p)


def torch_nm(p: Problem, backend: str = "CUSPARSELT") -> Built:
    """torch's own 2:4 weights."""
    if p.pattern != "2:4":
        raise TypeError("2:4 only")
    made = getattr(torch.sparse, f"SparseSemiStructuredTensor{backend}")

    def build() -> Call:
        weight = made.from_dense(p.weight)
        return lambda: F.linear(p.x, weight, p.bias)

    return nbytes(p.weight) * 9 // 16, build


def torch_nm_cutlass(p: Problem) -> Built:
    """The same by CUTLASS."""
    return torch_nm(p, "CUTLASS")


def torch_bsr(p: Problem) -> Built:
    """torch's Triton kernel for block-sparse weights; its result is a transposed view."""
    from torch.sparse._triton_ops import bsr_dense_addmm

    if not p.pattern.startswith("block:"):
        raise TypeError("blocks only")
    block = tuple(int(n) for n in p.pattern.split(":")[1].split("x"))
    bias = p.bias.unsqueeze(1).expand(-1, len(p.x))  # it adds whole tiles

    def build() -> Call:
        weight = p.weight.to_sparse_bsr(block)
        return lambda: bsr_dense_addmm(bias, weight, p.x.t()).t()

    return p.nnz * p.x.element_size(), build


def torch_csr(p: Problem) -> Built:
    """torch.sparse: cuSPARSE as torch calls it."""
    if p.pattern != "unstructured":
        raise TypeError("unstructured only")
    bias = p.bias.unsqueeze(1)

    def build() -> Call:
        weight = p.weight.to_sparse_csr()
        weight = torch.sparse_csr_tensor(
            weight.crow_indices().int(), weight.col_indices().int(), weight.values(), weight.shape
        )
        return lambda: torch.addmm(bias.expand(-1, p.case.tokens), weight, p.x.t()).t()

    return p.nnz * (p.x.element_size() + 4), build


def ours(p: Problem, layout: torch.memory_format = torch.contiguous_format) -> Built:
    """Our layer, module overhead included."""
    layer = baselines.sparse_layer(p)
    kind = "Linear" if p.case.kind == "linear" else "Conv2d"
    if fault := format_fault(layer.weight.format, kind, p.x.device):
        raise RuntimeError(fault)
    size = nbytes(layer.weight.values, *layer.weight.indices())
    if p.case.training:
        return size, lambda: baselines.sparse_call(p)
    x = p.x.contiguous(memory_format=layout) if p.x.dim() == 4 else p.x

    def build() -> Call:
        twin = copy.deepcopy(layer)
        return lambda: twin(x)

    return size, build


def ours_channels_last(p: Problem) -> Built:
    """As `ours`, the image in channels_last."""
    return ours(p, torch.channels_last)


def ours_8_bits(p: Problem, dtype: torch.dtype = torch.int8) -> Built:
    """Our 2:4 layer with values of 8 bits and tokens rounded to 8 bits; another result, so apart.

    Its error against exact weights and tokens is what it costs.
    """
    if p.pattern not in ("2:4", "2:4T") or p.x.dtype != torch.bfloat16:
        raise TypeError("2:4 in bfloat16 only")
    layer = baselines.sparse_layer(p).eval()
    quantize(layer, dtype=dtype, activations="dynamic")
    size = nbytes(layer.weight.values, layer.weight.scales, *layer.weight.indices())

    def build() -> Call:
        twin = copy.deepcopy(layer)
        return lambda: twin(p.x)

    return size, build


def ours_float8(p: Problem) -> Built:
    """The same in float8 e4m3."""
    if p.x.is_cuda and torch.cuda.get_device_capability(p.x.device) < (8, 9):
        raise TypeError("compute capability 8.9 and later only")
    return ours_8_bits(p, torch.float8_e4m3fn)


def pruned_every_step(p: Problem) -> Built:
    """SR-STE's products: pruned and packed in every pass, the weight gradient dense."""
    if p.pattern not in ("2:4", "2:4T"):
        raise TypeError("2:4 only")
    sizes, leaves = (2, 4, p.pattern == "2:4T"), []
    for t in (p.x, p.weight, p.bias):
        leaves.append(t.detach().clone().requires_grad_())

    def build() -> Call:
        return lambda: torch.autograd.grad(nm_ste_linear(*leaves, *sizes), leaves, p.grad)

    return nbytes(p.weight), build


MAKERS: dict[str, list[tuple[str, str, Callable[[Problem], Built]]]] = {
    "linear": [
        ("cuBLAS", "dense", cublas),
        ("cuBLAS TF32", "dense", cublas_tf32),
        ("torch 2:4 cuSPARSELt", "peer", torch_nm),
        ("torch 2:4 CUTLASS", "peer", torch_nm_cutlass),
        ("torch bsr_dense_addmm", "peer", torch_bsr),
        ("torch.sparse CSR", "peer", torch_csr),
        (OURS, "ours", ours),
        (f"{OURS} int8", "8 bits", ours_8_bits),
        (f"{OURS} float8", "8 bits", ours_float8),
    ],
    "conv": [
        ("cuDNN NCHW", "dense", cudnn),
        ("cuDNN channels_last", "dense", cudnn_channels_last),
        (OURS, "ours", ours),
        (f"{OURS} channels_last", "ours", ours_channels_last),
    ],
    "linear training": [
        ("autograd", "dense", autograd),
        (OURS, "ours", ours),
        (f"{OURS} pruned every step", "on the fly", pruned_every_step),
    ],
    "conv training": [("autograd", "dense", autograd), (OURS, "ours", ours)],
}
COMPILED = ("torch.compile", "dense", compiled)


def prepare(p: Problem, with_compiled: bool = False) -> tuple[list[Side], dict[str, str]]:
    """Everything that runs a problem and gets it right; and why the rest is left out."""
    makers = MAKERS[f"{p.case.kind}{' training' if p.case.training else ''}"]
    if with_compiled and p.case.kind == "linear":
        makers = [*makers, COMPILED]
    reference, found, left_out = p.reference(), [], {}
    for name, role, make in makers:
        try:
            found.append(_side(p, name, role, make, reference))
        except TypeError as error:  # not for this pattern or dtype: nothing is missing
            if not str(error).endswith(" only"):
                left_out[name] = baselines.first_line(error)
        except Exception as error:
            left_out[name] = baselines.first_line(error)
    return found, left_out


def _side(p: Problem, name: str, role: str, make, reference) -> Side:
    size, build = make(p)
    calls = [build()]
    limit = EIGHT_BITS if role == "8 bits" else TOLERANCE[p.x.dtype]
    error = checked(calls[0](), name, p, reference, limit)
    calls += [build() for _ in range(clocks.copies_needed(size, p.x.device) - 1)]
    sample, clock = clocks.sampler(calls, p.x.device, graph=not p.case.training)
    return Side(name, role, sample, clock, error, size, calls)


def checked(
    result, name: str, p: Problem, reference: tuple[Tensor, ...], limit: float | None = None
) -> float:
    """Largest error of a result over the largest exact value, per tensor.

    Raises:
        RuntimeError: it is above the limit (by default that of `TOLERANCE`), or not a number.
    """
    worst = 0.0
    for got, exact in zip(result if isinstance(result, tuple) else (result,), reference):
        if got.shape != exact.shape and p.case.training:
            exact = baselines.sparse_layer(p).weight.gather(exact)
        worst = max(worst, baselines.relative_error(got, exact))
    limit = limit or TOLERANCE[p.x.dtype]
    if not worst <= limit:
        raise RuntimeError(f"expected {name} to be right to {limit:g}, got {worst:.1e}")
    return worst

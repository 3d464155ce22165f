"""Everything a point is timed against: the strongest dense kernels of torch, and sparse peers.

A builder gets a problem, does all work that a real user does once (packing weights, changing
layouts) and returns the call to time. Not every build of torch has every kernel, and not every
kernel takes every dtype; a side that cannot run is left out and named with its reason. A side that
runs but gives a wrong result is never timed: the dense and peer sides are left out with that as
their reason, and our own stops the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import rounds
import torch
from cases import Problem
from peers.client import ENGINES, Peer, PeerError
from torch import Tensor

from sparsekern import SparseConv2d, SparseLinear, quantize
from sparsekern.measure import Timing

# Largest accepted error, relative to the largest exact output. Dense and sparse sums differ in
# order only; bfloat16 rounds inputs of the last product and the result to 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
INT8_TOLERANCE = 3e-2  # 8 bits of a value, relative to the largest of its row
OURS = "sparsekern"
INT8 = f"{OURS} int8"
DYNAMIC = f"{OURS} int8 dynamic"

Call = Callable[[], object]


@dataclass(frozen=True)
class Side:
    """One contestant at a point.

    Attributes:
        name: What runs.
        role: `dense`, `peer` (not torch's dense, not ours), `int8` (our layer with int8 values),
            `dense int8` or `ours`.
        sample: Makes calls, each of y, or of (dX, dW, db) when training, and tells their seconds.
        error: Largest error of its result over the largest exact value.
        version: Of an engine in an environment of its own.
    """

    name: str
    role: str
    sample: rounds.Sampler
    error: float
    version: str | None = None


def f_linear(p: Problem) -> Call:
    """What nn.Linear runs: MKL in float32, oneDNN in bfloat16."""
    return lambda: p.case.apply(p.x, p.weight, p.bias)


def mkl_prepacked(p: Problem) -> Call:
    """MKL with the weight packed once, as torch.compile does in float32."""
    packed = torch.ops.mkl._mkl_reorder_linear_weight(p.weight, p.case.tokens)
    op = torch.ops.mkl._mkl_linear
    return lambda: op(p.x, packed, p.weight, p.bias, p.case.tokens)


def onednn_prepacked(p: Problem) -> Call:
    """oneDNN with the weight packed once for this number of tokens."""
    packed = torch.ops.mkldnn._reorder_linear_weight(p.weight, p.case.tokens)
    op = torch.ops.mkldnn._linear_pointwise
    return lambda: op(p.x, packed, p.bias, "none", [], "")


def conv_nchw(p: Problem) -> Call:
    """What nn.Conv2d runs on contiguous input."""
    return lambda: p.case.apply(p.x, p.weight, p.bias)


def conv_channels_last(p: Problem) -> Call:
    """What nn.Conv2d runs on channels_last input and weight; the input comes in that layout."""
    x = p.x.contiguous(memory_format=torch.channels_last)
    weight = p.weight.contiguous(memory_format=torch.channels_last)
    return lambda: p.case.apply(x, weight, p.bias)


def onednn_conv_prepacked(p: Problem) -> Call:
    """oneDNN with the weight packed once for this input, channels_last, as torch.compile does."""
    stride, padding = [p.case.stride] * 2, [p.case.kernel // 2] * 2
    geometry = (padding, stride, [1, 1], p.case.groups)
    x = p.x.contiguous(memory_format=torch.channels_last)
    packed = torch.ops.mkldnn._reorder_convolution_weight(p.weight, *geometry, list(x.shape))
    op = torch.ops.mkldnn._convolution_pointwise
    return lambda: op(x, packed, p.bias, *geometry, "none", [], "")


def autograd_step(p: Problem, layout: torch.memory_format = torch.contiguous_format) -> Call:
    """Forward and backward through torch's autograd, all three gradients."""

    def leaf(t: Tensor) -> Tensor:
        t = t.contiguous(memory_format=layout) if t.dim() == 4 else t
        return t.detach().clone().requires_grad_()

    leaves = [leaf(t) for t in (p.x, p.weight, p.bias)]
    grad = p.grad.contiguous(memory_format=layout) if p.grad.dim() == 4 else p.grad
    return lambda: torch.autograd.grad(p.case.apply(*leaves), leaves, grad)


def autograd_channels_last(p: Problem) -> Call:
    """As `autograd_step`, everything in channels_last."""
    return autograd_step(p, torch.channels_last)


def onednn_products(p: Problem) -> Call:
    """A training step as three oneDNN products without autograd's overhead.

    Nothing is packed ahead: the weight changes with every step.
    """
    op = torch.ops.mkldnn._linear_pointwise

    def step():
        op(p.x, p.weight, p.bias, "none", [], "")
        grad_x = op(p.grad, p.weight.t(), None, "none", [], "")
        grad_w = op(p.grad.t(), p.x.t(), None, "none", [], "")
        return grad_x, grad_w, p.grad.sum(0)

    return step


def torch_csr(p: Problem) -> Call:
    """torch.sparse through F.linear (MKL), int32 indices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "CSR support is in beta", on every start
        csr = p.weight.to_sparse_csr()
        crow, col = csr.crow_indices().int(), csr.col_indices().int()
        weight = torch.sparse_csr_tensor(crow, col, csr.values(), csr.shape)
    return lambda: p.case.apply(p.x, weight, p.bias)


def scipy_csr(p: Problem) -> Call:
    """scipy.sparse; always one thread."""
    import numpy
    from scipy import sparse

    weight = sparse.csr_array(p.weight.numpy())
    x, bias = p.x.numpy(), p.bias.numpy()
    return lambda: torch.from_numpy(numpy.ascontiguousarray((weight @ x.T).T + bias))


DENSE: dict[str, dict[str, Callable[[Problem], Call]]] = {
    "linear": {
        "F.linear": f_linear,
        "MKL prepacked": mkl_prepacked,
        "oneDNN prepacked": onednn_prepacked,
    },
    "conv": {
        "F.conv2d NCHW": conv_nchw,
        "F.conv2d channels_last": conv_channels_last,
        "oneDNN prepacked": onednn_conv_prepacked,
    },
    "linear training": {"F.linear": autograd_step, "oneDNN products": onednn_products},
    "conv training": {
        "F.conv2d NCHW": autograd_step,
        "F.conv2d channels_last": autograd_channels_last,
    },
}
PEERS: dict[str, dict[str, Callable[[Problem], Call]]] = {
    "linear": {"torch.sparse CSR": torch_csr, "scipy CSR": scipy_csr},
}


def sparse_layer(p: Problem) -> SparseLinear | SparseConv2d:
    """Our layer in the format that its zeros suggest (blocks and N:M run through their own)."""
    dense = p.case.layer()
    dense.weight = torch.nn.Parameter(p.weight.clone())
    dense.bias = torch.nn.Parameter(p.bias.clone())
    layer_type = SparseLinear if p.case.kind == "linear" else SparseConv2d
    return layer_type.from_dense(dense)


def sparse_call(p: Problem) -> Call:
    """Our layer as a user calls it, module overhead included."""
    layer = sparse_layer(p)
    if not p.case.training:
        return lambda: layer(p.x)
    layer.prepare_training()
    leaves = [p.x.clone().requires_grad_(), layer.weight.values, layer.bias]
    return lambda: torch.autograd.grad(layer(leaves[0]), leaves, p.grad)


def int8_call(p: Problem, activations: str = "float") -> Call:
    """Our layer with its values as int8; for inference of linear layers."""
    layer = sparse_layer(p).eval()
    report = quantize(layer, activations=activations)
    if report.weight_only:
        raise ValueError("; ".join(report.weight_only.values()))
    return lambda: layer(p.x)


def int8_dynamic_call(p: Problem) -> Call:
    """The same with int8 activations."""
    return int8_call(p, "dynamic")


def dense_int8_call(p: Problem, engine: str) -> Call:
    """torch's dense int8 layer with dynamic activations (per tensor, asymmetric), weight packed.

    The activations stay float: its engines take no bfloat16.
    """
    from torch.ao.nn.quantized import dynamic
    from torch.ao.quantization import per_channel_dynamic_qconfig

    if p.x.dtype != torch.float32:
        raise TypeError("float32 only")
    dense = p.case.layer()
    dense.weight, dense.bias = torch.nn.Parameter(p.weight.clone()), torch.nn.Parameter(p.bias)
    dense.qconfig = per_channel_dynamic_qconfig
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.ao will go
            layer = dynamic.Linear.from_float(dense)
    finally:
        torch.backends.quantized.engine = before
    return lambda: layer(p.x)


QUANTIZED = {
    "linear": {
        **{
            f"int8 {engine}": ("dense int8", partial(dense_int8_call, engine=engine))
            for engine in ("onednn", "fbgemm")
        },
        INT8: ("int8", int8_call),
        DYNAMIC: ("int8", int8_dynamic_call),
    }
}


def sides(p: Problem, peers: bool, int8: bool = False) -> tuple[list[Side], dict[str, str]]:
    """Everything that runs this problem and gets it right, ours last.

    Args:
        p: The problem.
        peers: Whether to add sparse peers.
        int8: Whether to add our layer with int8 values, and torch's dense ones.

    Returns:
        The sides, and for each one left out the reason.

    Raises:
        RuntimeError: our own result is wrong, or no dense side runs.
    """
    key = f"{p.case.kind}{' training' if p.case.training else ''}"
    candidates = [(name, "dense", make) for name, make in DENSE[key].items()]
    if peers:
        candidates += [(name, "peer", make) for name, make in PEERS.get(key, {}).items()]
    if int8:
        candidates += [(name, role, make) for name, (role, make) in QUANTIZED.get(key, {}).items()]
    reference = p.reference()
    found, left_out = [], {}
    for name, role, make in candidates:
        try:
            call = make(p)
            error = checked(call, name, p, reference)
            found.append(Side(name, role, rounds.local(call), error))
        # Whatever a foreign kernel does on a machine it was not made for, the others go on.
        except Exception as error:
            left_out[name] = first_line(error)
    if not any(side.role == "dense" for side in found):
        raise RuntimeError(f"bench: expected a dense side for {p.case.name}, got {left_out}")
    call = sparse_call(p)
    found.append(Side(OURS, "ours", rounds.local(call), checked(call, OURS, p, reference)))
    return found, left_out


def engine_sides(
    p: Problem, names: Iterable[str], stack: ExitStack
) -> tuple[list[Side], dict[str, str]]:
    """The engines that have an environment of their own and get the problem right.

    Args:
        p: The problem.
        names: Of `peers.client.ENGINES`.
        stack: Ends their processes.

    Returns:
        The sides, and for each engine left out the reason.
    """
    job = {"kind": p.case.kind, "threads": torch.get_num_threads(), "training": p.case.training}
    if p.case.kind == "conv":
        job.update(stride=p.case.stride, padding=p.case.kernel // 2, groups=p.case.groups)
    arrays = {"x": p.x, "weight": p.weight, "bias": p.bias}
    if p.case.training:
        arrays["grad"] = p.grad
    reference = p.reference()
    found, left_out = [], {}
    for engine in names:
        name = ENGINES[engine]
        try:
            if p.x.dtype != torch.float32:
                raise TypeError("float32 only")
            peer = stack.enter_context(Peer(engine, job, arrays))
            error = checked(peer.result, name, p, reference)
            found.append(Side(name, "peer", peer.sample, error, peer.version))
        except Exception as error:
            left_out[name] = first_line(error)
    return found, left_out


def time_all(sides: list[Side], left_out: dict[str, str], budget_s: float) -> list[Timing]:
    """Time sides in the same rounds.

    A peer that fails meanwhile moves from `sides` to `left_out`, and the others start again.
    """
    while True:
        try:
            return rounds.interleaved([side.sample for side in sides], budget_s)
        except PeerError as error:
            lost = next(side for side in sides if side.sample == error.peer.sample)
            error.peer.close()
            sides.remove(lost)
            left_out[lost.name] = first_line(error)


def first_line(error: Exception) -> str:
    """What an error says, short enough for a table."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def checked(call: Call, name: str, p: Problem, reference: tuple[Tensor, ...]) -> float:
    """Largest error of the result of a call over the largest exact value, per tensor.

    A weight gradient of ours is compared with the exact one at the stored weights.

    Raises:
        RuntimeError: the error is above `TOLERANCE` (or not a number).
    """
    result = call()
    worst = 0.0
    for got, exact in zip(result if isinstance(result, tuple) else (result,), reference):
        if got.shape != exact.shape:
            exact = sparse_layer(p).weight.gather(exact)
        worst = max(worst, relative_error(got, exact))
    quantized = any(name in group for group in QUANTIZED.values())
    limit = INT8_TOLERANCE if quantized else TOLERANCE[p.x.dtype]
    if not worst <= limit:
        raise RuntimeError(
            f"bench: expected {name} to be right to {limit:g} at {p.case.name}, "
            f"got a relative error of {worst:.1e}"
        )
    return worst


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact value; infinite where one is not a number."""
    if got.shape != exact.shape:
        return float("inf")
    gap = (got.detach().double() - exact).abs().max() / exact.abs().max()
    return float(gap.nan_to_num(nan=float("inf")))

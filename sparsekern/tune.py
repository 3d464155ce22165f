"""Times a layer dense against sparse, and names what a time holds for."""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._load import cpu_isa, native_status
from .measure.graphs import capture
from .measure.hardware import hardware
from .measure.timer import interleaved
from .ops.own_cuda import build_fault
from .traced_state import autocast

MIN_GAIN = 1.05  # sparse must win by 5 % to be taken
# The ways people call a model for inference. They differ by what the host does around a kernel.
WAYS = ("inference_mode", "no_grad", "gradients")
# What a sparse layer may lose against a dense one in another way of calling, by each call: time of
# the host, and part of its own time for what it keeps for gradients, up to a limit.
HOST_MS, KEEPING, KEEPING_MS = 0.1, 0.5, 2.0
# Of the largest output. Kernels meet new cards and libraries on the user's machine; an error beyond
# this is no rounding, not even that of bfloat16.
WRONG = 0.05
MAX_COPIES = 32  # of a layer that is timed on a GPU; smaller layers are timed partly from its L2


class WrongResult(RuntimeError):
    """A kernel computed something else than the dense layer."""


@dataclass(frozen=True)
class InputSpec:
    """Shape of the input of a layer in a run of the model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False

    @classmethod
    def of(cls, x: Tensor) -> InputSpec:
        """Spec of a tensor seen in a run."""
        last = x.dim() == 4 and not x.is_contiguous()
        last = last and x.is_contiguous(memory_format=torch.channels_last)
        return cls(tuple(x.shape), x.dtype, last)

    def make(self, device) -> Tensor:
        """Random tensor of this spec; the global random numbers are not touched."""
        generator = torch.Generator(device).manual_seed(0)
        with torch.inference_mode(False):  # the caller's mode; a gradient may be wanted of it
            x = torch.randn(self.shape, device=device, generator=generator).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


def is_close(dense_ms: float, sparse_ms: float, least: float, calls: int) -> bool:
    """Whether a gain of at least `least` in one way of calling may be less in another one.

    Args:
        dense_ms: Time of all calls.
        sparse_ms: The same, sparse.
        least: Gain that is asked for; what gains less has lost already.
        calls: How many calls of a layer that is.
    """
    wins_by = dense_ms - least * sparse_ms
    may_lose = HOST_MS * calls + min(KEEPING * sparse_ms, KEEPING_MS * calls)
    return 0 <= wins_by < may_lose


@contextmanager
def called(way: str) -> Iterator[None]:
    """Call modules in one of the `WAYS`, or in that of `training`, whatever the caller's is."""
    recorded = way in ("gradients", "training")
    with torch.inference_mode(way == "inference_mode"), torch.set_grad_enabled(recorded):
        yield


def time_layer(
    dense: nn.Module,
    sparse: nn.Module,
    spec: InputSpec,
    way: str,
    budget_s: float,
    cold_bytes: int = 0,
    cuda_graphs: bool = False,
):
    """Milliseconds of one call, (dense, sparse), interleaved.

    `way` is one of the `WAYS`, or `training` for the forward pass and both gradients. With
    gradients on, the input needs them, too, as behind another layer that trains. On a GPU by its
    own clock, so that waiting for it is not counted. For inference copies of each layer take
    turns until their weights reach `cold_bytes`, to be read from memory every time. With
    `cuda_graphs` they are replayed from one, and launches cost nothing.
    """
    device = next(dense.parameters()).device
    x = spec.make(device)
    if way == "training":
        calls = [training_call(layer, x) for layer in (dense, sparse)]
    else:
        if way == "gradients":
            x.requires_grad_()
        copies = [_copies(layer, cold_bytes) for layer in (dense, sparse)]
        calls = [inference_call(layers, x) for layers in copies]
    per_call = [1, 1]
    if cuda_graphs:
        per_call = [len(layers) for layers in copies]
        graphs = [capture([call] * count, device) for call, count in zip(calls, per_call)]
        calls = [graph.replay for graph in graphs]
    on_device = device.type == "cuda"
    with called(way):
        timings = interleaved(calls, budget_s=budget_s, device=device, on_device=on_device)
    return tuple(t.median_ms / count for t, count in zip(timings, per_call))


def _copies(layer: nn.Module, cold_bytes: int) -> list[nn.Module]:
    """The layer, and as many copies as it takes to reach some number of bytes of weights."""
    size = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    count = min(MAX_COPIES, -(-cold_bytes // max(1, size)))
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def inference_call(layers: list[nn.Module], x: Tensor) -> Callable[[], object]:
    """The forward pass of layers in turn, ready to be timed in one of the `WAYS`."""
    turns = itertools.cycle(layers)
    return lambda: next(turns)(x)


def training_call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward pass and the gradients of input and parameters, ready to be timed."""
    with called("training"):
        leaf = x.clone().requires_grad_()
        parameters = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
        grad = torch.ones_like(layer(leaf).detach())

    def call():
        with torch.enable_grad():
            return torch.autograd.grad(layer(leaf), parameters, grad)

    return call


def output_error(dense: nn.Module, sparse: nn.Module, spec: InputSpec, device) -> float:
    """Largest difference of the outputs on random input.

    Raises:
        WrongResult: the outputs have nothing to do with each other.
    """
    x = spec.make(device)
    with torch.inference_mode():
        want = dense(x).double()
        gap = (want - sparse(x).double()).abs()
    if not gap.numel():
        return 0.0
    error, largest = float(gap.max()), float(want.abs().max())
    if not error <= WRONG * largest:
        raise WrongResult(f"its result is off by {error:.1e} where the largest is {largest:.1e}")
    return error


def device_key(device: torch.device) -> str:
    """What a timing holds for: hardware, kernels, threads and versions."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        half = "with" if native_status()["_C_cuda"]["loaded"] else "without"
        own = "without" if build_fault() else "with"
        where = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, {half} _C_cuda"
        where += f", {own} kernels for few tokens"
        where += f", CUDA {torch.version.cuda}, triton {package_version('triton')}"
    else:
        where = f"{hardware()['cpu']}, {cpu_isa()}, {torch.get_num_threads()} threads"
    return f"{where}, {platform.machine()}, torch {torch.__version__}, sparsekern {_version()}"


def _version() -> str:
    from . import __version__

    return __version__


def package_version(name: str) -> str:
    """Version of an installed package, or `none`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def layer_key(layer: nn.Module, spec: InputSpec, how: str) -> str:
    """Name of a timing: everything its time depends on, the density to 1 %; `how` it was timed."""
    weight = layer.weight
    geometry = tuple(getattr(layer, n, None) for n in ("stride", "padding", "dilation", "groups"))
    return repr(
        (
            type(layer).__name__, tuple(weight.shape), round(weight.sparsity, 2), weight.pattern,
            weight.format,
            str(weight.values.dtype), geometry, layer.bias is not None, layer.activation,
            spec.shape, str(spec.dtype), spec.channels_last, how,
            [p.requires_grad for p in (weight.values, layer.bias) if p is not None], autocast(),
        )
    )  # fmt: skip

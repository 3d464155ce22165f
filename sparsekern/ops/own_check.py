"""Whether our CUDA kernels compute on a device what they should: asked once, with small products.

A kernel that was never run on a kind of card may be wrong there without an error. It is then left
out, with its reason; the others stay.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import own_cuda
from .cuda_packed import Packed
from .cuda_support import capturing, device_facts, state_once
from .nm import nm_to_dense, pack_index

# Rows and columns that fill no block. Whole rows go seven times around the ring of a block's shared
# memory, and the last time for half a group of eight columns.
ROWS, COLS = 72, 6148
TOKENS = (1, 2, 4, 8, 16, 32, 64)
LIMIT = 0.02  # of the largest output
TWO_FOUR, LISTS = ("mma.sp", "mma.sp cluster"), ("gather", "2:4 + rest")
_FOUND: dict[tuple, dict[str, str]] = {}


def sound(op: str, names: Iterable[str], x: Tensor) -> list[str]:
    """Those of our ways that can be used for x and are right; says once why the others are not."""
    device = device_facts(x.device.index)
    fault = own_cuda.kernel_fault(device)
    if fault:
        state_once(f"{op} goes without our CUDA kernels: {fault}")
        return []
    wrong = faults(x, device.capability)
    for name in names:
        if name in wrong:
            state_once(f"{op} goes without {name}: {wrong[name]}")
    return [name for name in names if name not in wrong]


def faults(like: Tensor, capability: tuple[int, int]) -> dict[str, str]:
    """The ways that are wrong for the device and dtype of a tensor, and how."""
    key = (like.device, like.dtype)
    if key not in _FOUND:
        if capturing(like):
            reason = "expected one product before the capture, got none"
            return dict.fromkeys((*TWO_FOUR, *LISTS), reason)
        # Inference tensors have no counter of versions.
        with torch.inference_mode(False), torch.no_grad():
            _FOUND[key] = _find(like, capability)
    return _FOUND[key]


def _find(like: Tensor, capability: tuple[int, int]) -> dict[str, str]:
    options = {"device": like.device, "generator": torch.Generator(like.device).manual_seed(0)}
    weights = _two_four(like.dtype, options), _unstructured(like.dtype, options)
    held: dict[str, Packed] = {}
    found: dict[str, str] = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, COLS, **options).to(like.dtype)
        for way, weight, run in _runs(x, weights, held, capability):
            fault = "" if way in found else _fault(run, x, weight)
            if fault:
                found[way] = fault
    return found


def _fault(run, x: Tensor, weight: Tensor) -> str:
    """What is wrong with a product; empty when nothing is."""
    want = x.float() @ weight.float().t()
    try:
        error = float((run().float() - want).abs().max() / want.abs().max())
    except RuntimeError as refused:
        return str(refused).splitlines()[0]
    if error <= LIMIT:
        return ""
    return f"expected a right product for {len(x)} tokens, got an error of {error:.2g}"


def _two_four(dtype: torch.dtype, options: dict) -> tuple[Tensor, Tensor]:
    """Values and index of a weight of random places."""
    places = torch.rand(ROWS, COLS // 4, 4, **options).argsort(2)[..., :2].sort(2).values
    return torch.randn(ROWS, COLS // 2, **options).to(dtype), pack_index(places.flatten(1), 4)


def _unstructured(dtype: torch.dtype, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Values, crow and col of a weight of which two fifths are stored."""
    mask = torch.rand(ROWS, COLS, **options) < 0.4
    crow = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    values = torch.randn(int(crow[-1]), **options).to(dtype)
    return values, crow.to(torch.int32), mask.nonzero()[:, 1].to(torch.int32)


def _runs(x: Tensor, weights: tuple, held: dict[str, Packed], capability: tuple[int, int]):
    """Each way with its dense weight and a call of it; 2:4 with whole rows and with parts."""
    (values, index), (csr_values, crow, col) = weights
    dense = nm_to_dense("nm_linear", values, index, COLS, 2, 4)
    two_four = (x, values, index, None, "none", held.setdefault("2:4", Packed()))
    parts = own_cuda.nm_split(len(x), 1, COLS, own_cuda.MAX_CLUSTER)  # as many as a cluster has
    cuts = [("mma.sp", 1), ("mma.sp", parts)]
    if capability >= own_cuda.CLUSTERS:
        cuts.append(("mma.sp cluster", parts))
    for way, split in cuts:
        cluster = way == "mma.sp cluster"
        yield way, dense, lambda s=split, c=cluster: own_cuda.nm_linear(*two_four, c, s)
    row = torch.repeat_interleave(torch.arange(ROWS, device=x.device), crow.diff().long())
    dense = csr_values.new_zeros(ROWS, COLS).index_put_((row, col.long()), csr_values)
    for way in own_cuda.csr_ways(x, ROWS, col.numel()):
        lists = (way, x, csr_values, crow, col, None, "none", held.setdefault(way, Packed()))
        yield way, dense, lambda given=lists: own_cuda.csr_linear(*given)

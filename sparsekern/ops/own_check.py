"""Whether our CUDA kernels compute on a device what they should: asked once, with small products.

A kernel that was never run on a kind of card may be wrong there without an error. It is then left
out, with its reason.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import own_cuda
from .cuda_packed import Packed
from .cuda_support import capturing
from .nm import nm_to_dense, pack_index

ROWS, COLS = 72, 1160  # rows and columns that fill no block, and sums that are cut
TOKENS = (1, 2, 4, 8, 16, 32, 64)
LIMIT = 0.02  # of the largest output
_FOUND: dict[tuple, str] = {}


def check_fault(like: Tensor, capability: tuple[int, int]) -> str:
    """Say which kernel is wrong for the device and dtype of a tensor; empty when none is."""
    key = (like.device, like.dtype)
    if key not in _FOUND:
        if capturing(like):
            return "expected one product before the capture, got none"
        # Inference tensors have no counter of versions.
        with torch.inference_mode(False), torch.no_grad():
            try:
                _FOUND[key] = _first_fault(like, capability)
            except RuntimeError as error:
                _FOUND[key] = str(error).splitlines()[0]
    return _FOUND[key]


def _first_fault(like: Tensor, capability: tuple[int, int]) -> str:
    options = {"device": like.device, "generator": torch.Generator(like.device).manual_seed(0)}
    weights = _two_four(like.dtype, options), _unstructured(like.dtype, options)
    held: dict[str, Packed] = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, COLS, **options).to(like.dtype)
        for way, weight, run in _runs(x, weights, held, capability):
            want = x.float() @ weight.float().t()
            error = float((run().float() - want).abs().max() / want.abs().max())
            if not error <= LIMIT:
                return (
                    f"expected {way} to be right for {tokens} tokens, got an error of {error:.2g}"
                )
    return ""


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
    """Each way with its dense weight and a call of it."""
    (values, index), (csr_values, crow, col) = weights
    dense = nm_to_dense("nm_linear", values, index, COLS, 2, 4)
    for way, cluster in own_cuda.nm_ways(x, ROWS, capability).items():
        two_four = (x, values, index, None, "none", held.setdefault("2:4", Packed()), cluster)
        yield way, dense, lambda given=two_four: own_cuda.nm_linear(*given)
    row = torch.repeat_interleave(torch.arange(ROWS, device=x.device), crow.diff().long())
    dense = csr_values.new_zeros(ROWS, COLS).index_put_((row, col.long()), csr_values)
    for way in own_cuda.csr_ways(x, ROWS, col.numel()):
        lists = (way, x, csr_values, crow, col, None, "none", held.setdefault(way, Packed()))
        yield way, dense, lambda given=lists: own_cuda.csr_linear(*given)

"""2:4 products through cuSPARSELt: packed weights, padding, the search for an algorithm.

Called with CUDA tensors only, below autograd. The compiled half keeps the library's plans.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys

import torch
from torch import Tensor

from . import cuda_packed
from .block_tuning import precision
from .cuda_choice import ROUNDS, elapsed_ms, token_bucket
from .cuda_libraries import CUSPARSELT, find_library
from .cuda_packed import Packed
from .cuda_support import capturing, device_fault, half_fault, refuse, state_once

_OPS = torch.ops.sparsekern
# Segment-K has hung in cusparseLtMatmulPlanInit on other devices and with fewer outputs.
SEGMENT_K, SEGMENT_K_CAPABILITY, SEGMENT_K_ROWS = -1, (9, 0), 400
SPLIT_TOKENS = 512  # with more tokens there are tiles enough without splitting
PROBE_S = 300
BYTES = (torch.int8, torch.float8_e4m3fn)
_ALGORITHMS: dict[tuple, list[int]] = {}
_FUSED_GELU: dict[tuple, str] = {}


def library_fault(device) -> str:
    """Say why cuSPARSELt cannot be used on a device (see `Device`); empty when it can."""
    return device_fault(device, (8, 0)) or half_fault() or find_library(CUSPARSELT)[1]


def weight_fault(dtype: torch.dtype, rows: int, cols: int, n: int, m: int) -> str:
    """Say why a weight is none for cuSPARSELt; empty when it is one.

    Its tensor cores keep one of two in float32, not two of four, and round both operands to TF32
    (10 bits behind the point), which has to be allowed as for dense products.
    """
    pattern = (1, 2) if dtype == torch.float32 else (2, 4)
    if (n, m) != pattern:
        return f"expected a {pattern[0]}:{pattern[1]} weight in {dtype}, got {n}:{m}"
    if dtype == torch.float32 and precision(dtype) != "tf32":
        return "expected float32 products that may be rounded to TF32, got full precision"
    if dtype not in (torch.float16, torch.bfloat16, *BYTES, torch.float32):
        return f"expected a weight of float32, float16, bfloat16, int8 or float8, got {dtype}"
    unit = 32 if dtype in BYTES else 16
    if rows % unit or cols % unit:
        return f"expected sizes that are multiples of {unit}, got {rows} x {cols}"
    return ""


@functools.cache
def float16_fault(index: int) -> str:
    """Say that float16 fails here; runs a product in a process of its own, once.

    On an H100 an illegal instruction was seen (cuSPARSELt 0.8.1), which would leave this process
    without its GPU.
    """
    code = f"from sparsekern.ops.cslt import self_test; self_test({index})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"expected a float16 product of cuSPARSELt to work, got {type(error).__name__}"
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"expected a float16 product of cuSPARSELt to work, got {last}"


def self_test(index: int, dtype: torch.dtype = torch.float16) -> None:
    """A small product on a device against the dense one; raises when it is wrong."""
    with torch.cuda.device(index):
        x, weight = _probe_operands(dtype, torch.device("cuda", index))
        y = _product(x, pack(weight), None, weight.shape[0], 0, [])
        torch.testing.assert_close(y.float(), x.float() @ weight.float().t(), rtol=0.02, atol=0.02)


def _probe_operands(dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """Small numbers x `(64, 64)` and a 2:4 weight `(512, 64)`."""
    generator = torch.Generator(device).manual_seed(0)
    weight, x = (torch.randn(r, 64, device=device, generator=generator) for r in (512, 64))
    weight[:, 1::4], weight[:, 2::4] = 0, 0
    return (x / 4).to(dtype), (weight / 4).to(dtype)


def pack(dense: Tensor, into: Tensor | None = None) -> Tensor:
    """The packed form, uint8, of a dense weight that is 2:4 and has no -0.0."""
    if into is None:
        into = torch.empty(_OPS._cslt_packed_bytes(dense), dtype=torch.uint8, device=dense.device)
    _OPS._cslt_compress(dense, into)
    return into


def packed_weight(held: Packed, values: Tensor, make_dense) -> Tensor:
    """The packed weight, made again when the values changed (see cuda_packed)."""

    def renew(old):
        dense = make_dense()
        if old is None and not capturing(values) and int(_OPS._cslt_prune_check(dense)):
            refuse("nm_linear", "a 2:4 weight", "one that cuSPARSELt finds to be none")
        return (pack(dense, old[0] if old else None),)

    return cuda_packed.packed_weight(held, values, renew)[0]


def padded_tokens(x: Tensor, unit: int = 8) -> Tensor:
    """Extend x `(tokens, in)` to tokens up to a multiple of `unit`, whose contents do not matter.

    Nothing is copied where the storage has room behind the last token, as results of this file do.
    """
    tokens, cols = x.shape
    wanted = tokens + -tokens % unit
    if wanted == tokens:
        return x
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    if room >= wanted * cols:
        return x.as_strided((wanted, cols), (cols, 1))
    out = x.new_empty(wanted, cols)
    out[:tokens] = x
    return out


def _product(x, packed, bias, rows: int, activation: int, algorithm: list[int]) -> Tensor:
    return _OPS._cslt_linear(x, packed, bias, rows, activation, 1.0, _result(x), algorithm)


def _result(x: Tensor) -> torch.dtype:
    """What products of x come out in: sums of 8-bit numbers fit the range of bfloat16."""
    return torch.bfloat16 if x.dtype in BYTES else x.dtype


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, activation: str) -> Tensor:
    """act(x W^T + b) for x `(tokens, in)` and a packed weight; `(tokens, rows)`.

    bfloat16 for x of 8 bits, else the dtype of x.
    """
    from ._library import activate

    fused = _fused_code(x, activation)
    padded = padded_tokens(x, 16 if x.dtype in BYTES else 8)
    algorithm = _algorithm(padded, packed, bias, rows, fused)
    y = _product(padded, packed, bias, rows, fused, algorithm).narrow(0, 0, x.shape[0])
    return y if fused or activation == "none" else activate(y, activation, "nm_linear")


def _fused_code(x: Tensor, activation: str) -> int:
    """The library's number of an activation, 0 where it is applied afterwards."""
    if activation == "relu":
        return 1
    key = (x.device.index, x.dtype)
    if activation.startswith("gelu") and key not in _FUSED_GELU and not capturing(x):
        _FUSED_GELU[key] = _which_gelu(x)
    return 2 if activation == _FUSED_GELU.get(key) else 0


def _which_gelu(like: Tensor) -> str:
    """The activation that the library's GELU is, for this dtype; empty when it has none.

    Not documented for 16-bit types: so it is asked, and compared with both formulas.
    """
    x, weight = _probe_operands(like.dtype, like.device)
    try:
        have = _product(x, pack(weight), None, weight.shape[0], 2, []).float()
    except RuntimeError:
        return ""
    y = x.float() @ weight.float().t()
    errors = {
        name: (torch.nn.functional.gelu(y, approximate=kind) - have).abs().max().item()
        for name, kind in (("gelu", "none"), ("gelu_tanh", "tanh"))
    }
    best = min(errors, key=errors.__getitem__)
    # Half a unit in the last place of the largest output; the formulas differ by 5e-4 at most.
    return best if errors[best] <= torch.finfo(x.dtype).eps * y.abs().max().item() else ""


def _algorithm(x, packed, bias, rows: int, activation: int) -> list[int]:
    """The four attributes of the fastest algorithm found; empty: the library's default."""
    key = (x.device.index, x.dtype, rows, x.shape[1], token_bucket(x.shape[0]), bias is not None)
    key = (*key, activation)
    if key not in _ALGORITHMS and not capturing(x):
        _ALGORITHMS[key] = _search(x, packed, bias, rows, activation)
    return _ALGORITHMS.get(key, [])


def split_candidates(best: list[int], capability, rows: int, tokens: int) -> list[list[int]]:
    """Algorithms to time beside the one found: the same one with K split, where that is safe."""
    found = [best]
    if tokens <= SPLIT_TOKENS:
        # (parts, mode: 1 one kernel, 2 two kernels, buffers)
        found += [[best[0], parts, mode, parts - 1] for parts in (2, 4, 8) for mode in (1, 2)]
        if capability == SEGMENT_K_CAPABILITY and rows >= SEGMENT_K_ROWS:
            found.append([best[0], SEGMENT_K, best[2], best[3]])
    return found


def _search(x, packed, bias, rows: int, activation: int) -> list[int]:
    try:
        best = list(_OPS._cslt_search(x, packed, bias, rows, activation, _result(x)))
    except RuntimeError as error:
        state_once(f"nm_linear takes the default algorithm of cuSPARSELt: {error}")
        return []
    capability = torch.cuda.get_device_capability(x.device)
    samples: dict[tuple, list[float]] = {}
    for candidate in split_candidates(best, capability, rows, x.shape[0]):
        try:
            _product(x, packed, bias, rows, activation, candidate)
        except RuntimeError:
            continue  # not every algorithm can be split
        samples[tuple(candidate)] = []
    for _ in range(ROUNDS):
        for candidate, times in samples.items():
            arguments = (x, packed, bias, rows, activation, list(candidate))
            times.append(elapsed_ms(lambda a=arguments: _product(*a), 10))
    return list(min(samples, key=lambda c: statistics.median(samples[c]))) if samples else []

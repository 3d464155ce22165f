"""What may come of a bad call: the right result, or an error that says what was wrong."""

import math
import re

import torch

EXPECTED = (RuntimeError, ValueError, TypeError, NotImplementedError)
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float64: 1e-9}
_MOST = 2**24  # numbers of a result: to compare larger ones takes the memory of the process


def message_fault(op: str, error: Exception) -> str:
    """Say what an error lacks; empty when it names the op, what was wanted and what came."""
    text = str(error)
    if not isinstance(error, EXPECTED):
        return f"a {type(error).__name__}: {text[:200]}"
    ours = re.match(rf"{op}: expected .+, got .+", text, re.DOTALL)
    # The dispatcher's own words name the op and the argument.
    dispatcher = f"sparsekern::{op}" in text.split("\n")[0]
    return "" if ours or dispatcher else f"a message without its parts: {text[:200]}"


def _close(have: torch.Tensor, want: torch.Tensor) -> bool:
    if have.shape != want.shape or have.dtype != want.dtype:
        return False
    if not have.numel():
        return True
    have, want, kind = have.double(), want.double(), have.dtype
    finite = want.isfinite()
    scale = float(want[finite].abs().max()) if bool(finite.any()) else 1.0
    size = math.sqrt(want.numel())  # a stand-in for the length of the sums
    tolerance = _TOLERANCE[kind] * max(scale, 1e-6) * max(1.0, size / 100)
    # What is infinite or NaN depends on the order of the sums.
    return bool(((have - want).abs() <= tolerance)[finite & have.isfinite()].all())


def result_fault(op: str, result, reference, values: list, exact: list) -> str:
    """Say how a result differs from that of the reference for `exact`; empty when it does not."""
    results = result if isinstance(result, tuple) else (result,)
    meta = [t.device.type == "meta" for t in values if isinstance(t, torch.Tensor)]
    if any(meta):
        kinds = {r.device.type for r in results}
        return "" if all(meta) and kinds == {"meta"} else f"numbers from meta tensors, on {kinds}"
    try:
        want = reference(*exact)
    except EXPECTED as error:
        if "that torch can compute with" in str(error):  # torch's own limits: memory, oneDNN
            return ""
        return f"a result where the reference refuses: {str(error)[:200]}"
    if op.endswith("_plan") or any(r.numel() > _MOST for r in results):
        return ""
    wants = want if isinstance(want, tuple) else (want,)
    return "" if all(map(_close, results, wants)) else "another result than the reference"

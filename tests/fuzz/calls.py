"""Target `calls`: every op with one or two spoilt arguments."""

import torch

from sparsekern.ops import _library

from .oracle import EXPECTED, message_fault, result_fault
from .spoil import INDICES, spoil
from .valid import OPS, valid


def _spoilt(op: str, rng):
    """Arguments by name, and what was done to them. Plans hold what `plans` spoils."""
    a = valid(op, rng)
    ways = []
    for name in rng.sample(list(a), min(len(a), rng.choice([0, 1, 1, 1, 1, 2]))):
        way, a[name] = spoil(name, a[name], rng)
        ways.append(f"{name}:{way}")
        if name in INDICES:  # without a plan that vouches for what it was made of
            a.update({plan: None for plan in ("plan", "plan_t") if plan in a})
    return a, ways


def run(rng) -> tuple[str, str]:
    """One case: what it was, and its fault, empty when there is none."""
    op = rng.choice(OPS)
    a, ways = _spoilt(op, rng)
    label, values = f"{op} {' '.join(ways)}", list(a.values())
    # A reference has no use for a plan, whatever it is.
    exact = [None if name in ("plan", "plan_t") else v for name, v in a.items()]
    try:
        result = getattr(torch.ops.sparsekern, op)(*values)
    except Exception as error:
        if not ways and isinstance(error, EXPECTED):
            return label, f"a valid call refused: {str(error)[:200]}"
        return label, message_fault(op, error)
    return label, result_fault(op, result, _library.REFERENCES[op], values, exact)

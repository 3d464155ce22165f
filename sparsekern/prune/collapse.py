"""Layer collapse: a layer of which next to nothing is left, while others keep much more."""

import sys
import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from .targets import Layer

# Of the average share of kept weights. Global rankings spread layers by less than this: what lies
# below, and reaches less than a tenth of its outputs or inputs, no longer passes a signal on.
SMALL = 0.1
INSIDE = ("sparsekern", "torch")


def warn_of_collapse(
    op: str, layers: Sequence[Layer], masks: Sequence[Tensor], scope, told: set[str] | None = None
) -> None:
    """Warn of layers that keep less than a tenth of the average, and of their outputs or inputs.

    Tanaka et al. 2020, arXiv:2006.05467: a layer that passes nothing on ends the network, however
    many weights the others keep. A dict for `scope` asks for what it gets; it is not warned of.

    Args:
        op: Who warns.
        layers: The layers, with what was alive before.
        masks: What they keep, boolean `(out, in, *kernel)`.
        scope: The scope.
        told: Layers that were named before; the ones named now are added.
    """
    if isinstance(scope, Mapping):
        return
    told = set() if told is None else told
    kept = [int(mask.count_nonzero()) for mask in masks]
    average = sum(kept) / max(1, sum(mask.numel() for mask in masks))
    small = []
    for layer, mask, count in zip(layers, masks, kept, strict=True):
        before = mask.numel() if layer.alive is None else int(layer.alive.count_nonzero())
        # No pruning empties a layer: one that keeps nothing had nothing before.
        is_small = 0 < count < min(before, SMALL * average * mask.numel())
        if is_small and _reach(mask) < SMALL and layer.name not in told:
            told.add(layer.name)
            small.append(f"{layer.name or '(model)'!r} ({count:,} of {mask.numel():,})")
    if small:
        other = "scope='uniform', 'erk' or 'lamp'"
        avoids = "smaller units of the pattern" if scope == "uniform" else other
        warnings.warn(
            f"{op}: expected every layer to keep enough weights to pass a signal on, got a "
            f"collapse of {', '.join(small)}; {avoids} may avoid it, or as scope a dict that gives "
            "these layers a sparsity of their own",
            stacklevel=_callers(),
        )


def _callers() -> int:
    """How far up the first frame is that is neither ours nor torch's: the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        frame, level = frame.f_back, level + 1
    return level


def _reach(mask: Tensor) -> float:
    """Share of outputs or of inputs that have a weight, the smaller one."""
    rows = mask.flatten(2).any(2) if mask.ndim > 2 else mask
    return min(float(rows.any(axis).float().mean()) for axis in (0, 1))

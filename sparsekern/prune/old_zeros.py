"""Zeros that a model brings along when a Pruner is made: what becomes of them, and what to say."""

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from ..patterns import Pattern
from .methods.base import Method
from .schedules import Schedule
from .slots import Slot
from .targets import Layer

# A fresh layer has hardly any zeros; one in a hundred is no accident.
PRUNED = 0.01
NAMED = 5  # layers that a warning names


def zeros_in(layer: Layer) -> int:
    """Count the weights of a layer that are 0."""
    return layer.weight.numel() - int(layer.weight.count_nonzero())


def share_of_zeros(layers: Sequence[Layer]) -> float:
    """Share of zeros over all layers together."""
    return sum(map(zeros_in, layers)) / sum(layer.weight.numel() for layer in layers)


def alive_in(slot: Slot, method: Method, pruned: bool) -> Tensor | None:
    """What of a layer an update may keep; None if that is everything.

    Args:
        slot: A layer; of a method whose weights return, with the values put back.
        method: Those that regrow take weights anywhere.
        pruned: The Pruner has pruned before, so that the mask tells what was dropped.
    """
    if method.regrows:
        return slot.mask.clone() if pruned and not method.returning else None
    nonzero = slot.layer.weight != 0
    if pruned:
        return nonzero | slot.mask if method.returning else slot.mask.clone()
    # A layer that starts at 0 everywhere was not pruned; it has yet to train.
    return nonzero if bool(nonzero.any()) and not bool(nonzero.all()) else None


def _pruned_layers(model: nn.Module, layers: Sequence[Layer]) -> dict[str, tuple[int, int]]:
    """Zeros and weights of the layers that were pruned, by name.

    Not of those that start at 0 everywhere or as an identity, and without the padding rows of tied
    embeddings.
    """
    padded = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    padded = [m for m in padded if m.padding_idx is not None]
    pruned = {}
    for layer in layers:
        memory, total = layer.weight.data_ptr(), layer.weight.numel()
        zeros = fresh = zeros_in(layer)
        for embedding in padded:
            if embedding.weight.data_ptr() == memory:
                row = embedding.weight[embedding.padding_idx]
                fresh -= row.numel() - int(row.count_nonzero())
        if PRUNED * total < fresh and zeros < total and not _is_of_one_value(layer):
            pruned[layer.name] = zeros, total
    return pruned


def _is_of_one_value(layer: Layer) -> bool:
    """Say whether all weights that are not 0 are equal, as in an identity to start from."""
    values = layer.weight[layer.weight != 0]
    return bool((values == values[0]).all())


def warn_of_start(
    model: nn.Module, layers: Sequence[Layer], method: Method, schedule: Schedule
) -> None:
    """Say what the start of a schedule undoes of the zeros that are there, and how to avoid it."""
    pruned = {} if method.keeps else _pruned_layers(model, layers)
    if not pruned:
        return
    present = share_of_zeros(layers)
    start = schedule.sparsity(0) if schedule.is_update(0) else 0.0
    dense, lower = start == 0, start < present - PRUNED
    if method.starts_anywhere and not dense:
        what = (
            f"method draws its first masks without regard to the zeros that are there "
            f"(sparsity {present:.4g})"
        )
    elif lower and (dense or method.regrows):
        what = (
            f"schedule starts at step 0 with sparsity {start:.4g}, but the model is at "
            f"{present:.4g}: training undoes its zeros"
        )
    elif lower:
        what = (
            f"schedule starts at step 0 with sparsity {start:.4g}, but the model is at "
            f"{present:.4g}: its zeros stay, and more go only once the schedule is above that"
        )
    else:
        return
    warnings.warn(
        f"Pruner: the {what}, in {_list(pruned)}. To resume a training, load the old pruner's "
        "state_dict() by load_state_dict(); to keep the zeros that are there, use method='keep'; "
        f"to prune on from them, start the schedule at {present:.4g}",
        stacklevel=3,
    )


def _list(pruned: dict[str, tuple[int, int]]) -> str:
    named = list(pruned.items())[:NAMED]
    text = ", ".join(f"layer {n!r} {z:,} of {total:,} zeros" for n, (z, total) in named)
    rest = len(pruned) - len(named)
    return f"{text} and {rest} more layers" if rest else text


def check_keep(
    layers: Sequence[Layer],
    pattern: Pattern,
    sparsity: float | None,
    schedule: Schedule | None,
    scope,
) -> None:
    """Refuse what contradicts method "keep"; warn if there is nothing to keep.

    Raises:
        ValueError: A schedule or a scope; a sparsity or a pattern that the weights do not have.
    """
    for name, value in (("schedule", schedule), ("scope", scope)):
        if value is not None:
            raise ValueError(
                f"Pruner: expected no {name} with method 'keep', which keeps the zeros that are "
                f"there, got {value!r}"
            )
    present = share_of_zeros(layers)
    if sparsity is not None and abs(sparsity - present) > PRUNED / 10:
        raise ValueError(
            f"Pruner: expected no sparsity with method 'keep', or that of the weights "
            f"({present:.4g}), got {sparsity!r}"
        )
    for layer in layers:
        if zeros_in(layer) and not pattern.verify(layer.weight):
            raise ValueError(
                f"Pruner: expected zeros in pattern {pattern} in layer {layer.name!r}, which "
                "method 'keep' was given, got others; leave the pattern out to keep any"
            )
    if present == 1:
        raise ValueError(
            "Pruner: expected weights that are not 0 for method 'keep', got only zeros"
        )
    dead = [la.name for la in layers if zeros_in(la) == la.weight.numel()]
    if any(la.module.weight.requires_grad for la in layers if la.name in dead):
        warnings.warn(
            f"Pruner: method 'keep' keeps all weights of {dead} at 0, as they are; if those layers "
            "have yet to train, name them in ignore",
            stacklevel=3,
        )
    if not present:
        warnings.warn(
            "Pruner: method 'keep' found no zeros to keep; load the pruned weights, or this "
            "pruner's state, before training",
            stacklevel=3,
        )

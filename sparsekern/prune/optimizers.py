"""Optimizers as they come: one or several, bare or in wrappers."""

from collections.abc import Iterable, Sequence

from torch.optim import Optimizer

from .slots import Slot

# Where wrappers keep what they wrap: accelerate, DeepSpeed, Lightning and apex; torch's
# ZeroRedundancyOptimizer; SAM; containers of several.
INNER = ("optimizer", "optim", "base_optimizer", "optimizers")


def listed(optimizer) -> list:
    """List what was given for `optimizer`, one or several.

    Raises:
        TypeError: Something that is, and holds, no optimizer of torch.
        ValueError: An empty list, or one optimizer twice.
    """
    several = isinstance(optimizer, list | tuple)
    given = list(optimizer) if several else [optimizer]
    if not given:
        raise ValueError("Pruner: expected at least one optimizer, got an empty list")
    for each in given:
        if not chain(each):
            wanted = "optimizers of torch.optim" if several else "a torch.optim.Optimizer"
            raise TypeError(f"Pruner: expected {wanted}, got {type(each).__name__}")
    if len({id(each) for each in given}) < len(given):
        raise ValueError("Pruner: expected each optimizer once, got one twice")
    return given


def chain(optimizer) -> list[Optimizer]:
    """List the torch optimizers that a wrapper comes down to, the outermost first.

    A wrapper that never called `Optimizer.__init__` (accelerate's) takes no hooks; it is looked
    through. All others count, since a step may be asked of any of them.
    """
    found, ahead, seen = [], [optimizer], set()
    while ahead:
        each = ahead.pop(0)
        if id(each) in seen or not _is_like_optimizer(each):
            continue
        seen.add(id(each))
        if isinstance(each, Optimizer) and "_optimizer_step_pre_hooks" in vars(each):
            found.append(each)
        for name in INNER:
            inner = getattr(each, name, None)
            ahead += inner if isinstance(inner, list | tuple) else [inner]
    return found


def _is_like_optimizer(value) -> bool:
    # A learning-rate scheduler has an `optimizer`, too, but no groups.
    return callable(getattr(value, "step", None)) and hasattr(value, "param_groups")


def held_by(optimizer: Optimizer, slots: Iterable[Slot]) -> list[Slot]:
    """List the layers of which an optimizer holds the weight now; groups may have been added."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        slot
        for slot in slots
        if id(slot.layer.module.weight) in held or any(id(p) in held for p in slot.parameters)
    ]


def check_all_held(optimizers: Sequence, slots: Sequence[Slot]) -> None:
    """Refuse layers that train and that none of the optimizers holds.

    Raises:
        ValueError: Such layers, by name, or optimizers that hold no weight at all.
    """
    flat = [real for each in optimizers for real in chain(each)]
    held = {id(slot) for real in flat for slot in held_by(real, slots)}
    if not held:
        raise ValueError(
            "Pruner: expected an optimizer that holds weights of the model, got one that holds "
            "none of them"
        )
    loose = [
        slot.layer.name
        for slot in slots
        if id(slot) not in held and any(p.requires_grad for p in slot.parameters)
    ]
    if loose:
        raise ValueError(
            f"Pruner: expected optimizers that hold every pruned layer that trains, got none for "
            f"{loose}; pass all of them, as optimizer=[first, second], name these layers in "
            "ignore, or freeze them by requires_grad_(False)"
        )

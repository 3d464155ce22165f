"""Loading a Pruner's state: what it must be, and taking back the update of step 0."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..patterns import Pattern
from .slots import Slot

FORMAT = 1
KEYS = ("format", "method", "pattern", "steps", "stepped", "pruned", "generator", "layers")


def check_state(state: Mapping, method: str, pattern: Pattern, slots: Sequence[Slot]) -> None:
    """Refuse a state of another method, pattern or set of layers, and one that lacks something."""
    if lost := [key for key in KEYS if key not in state]:
        raise ValueError(f"Pruner.load_state_dict: expected a state with {lost}, got none")
    names = [slot.layer.name for slot in slots]
    own = {"format": FORMAT, "method": method, "pattern": str(pattern)}
    for key, wanted in (*own.items(), ("layers", names)):
        got = list(state["layers"]) if key == "layers" else state.get(key)
        if got != wanted:
            raise ValueError(f"Pruner.load_state_dict: expected {key} {wanted!r}, got {got!r}")


class Undo:
    """Copies of weights, and of the optimizers' state of them, from before the first update.

    What was loaded before the Pruner was made goes through its first update; what was loaded after
    is new, which the version of a tensor tells.
    """

    def __init__(self, slots: Sequence[Slot], optimizers: Sequence[Optimizer]):
        """Copy everything the update may change."""
        self._copies = [(tensor, tensor.detach().clone()) for tensor in _tensors(slots, optimizers)]
        self._versions: list[int] = []

    def updated(self) -> None:
        """Take note that the update is done."""
        self._versions = [tensor._version for tensor, _ in self._copies]

    @torch.no_grad()
    def run(self) -> None:
        """Put back what nothing has changed since."""
        for (tensor, before), version in zip(self._copies, self._versions):
            if tensor._version == version:
                tensor.copy_(before)


def _tensors(slots: Sequence[Slot], optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    for slot in slots:
        yield slot.layer.module.weight
        for optimizer in optimizers:
            yield from slot.state_in(optimizer)

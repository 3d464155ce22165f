"""What the methods that score by gradients share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..targets import Layer
from ..task import Task


def mean_gradients(task: Task, layers: Sequence[Layer], temperature: float = 1.0) -> list[Tensor]:
    """Mean gradient over the batches, one `(out, in, *kernel)` per layer."""
    sums: list[Tensor] = []
    for loss in task.losses(temperature):
        found = task.gradients(loss, layers)
        sums = [s + g for s, g in zip(sums, found)] if sums else found
    return [s.div(len(task.batches)) for s in sums]


def check_count(name: str, value) -> None:
    """Refuse anything but an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"prune: expected {name} to be an int >= 1, got {value!r}")


def rademacher(shape: torch.Size, generator: torch.Generator, like: Tensor) -> Tensor:
    """Random signs, drawn on the CPU so that every device gets the same."""
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return signs.to(like.device, like.dtype)

"""Data that scores look at: batches in one form, whatever the user has."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Inputs of one call of the model, and the target if one was given."""

    args: tuple
    kwargs: dict
    target: Any = None


def read_batches(data) -> list[Batch]:
    """Turn an iterable of data into batches, held in memory.

    An item is an input or a pair `(input, target)`, also as the list a DataLoader yields; an input
    is a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Raises:
        TypeError: `data` is no iterable, or an item is none of these.
        ValueError: There is no item.
    """
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        got = type(data).__name__
        raise TypeError(f"prune: expected data to be an iterable of batches, got {got}")
    batches = [_read_item(item) for item in data]
    if not batches:
        raise ValueError("prune: expected data with at least one batch, got none")
    return batches


def _read_item(item) -> Batch:
    target = None
    if isinstance(item, tuple | list):
        if len(item) not in (1, 2):
            raise TypeError(
                "prune: expected each batch to be an input or a pair (input, target), with several "
                f"inputs as ((a, b), target); got a {type(item).__name__} of {len(item)}"
            )
        item, target = item if len(item) == 2 else (item[0], None)
    if isinstance(item, Mapping):
        return Batch((), dict(item), target)
    if isinstance(item, tuple | list):
        return Batch(tuple(item), {}, target)
    if not isinstance(item, Tensor):
        got = type(item).__name__
        raise TypeError(f"prune: expected inputs to be tensors, tuples or dicts, got {got}")
    return Batch((item,), {}, target)

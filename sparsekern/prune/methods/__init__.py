"""The pruning methods, one small file each, by the name that `method=` takes."""

from dataclasses import fields

from .base import Method
from .magnitude import Magnitude
from .random import Random
from .sparsegpt import SparseGPT
from .wanda import Wanda

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "random": Random,
    "sparsegpt": SparseGPT,
    "wanda": Wanda,
}


def make_method(name: str, options: dict) -> Method:
    """Build a method from its name and options.

    Raises:
        ValueError: Unknown name.
        TypeError: Unknown option.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"prune: expected method one of {known}; got {name!r}")
    known = [f.name for f in fields(METHODS[name])]
    for option in options:
        if option not in known:
            names = ", ".join(known)
            raise TypeError(
                f"prune: expected options of method {name!r} among {names}; got {option!r}"
            )
    return METHODS[name](**options)

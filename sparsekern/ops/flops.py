"""What torch.utils.flop_counter counts for an op: 2 x stored weights x tokens (output pixels).

A counter imports Triton, so nothing here imports one: formulas wait until somebody does.
"""

import importlib.util
import sys
from math import prod

_COUNTER = "torch.utils.flop_counter"
_waiting: list = []  # ops, until the counter is there


def register(op) -> None:
    """Let a counter know what an op multiplies: its product is x or grad by stored weights.

    The weights are `values`, the result where they are asked for, or n of every m of `weight`.
    """
    if _COUNTER in sys.modules:
        _tell_counter(op)
        return
    if not _waiting:
        sys.meta_path.insert(0, _Watch())
    _waiting.append(op)


def _tell_counter(op) -> None:
    name = op._schema.name.split("::")[1]
    packet = getattr(sys.modules["torch"].ops.sparsekern, name)
    sys.modules[_COUNTER].register_flop_formula(packet)(_formula(op, conv="conv2d" in name))


def _formula(op, conv: bool):
    names = [argument.name for argument in op._schema.arguments]

    def count(*shapes, out_shape, **more):
        """Of the arguments, shapes in place of tensors."""
        given = dict(zip(names, shapes, strict=False), **more)
        rows = given.get("grad", out_shape)
        tokens = rows[0] * prod(rows[2:]) if conv else prod(rows[:-1])
        if "weight" in given:
            return 2 * prod(given["weight"]) * given["n"] // given["m"] * tokens
        return 2 * prod(given.get("values", out_shape)) * tokens

    return count


class _Watch:
    """A finder on sys.meta_path that is asked for every import, until that of the counter."""

    def find_spec(self, name, path=None, target=None):
        """The module as anybody else finds it, with our formulas told behind its import."""
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """The loader of the counter, which tells it our formulas in the end."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def exec_module(self, module) -> None:
        """Run the module."""
        self._loader.exec_module(module)
        for op in _waiting:
            _tell_counter(op)

"""A warning for optimizers that were made before a conversion and would train nothing."""

from __future__ import annotations

import gc
import warnings
import weakref

from torch import nn
from torch.optim import Optimizer


def warn_old_optimizers(before: list[nn.Parameter], model: nn.Module) -> None:
    """Let optimizers that hold parameters which the model no longer has warn at their first step.

    Only these optimizers get a hook: torch's hook for all of them must not come and go while other
    threads train.

    Args:
        before: The parameters of the model before the conversion.
        model: The converted model.
    """
    kept = {id(p) for p in model.parameters()}
    replaced = {id(p) for p in before if id(p) not in kept}
    for thing in gc.get_objects() if replaced else ():
        if not issubclass(type(thing), Optimizer):  # no isinstance: it runs code of lazy objects
            continue
        old = [p for p in _parameters_of(thing) if id(p) in replaced]
        if old:
            thing.register_step_pre_hook(_Warning(old))


def _parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    groups = optimizer.__dict__.get("param_groups", ())
    return [p for group in groups for p in group.get("params", ())]


class _Warning:
    """A hook that warns once, if the optimizer still holds what it held."""

    def __init__(self, old: list[nn.Parameter]):
        self._old = [weakref.ref(p) for p in old]

    def __call__(self, optimizer: Optimizer, args, kwargs) -> None:
        old, self._old = {id(p) for ref in self._old if (p := ref()) is not None}, []
        count = sum(id(p) in old for p in _parameters_of(optimizer)) if old else 0
        if count:
            warnings.warn(
                f"convert_to_sparse: this {type(optimizer).__name__} holds {count} parameters that "
                "the conversion replaced, so that it does not train the sparse layers; make the "
                "optimizer after the conversion",
                stacklevel=2,
            )

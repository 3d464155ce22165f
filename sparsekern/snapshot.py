"""The state of a model before a conversion, put back whole when the conversion does not end."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from .conversion import REPORT

_TABLES = (
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_ENTRIES = ("training", "forward", REPORT)


class Snapshot:
    """Everything of a model that a conversion may change; no tensor but statistics is copied."""

    def __init__(self, model: nn.Module):
        self._modules = []
        for module in model.modules():
            state = module.__dict__
            tables = [(state[name], dict(state[name])) for name in _TABLES if name in state]
            entries = {name: state[name] for name in _ENTRIES if name in state}
            self._modules.append((state, tables, entries))
        self._statistics = _statistics(model)

    def restore(self) -> None:
        """The model as it was: the same modules, parameters, hooks, modes and statistics."""
        for state, tables, entries in self._modules:
            for table, before in tables:
                if table != before or list(table) != list(before):
                    table.clear()
                    table.update(before)
            for name in _ENTRIES:
                state.pop(name, None)
            state.update(entries)
        _put_back(self._statistics)


@contextmanager
def whole_or_not_at_all(model: nn.Module):
    """Leave the model as it was when what is inside raises, Ctrl-C at any point included."""
    before = Snapshot(model)
    try:
        yield
    except BaseException:
        try:
            before.restore()
        except KeyboardInterrupt:  # somebody is impatient
            before.restore()
        raise


@contextmanager
def undisturbed(model: nn.Module):
    """Buffers (batch statistics of a model in training mode) come back."""
    before = _statistics(model)
    try:
        yield
    finally:
        _put_back(before)


def _statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers that a run may change, and copies of their values."""
    training = (m for m in model.modules() if m.training)
    buffers = {id(b): b for m in training for b in m.buffers(recurse=False)}
    known = [b for b in buffers.values() if not isinstance(b, UninitializedTensorMixin)]
    return [(buffer, buffer.clone()) for buffer in known if not buffer.is_meta]


def _put_back(statistics: list[tuple[Tensor, Tensor]]) -> None:
    with torch.inference_mode():  # where tensors made under inference_mode can be written, too
        for buffer, values in statistics:
            buffer.copy_(values)

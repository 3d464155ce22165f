"""Files of models whose batch normalisations are folded: names in, the same folding out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .fold import FITTING, NORMS, FoldedNorm, FoldedNormAct, stand_in
from .nn import SparseConv2d, SparseLinear

LAYERS = (*FITTING, SparseLinear, SparseConv2d)


def folded_names(model: nn.Module) -> list[str]:
    """Every name of every normalisation that was folded."""
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if isinstance(module, (FoldedNorm, FoldedNormAct))]


@contextmanager
def folded_like(model: nn.Module, names: list[str], stored) -> Iterator[None]:
    """Fold in `model` what is folded in a file, for the tensors that follow.

    Normalisations of these names become an nn.Identity, and layers without a bias get one where the
    file has it. Undone when the block raises.

    Args:
        model: The model to fill.
        names: Normalisations that are folded in the file.
        stored: Names of all tensors in the file.
    """
    undo: list[tuple[dict, str, object]] = []

    def put(table: dict, key: str, value) -> None:
        undo.append((table, key, table[key]))
        table[key] = value

    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        parent, _, attribute = name.rpartition(".")
        if isinstance(modules.get(name), NORMS) and parent in modules:
            put(modules[parent]._modules, attribute, stand_in(modules[name]))
    for key in stored if undo else ():
        name, _, attribute = key.rpartition(".")
        layer = modules.get(name)
        if attribute == "bias" and isinstance(layer, LAYERS) and layer.bias is None:
            weight = layer.weight
            dtype = getattr(weight, "compute_dtype", weight.dtype)  # int8 weights have float biases
            bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device)
            put(layer._parameters, "bias", nn.Parameter(bias))
    try:
        yield
    except BaseException:
        for table, key, value in reversed(undo):
            table[key] = value
        raise

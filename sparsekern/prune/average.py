"""Averages of a model's weights (EMA, SWA), which mix all masks so far: giving them one mask."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .methods.base import Method, zero_out
from .products import multiply_dense
from .slots import mask_beside, put_beside
from .targets import Layer


@torch.no_grad()
def mask_average(model: nn.Module, layers: Sequence[Layer], method: Method) -> None:
    """Set to zero in a model what is dropped in layers of another; see `Pruner.apply_masks`.

    The masks are those of the Pruner while it is at work, and what is not 0 once it is finalized.
    """
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"Pruner.apply_masks: expected a torch.nn.Module, got {got}")
    inner, found = _counterparts(model, layers)
    for layer, mine in zip(layers, found):
        if mine.module is layer.module:  # the model itself, whose zeros are there
            continue
        mask = _mask_of(layer).to(mine.module.weight.device)
        zero_out(mine, mine.oriented(mask))
        method.settle(inner, mine, mine.oriented(mask))
        put_beside(mine.module, mask.clone())
        multiply_dense(mine.module)


def _mask_of(layer: Layer) -> Tensor:
    mask = mask_beside(layer.module)
    return layer.module.weight != 0 if mask is None else mask


def _counterparts(model: nn.Module, layers: Sequence[Layer]) -> tuple[nn.Module, list[Layer]]:
    """The model, or the one that it wraps as `module`, and its layers of the same names.

    What torch.compile puts around a model or a part of it does not count.
    """
    modules = {_plain(name): m for name, m in model.named_modules(remove_duplicate=False)}
    layers = [replace(layer, name=_plain(layer.name)) for layer in layers]
    lost = [layer.name for layer in layers if not _has_weight(modules.get(layer.name))]
    if lost and isinstance(inner := modules.get("module"), nn.Module):
        return _counterparts(inner, layers)
    if lost:
        raise ValueError(f"Pruner.apply_masks: expected layers {lost} in the model, got none")
    for layer in layers:
        wanted, got = layer.module.weight.shape, modules[layer.name].weight.shape
        if got != wanted:
            raise ValueError(
                f"Pruner.apply_masks: expected a weight of shape {tuple(wanted)} in layer "
                f"{layer.name!r}, got {tuple(got)}"
            )
    return model, [Layer(layer.name, modules[layer.name]) for layer in layers]


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _has_weight(module: nn.Module | None) -> bool:
    return isinstance(getattr(module, "weight", None), nn.Parameter)
